"""Stock basicsr 1.4.2 on today's Python, torch and torchvision: in memory, no file of it touched.

basicsr 1.4.2 imports three modules that newer releases have removed or moved. A finder at the very end of
``sys.meta_path`` answers for exactly these names, so it is never asked where the real module exists. On Python 3.13
and later its source does not build as it is; ``cea setup`` builds it.
"""

import argparse
import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from cea_arch.errors import UserError
from cea_arch.importing import follow_import

# Python runs it when it starts to build basicsr, whose setup.py reads by locals() what exec() has put there; since
# 3.13 (PEP 667) nothing is put there
_SITECUSTOMIZE = """
import builtins, sys

original = builtins.exec

def exec_here(source, /, globals=None, locals=None, **options):
    if globals is not None or locals is not None:
        return original(source, globals, locals, **options)
    frame = sys._getframe(1)
    names = dict(frame.f_locals)
    original(source, frame.f_globals, names, **options)
    frame.f_locals.update(names)

builtins.exec = exec_here
"""
_ABSENT = object()
BASICSR = '1.4.2'
MOVED = ('rgb2ycbcr', 'bgr2ycbcr', 'ycbcr2rgb', 'ycbcr2bgr')  # where packages for basicsr 1.3 look for them
REMEDY = 'basicsr is not installed: `cea setup` installs it. CEA layers, networks and restoring work without it.'


def _fill_functional_tensor(module: ModuleType) -> None:
    """torchvision removed it in 0.17; basicsr uses one function of it, which lives on elsewhere."""
    module.rgb_to_grayscale = importlib.import_module('torchvision.transforms.functional').rgb_to_grayscale


def _fill_scipy_filters(module: ModuleType) -> None:
    """scipy announces its removal for 2.0; basicsr uses ``convolve``."""
    module.convolve = importlib.import_module('scipy.ndimage').convolve


def _fill_distutils(module: ModuleType) -> None:
    """Python 3.12 removed it; setuptools brings it where installed. An empty package, so that ``version`` is found."""
    module.__path__ = []


def _fill_distutils_version(module: ModuleType) -> None:
    """basicsr compares torchvision's version with ``LooseVersion``."""
    module.LooseVersion = importlib.import_module('packaging.version').Version


REPLACEMENTS: dict[str, Callable[[ModuleType], None]] = {
    'torchvision.transforms.functional_tensor': _fill_functional_tensor,
    'scipy.ndimage.filters': _fill_scipy_filters,
    'distutils': _fill_distutils,
    'distutils.version': _fill_distutils_version,
}


class _ReplacementFinder:
    """Finds and fills the modules of ``REPLACEMENTS``, and no others."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls, origin='cea_arch.compat') if name in REPLACEMENTS else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        REPLACEMENTS[module.__name__](module)


@contextmanager
def _around_basicsr() -> Iterator[None]:
    """basicsr's import: quietly, and then what waits for it is run."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Please import', category=DeprecationWarning)
        yield
    _keep_moved()
    for call in _waiting:
        call()


def _keep_moved() -> None:
    """Functions of colour that left ``matlab_functions`` after basicsr 1.3.4, which HAT imports from there."""
    if importlib.util.find_spec('basicsr.utils.color_util') is None:
        return  # older: they are still there
    old, new = (importlib.import_module(f'basicsr.utils.{name}') for name in ('matlab_functions', 'color_util'))
    for name in MOVED:
        if not hasattr(old, name):
            setattr(old, name, getattr(new, name))


_waiting: list[Callable[[], None]] = []


def when_basicsr_is_imported(call: Callable[[], None]) -> None:
    """Run ``call`` after basicsr's import, now if it has been imported already. Puts the finders into their places."""
    _waiting.append(call)
    if _ReplacementFinder not in sys.meta_path:
        sys.meta_path.append(_ReplacementFinder)
        follow_import('basicsr', _around_basicsr)
    if 'basicsr' in sys.modules:
        _keep_moved()
        call()
        return
    # an attempt that failed before us leaves submodules behind that a new import would not bind to the package
    for name in [name for name in sys.modules if name.startswith('basicsr.')]:
        del sys.modules[name]


def has_basicsr() -> bool:
    """Whether basicsr is installed; it is not imported."""
    try:
        return importlib.util.find_spec('basicsr') is not None
    except ModuleNotFoundError:
        return False


def set_up(args: argparse.Namespace) -> None:
    """Install basicsr where it is absent: ``cea setup``.

    It is built without isolation, in which it would fetch a second torch, by pip or, where that is absent, uv.

    Raises:
        UserError: There is neither, or it failed; what it said is on the screen.
    """
    if has_basicsr():
        print('basicsr is installed; `cea doctor` says what it is.')
        return
    if importlib.util.find_spec('pip'):
        install = [sys.executable, '-m', 'pip', 'install']
    elif uv := shutil.which('uv'):
        install = [uv, 'pip', 'install', '--python', sys.executable]
    else:
        raise UserError('neither pip nor uv is here to install with; `python -m ensurepip` brings pip.')
    if not importlib.util.find_spec('setuptools'):
        _run(install, 'setuptools', 'wheel')
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'sitecustomize.py').write_text(_SITECUSTOMIZE, 'utf-8')
        _run(install, '--no-build-isolation', f'basicsr=={BASICSR}', PYTHONPATH=folder)
    importlib.invalidate_caches()
    if not has_basicsr():
        raise UserError(f'basicsr {BASICSR} was installed, but not for this Python, {sys.executable}.')
    print('basicsr is installed.')


def _run(command: list[str], *words: str, **environment: str) -> None:
    code = subprocess.run([*command, *words], env=os.environ | environment, check=False).returncode
    if code:
        raise UserError(f'`{shlex.join([*command, *words])}` ended with {code}; what it said is above.')


def registry(kind: str) -> Any:
    """BasicSR's registry of ``kind``, such as ARCH, with all of ours in it; ImportError where basicsr is absent."""
    if not has_basicsr():
        raise ImportError(REMEDY)
    return getattr(importlib.import_module('basicsr.utils.registry'), f'{kind}_REGISTRY')


@contextmanager
def replaced(changes: list[tuple[ModuleType, str, Any]]) -> Iterator[None]:
    """Let names of modules stand for other things until the end of the block."""
    old = [(module, name, getattr(module, name, _ABSENT)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in old:
            if value is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)
