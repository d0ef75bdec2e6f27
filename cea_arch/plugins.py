"""Other people's packages for the toolbox: importing one enters its networks, models and data sets into registries."""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from cea_arch.compat import REMEDY, has_basicsr, registry
from cea_arch.errors import UserError, told

_CLASH = re.compile(r"named '(\w+)' was already registered in '(\w+)'")  # what basicsr says
_loaded: dict[str, ModuleType] = {}  # modules by their names, files by their whole paths


def load_plugins(names: Iterable[str], label: str = '--plugin') -> None:
    """Import modules that register what is theirs, once each; what BasicSR's registries hold is theirs, too, then.

    Args:
        names: Modules, such as ``hat`` or ``mine.archs``, looked for as Python does and in the working directory; or
            files ``NAME.py``, from there.
        label: What named them, for errors.

    Raises:
        UserError: There is none of that name, or its import fails: which, where and why; basicsr is absent.
    """
    for name in names:
        is_file = name.endswith('.py')
        if not name.strip() or ('/' in name and not is_file):
            raise UserError(f'{label}: expected a module, such as hat.archs, or a file NAME.py; got {name!r}.')
        file = Path(name).expanduser().absolute()
        key = str(file) if is_file else name
        if key in _loaded:
            continue
        if not has_basicsr():
            raise UserError(f'{label} {name}: {REMEDY}')
        _make_findable(str(file.parent if is_file else Path.cwd()))
        try:
            module = _import_file(file) if is_file else importlib.import_module(name)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # of code that is not ours
            raise UserError(f'{label}: {name} cannot be imported: {_said(error)}') from error
        if getattr(module, '__file__', None) is None:
            raise UserError(f'{label}: {name} is a folder without __init__.py: name the modules in it.')
        _loaded[key] = module


def loaded_plugins(with_folders: bool = True) -> list[str]:
    """What has been loaded, as :func:`load_plugins` takes it; files without their folders on request."""
    return [name if with_folders or not name.endswith('.py') else Path(name).name for name in _loaded]


def _make_findable(folder: str) -> None:
    """At the end, so that nothing else is found there first; for good, as plugins import more when they run."""
    if folder not in sys.path:
        sys.path.append(folder)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f'plugin {file} does not exist.')
    other = sys.modules.get(file.stem) or importlib.util.find_spec(file.stem)
    origin = getattr(other, '__file__', None) or getattr(other, 'origin', None)
    if other is not None and (origin is None or Path(origin).resolve() != file.resolve()):
        raise UserError(f'plugin {file}: there is another module called {file.stem} ({origin}); rename the file.')
    return importlib.import_module(file.stem)


def _said(error: BaseException) -> str:
    """Why an import failed."""
    if clash := _CLASH.search(str(error)):
        name, kind = clash[1], clash[2].upper()
        holder = inspect.getfile(dict(iter(registry(kind)))[name])
        return f'it registers {name!r} in {kind}_REGISTRY, which {holder} has registered already.'
    return told(error)
