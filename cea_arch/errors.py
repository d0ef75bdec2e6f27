"""What a user got wrong, said in a sentence."""

import difflib
import importlib
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

PLUGINS = (
    "If it is another package's, name what registers it, a module or a file: `--plugin MODULE`, or `plugins: [MODULE]` "
    'in the option file.'
)
MOST_SAID = 12  # of several mistakes
_PASSED = ('<frozen', str(Path(__file__).parent), str(Path(importlib.__file__).parent))  # their lines tell nothing


class UserError(ValueError):
    """A mistake in options, files or data, which the user can mend. The commands print it without a traceback.

    Args:
        message: What was expected and what was found, and where.
        label: The option at fault, if it is one of an option file.
    """

    def __init__(self, message: str, label: str | None = None) -> None:
        super().__init__(message)
        self.label = label


class UserErrors(UserError):
    """Several mistakes at once, a line each."""

    def __init__(self, each: Sequence[UserError]) -> None:
        shown = [str(error) for error in each[:MOST_SAID]]
        more = [f'and {len(each) - MOST_SAID} more.'] if len(each) > MOST_SAID else []
        super().__init__('\n  '.join([f'{len(each)} mistakes:', *shown, *more]), each[0].label)
        self.each = each


def raise_all(mistakes: Sequence[UserError]) -> None:
    """Raise what there is: nothing, one, or several as one."""
    if mistakes:
        raise UserErrors(mistakes) if len(mistakes) > 1 else mistakes[0]


class Notice(UserWarning):
    """What a user should know; the commands print it as a line of theirs."""


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
    near = near or sorted((n for n in known if len(word) > 2 and word.casefold() in n.casefold()), key=len)
    return f' Did you mean {near[0]!r}?' if near else ''


def told(error: BaseException) -> str:
    """An error of other people's code as a sentence, with the last line of theirs that led to it; torch's are not."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_PASSED)]
    frames = [f for f in frames if '/torch/' not in Path(f.filename).as_posix()]
    place = f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''
    lines = str(error).strip().splitlines() or ['']
    if lines[0].startswith('Caught '):  # in a worker, whose traceback it tells
        return lines[-1]
    return f'{type(error).__name__}: {lines[0]}{place}'


def lookup(registry: Iterable[tuple[str, Callable]], name: object, label: str) -> Callable:
    """The object of a registry by its name, for BasicSR's own also without their suffix; UserError if there is none."""
    exact = dict(iter(registry))
    known = {key.removesuffix('_basicsr'): value for key, value in exact.items()} | exact
    if name not in known:
        names = sorted({key.removesuffix('_basicsr') for key in known})
        raise UserError(
            f'{label}: {name!r} is not registered.{suggest(name or "", names)} {PLUGINS} Known: {", ".join(names)}.',
            label,
        )
    return known[name]
