"""What a user got wrong, said in a sentence."""

import difflib
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType


class UserError(ValueError):
    """A mistake in options, files or data, which the user can mend. The commands print it without a traceback.

    Args:
        message: What was expected and what was found, and where.
        label: The option at fault, if it is one of an option file.
    """

    def __init__(self, message: str, label: str | None = None) -> None:
        super().__init__(message)
        self.label = label


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that an optional extra brings; UserError with the command that installs it if it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f'{what} need{"" if what.endswith("s") else "s"} an extra: `pip install -e ".[{extra}]"` where you cloned '
            'this repository.'
        ) from error


def suggest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known word nearest to ``word``, or holding it; empty where there is none."""
    word, known = str(word), list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    near = near or [name for name in known if len(word) > 2 and word.casefold() in name.casefold()]
    return f' Did you mean {near[0]!r}?' if near else ''


def lookup(registry: Iterable[tuple[str, Callable]], name: object, label: str) -> Callable:
    """The object of a registry by its name, for BasicSR's own also without their suffix; UserError if there is none."""
    exact = dict(iter(registry))
    known = {key.removesuffix('_basicsr'): value for key, value in exact.items()} | exact
    if name not in known:
        names = sorted({key.removesuffix('_basicsr') for key in known})
        raise UserError(
            f'{label}: {name!r} is not registered.{suggest(name or "", names)} Known: {", ".join(names)}.', label
        )
    return known[name]
