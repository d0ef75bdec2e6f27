"""Imports, each in an interpreter of its own."""

import subprocess
import sys

import pytest

from cea_arch.compat import has_basicsr
from tests.conftest import ROOT

needs_basicsr = pytest.mark.skipif(not has_basicsr(), reason='basicsr does not build on this Python')

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
                   ('AllInOneDataset', 'DATASET'), ('CEAFFTLoss', 'LOSS'), ('calculate_ssim_uniform', 'METRIC'),
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
        assert 'basicsr is not installed: `pip install' in str(error)
    else:
        raise AssertionError
from cea_arch.cli import main
sys.exit(main(['train', '-opt', 'options/cea_demo.yml']))
"""
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith('cea train: basicsr is not installed: `pip install')
    assert len(result.stderr.strip().splitlines()) == 1


def test_layers_never_import_basicsr():
    for path in (ROOT / 'cea_arch' / 'layers').glob('*.py'):
        assert 'import basicsr' not in path.read_text()
        assert 'from basicsr' not in path.read_text()
