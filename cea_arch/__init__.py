"""CEA (Continuous Expert Assembly, arXiv 2605.06127) as a plugin for BasicSR.

Importing it is light: torch and basicsr are imported by what needs them, and once basicsr is, before or after, its
registries know all of ours. ``restore`` and ``Restorer`` are those of :mod:`cea_arch.restoring.restorer`.
"""

import functools
import importlib
import sys
from typing import Any

from cea_arch import compat

__version__ = '0.1.0'
__all__ = ['Restorer', 'restore']


def _register() -> None:
    """Put networks, data set, loss, metrics and model into BasicSR's registries, and complete its option files."""
    importlib.import_module('cea_arch.archs')
    _extend_parser()


def _extend_parser() -> None:
    """Have BasicSR's parser of options complete ours, so that its own ``train_pipeline`` runs our option files."""
    module = importlib.import_module('basicsr.utils.options')
    parse_options = module.parse_options

    @functools.wraps(parse_options)
    def parse(*args: Any, **options: Any) -> tuple[dict[str, Any], Any]:
        opt, given = parse_options(*args, **options)
        return importlib.import_module('cea_arch.training.options').complete(opt), given

    module.parse_options = parse
    for name in ('basicsr.train', 'basicsr.test'):  # they have it under a name of their own
        if name in sys.modules:
            sys.modules[name].parse_options = parse


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module('cea_arch.restoring.restorer'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


compat.when_basicsr_is_imported(_register)
