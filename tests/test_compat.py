"""Imports, each in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cea_arch import compat
from cea_arch.cli import main
from cea_arch.compat import has_basicsr
from tests.conftest import ROOT

needs_basicsr = pytest.mark.skipif(not has_basicsr(), reason='basicsr is not installed')

BLOCK = """
import sys
class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'basicsr' or name.startswith('basicsr.'):
            raise ModuleNotFoundError("No module named 'basicsr'", name='basicsr')
sys.meta_path.insert(0, Block)
"""
# what basicsr's registries must hold
REGISTERED = """
from basicsr.utils import registry
for name, kind in (('CEAIR', 'ARCH'), ('CEABlock', 'ARCH'), ('CEALayer', 'ARCH'), ('WithCEA', 'ARCH'),
                   ('CEADataset', 'DATASET'), ('CEAFFTLoss', 'LOSS'), ('calculate_cea_ssim_uniform', 'METRIC'),
                   ('CEAModel', 'MODEL')):
    assert name in getattr(registry, kind + '_REGISTRY'), name
"""


def run(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@needs_basicsr
def test_import_registers_everything_quietly_after_a_failed_import_of_basicsr():
    result = run(
        """
try:
    import basicsr
except ImportError:
    print('failed')
import cea_arch, basicsr
from basicsr.utils.registry import *
from basicsr.utils import registry
assert basicsr.utils is not None
"""
        + REGISTERED,
        '-W',
        'default::DeprecationWarning',
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout in ('failed\n', '')
    assert 'basicsr' not in result.stderr


@needs_basicsr
def test_nothing_is_replaced_that_exists():
    result = run("""
import sys, types
real = types.ModuleType('torchvision.transforms.functional_tensor')
real.rgb_to_grayscale = lambda img: 'real'
sys.modules[real.__name__] = real
import cea_arch, torchvision.transforms.functional_tensor as used
from basicsr.data import degradations
assert used is real and degradations.rgb_to_grayscale is real.rgb_to_grayscale
from cea_arch.compat import _ReplacementFinder
assert sys.meta_path[-1] is _ReplacementFinder
assert _ReplacementFinder.find_spec('torchvision.transforms.other') is None
""")
    assert result.returncode == 0, result.stderr


@needs_basicsr
@pytest.mark.parametrize(
    ('name', 'check'),
    [
        (
            'torchvision.transforms.functional_tensor',
            'm.rgb_to_grayscale(__import__("torch").rand(3, 4, 4)).shape == (1, 4, 4)',
        ),
        ('scipy.ndimage.filters', 'm.convolve([1, 2], [1]).tolist() == [1, 2]'),
        ('distutils.version', 'm.LooseVersion("0.29.2+cu130") >= m.LooseVersion("0.9.0")'),
    ],
)
def test_each_replacement_does_its_work(name, check):
    result = run(f"""
import importlib, sys
from importlib.machinery import ModuleSpec
from cea_arch import compat
spec = compat._ReplacementFinder.find_spec({name!r})
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
assert {check}
""")
    assert result.returncode == 0, result.stderr


def test_layers_and_networks_run_without_basicsr():
    result = run(
        BLOCK
        + """
import torch
from cea_arch.networks import CEAIR
from cea_arch.networks.with_cea import WithCEA
from cea_arch.compat import registry
from cea_arch.layers import CEALayer
assert CEAIR(size='T')(torch.rand(1, 3, 9, 9)).shape == (1, 3, 9, 9)
assert CEALayer(4)(*torch.rand(2, 1, 4, 2, 2)).shape == (1, 4, 2, 2)
assert not any(name.startswith('basicsr') for name in sys.modules)
for look_up in (lambda: registry('ARCH'), lambda: WithCEA({'type': 'SwinIR'})):
    try:
        look_up()
    except ImportError as error:
        assert 'basicsr is not installed: `cea setup`' in str(error)
    else:
        raise AssertionError
from cea_arch.cli import main
sys.exit(main(['train', '-opt', 'options/cea_demo.yml']))
"""
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith('cea train: basicsr is not installed: `cea setup`')
    assert len(result.stderr.strip().splitlines()) == 1


def test_basicsr_builds_though_its_setup_reads_by_locals_what_exec_wrote(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(compat._SITECUSTOMIZE)
    code = """
def get_version():
    exec(compile('__version__ = str(1 + len(other))', 'version.py', 'exec'))
    return locals()['__version__']


other = '12'
names = {}
exec('a = 3', names)
exec('b = 4')
print(get_version(), names['a'], b)
"""
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == '3 3 4\n', result.stderr


def test_setup_installs_basicsr_where_it_is_absent(monkeypatch, capsys):
    ran = []

    def install(command, env, check):
        ran.append((command, (Path(env['PYTHONPATH']) / 'sitecustomize.py').is_file()))
        return subprocess.CompletedProcess(command, len(ran) - 1)

    monkeypatch.setattr(subprocess, 'run', install)
    answers = iter([False, True, False])
    monkeypatch.setattr(compat, 'has_basicsr', lambda: next(answers))
    assert main(['setup']) == 0
    assert capsys.readouterr().out == 'basicsr is installed.\n'
    assert main(['setup']) == 2
    assert '--no-build-isolation basicsr==1.4.2` ended with 1' in capsys.readouterr().err
    assert [found for _, found in ran] == [True, True]
    assert ran[0][0][-2:] == ['--no-build-isolation', 'basicsr==1.4.2']


@needs_basicsr
def test_setup_leaves_what_is_there(capsys):
    assert main(['setup']) == 0
    assert 'basicsr is installed' in capsys.readouterr().out


def test_layers_never_import_basicsr():
    for path in (ROOT / 'cea_arch' / 'layers').glob('*.py'):
        assert 'import basicsr' not in path.read_text()
        assert 'from basicsr' not in path.read_text()
