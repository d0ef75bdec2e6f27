"""Stock basicsr 1.4.2 on today's torch and torchvision: in memory, before basicsr is imported, no file of it touched.

basicsr 1.4.2 imports three modules that newer releases have removed or moved. A finder at the very end of
``sys.meta_path`` answers for exactly these names, so it is never asked where the real module exists.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

REMEDY = (
    'basicsr is not installed: `pip install --no-build-isolation basicsr==1.4.2` installs it on Python 3.10 to 3.12 '
    '(its source does not build on 3.13 and later). CEA layers and networks work without it.'
)


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


def import_basicsr() -> ModuleType | None:
    """Import basicsr with the replacements at hand; ``None`` where it is not installed. Other errors are raised."""
    if _ReplacementFinder not in sys.meta_path:
        sys.meta_path.append(_ReplacementFinder)
    if 'basicsr' not in sys.modules:
        # an attempt that failed before us leaves submodules behind that a new import would not bind to the package
        for name in [name for name in sys.modules if name.startswith('basicsr.')]:
            del sys.modules[name]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Please import', category=DeprecationWarning)
            return importlib.import_module('basicsr')
    except ModuleNotFoundError as error:
        if error.name != 'basicsr':
            raise
        return None


class _NoRegistry:
    """Stands where a registry would, if basicsr is absent: classes stay usable, look-ups say what is missing."""

    def __iter__(self) -> Iterator:
        raise ImportError(f'cannot look up a network: {REMEDY}')

    @staticmethod
    def register(obj: type | None = None, suffix: str | None = None) -> Callable | type:
        return obj if obj is not None else lambda cls: cls

    @staticmethod
    def get(name: str) -> None:
        raise ImportError(f'cannot look up {name!r}: {REMEDY}')


HAS_BASICSR = import_basicsr() is not None
ARCH_REGISTRY = importlib.import_module('basicsr.utils.registry').ARCH_REGISTRY if HAS_BASICSR else _NoRegistry()
