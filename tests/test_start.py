"""What is imported when, each in an interpreter of its own."""

import os
import subprocess
import sys

import pytest

from cea_arch.cli import build_parser
from tests.conftest import ROOT
from tests.test_compat import REGISTERED, needs_basicsr, run

HEAVY = ('torch', 'torchvision', 'basicsr', 'numpy', 'cv2', 'PIL', 'yaml', 'skimage')
COMMANDS = (
    'train',
    'test',
    'check',
    'study',
    'schema',
    'score',
    'report',
    'modules',
    'merge',
    'restore',
    'explain',
    'export',
)
COMMANDS += ('explain', 'demo', 'profile', 'doctor', 'info', 'setup')
SAID = '\nprint("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))'


def imported(code):
    """Top-level modules that are there after ``code``, and all that was said."""
    result = run(f'import sys\n{code}{SAID}')
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition('imported: ')[2].split()), result.stdout + result.stderr


def heavy(modules):
    return [name for name in HEAVY if name in modules]


def test_importing_the_package_is_light():
    assert heavy(imported('import cea_arch')[0]) == []


@pytest.mark.parametrize(
    'arguments',
    [['--help'], ['--version'], ['restor'], ['restore', '--tiles'], *([c, '--help'] for c in COMMANDS)],
    ids=str,
)
def test_help_and_mistyped_arguments_need_nothing_heavy(arguments):
    code = f'from cea_arch.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass'
    modules, said = imported(code)
    assert heavy(modules) == []
    assert 'usage: cea' in said or 'cea_arch 0' in said


def test_every_command_was_tried():
    commands = next(action for action in build_parser()._actions if action.dest == 'command')
    assert set(commands.choices) == set(COMMANDS)


def test_restoring_a_picture_needs_neither_basicsr_nor_torchvision(tmp_path, photographs):
    (tmp_path / 'a.png').write_bytes(photographs['chelsea.png'])
    arguments = ['restore', str(tmp_path / 'a.png'), '-o', str(tmp_path / 'out'), '--device', 'cpu']
    modules, _ = imported(f'from cea_arch.cli import main\nassert main({arguments}) == 0')
    assert (tmp_path / 'out' / 'a.png').is_file()
    assert heavy(modules) == ['torch', 'numpy', 'cv2', 'PIL']


def test_preparing_data_needs_no_torch():
    assert heavy(imported('import cea_arch.data.prepare')[0]) == ['numpy', 'cv2', 'PIL']


# as other plugins make basicsr run with today's torchvision
REPAIRED = """
import types, torchvision.transforms.functional as f
sys.modules['torchvision.transforms.functional_tensor'] = types.SimpleNamespace(rgb_to_grayscale=f.rgb_to_grayscale)
"""
ORDERS = {
    'ours first': 'import cea_arch',
    'basicsr first': REPAIRED + 'import basicsr\nimport cea_arch',
    'a room of ours': 'import cea_arch.archs',
    'the model': 'import cea_arch.models.cea_model',
    'the metrics': 'import cea_arch.metrics.protocols',
    'the loss': 'import cea_arch.losses.fft_loss',
    'options': 'import cea_arch.training.option_rules',
    'loaders': 'import cea_arch.training.loaders',
    'WithCEA': 'from cea_arch.networks import WithCEA\nWithCEA({"type": "MSRResNet"})',
    'the data set': 'import cea_arch.data.cea_dataset',
    'its registry': 'import cea_arch\nimport basicsr.utils.registry',
}


FOUND = (
    """
from basicsr.archs import build_network
from basicsr.train import parse_options
assert parse_options.__wrapped__
assert build_network({'type': 'CEAIR', 'size': 'T'})
import inspect, basicsr
assert 'import *' in inspect.getsource(basicsr)
"""
    + REGISTERED
)
# what they all import anyway is there before, so that it is imported once
FORKS = """
import os, sys, traceback, torch, torchvision, skimage.metrics, cv2

for name, code in {orders}.items():
    child = os.fork()
    if not child:
        try:
            exec(code + {found})
            os._exit(0)
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@needs_basicsr
def test_basicsr_finds_all_of_ours_in_any_order():
    result = run(FORKS.format(orders=ORDERS, found=repr(FOUND)))
    assert result.returncode == 0, result.stderr


@needs_basicsr
def test_a_spawned_worker_finds_them(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        """
import multiprocessing
import cea_arch


def build(size):
    from basicsr.archs import build_network

    return type(build_network({'type': 'CEAIR', 'size': size})).__name__


if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(build, ['T']))
"""
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout == "['CEAIR']\n", result.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [
        sys.executable,
        '-c',
        'import sys; from cea_arch.cli import main; sys.exit(main(["profile", "--size", "T", "--pixels", "8"]))',
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait(300) == 1
