"""Files that are whole whenever they are there, and folders that one process has for itself."""

import errno
import json
import math
import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cea_arch.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGED_WEIGHTS = Path(__file__).parent / 'weights' / 'cea_ir_t.safetensors'  # see the card beside it


@contextmanager
def written_beside(path: str | os.PathLike, suffix: str = '') -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` at the end, and goes if that fails.

    Its name ends in ``suffix`` and is short, however long that of ``path`` is: file systems take 255 bytes.
    """
    path = Path(path)
    aside = path.with_name(f'.{zlib.crc32(path.name.encode(errors="surrogateescape")):08x}.{os.getpid()}.tmp{suffix}')
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every program reads: numbers that are not finite become the texts ``inf``, ``-inf`` and ``nan``."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(inner) for inner in item]
        return str(item) if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What :func:`as_json` has written, with its numbers that are not finite."""

    def numbers(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: numbers(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [numbers(inner) for inner in item]
        return float(item) if item in ('inf', '-inf', 'nan') else item

    return numbers(json.loads(text))


def as_path(text: str) -> Path:
    """The path that a user named; ``~`` is the home folder also where a shell leaves it, as in ``--output=~/x``."""
    return Path(text).expanduser()


def refuse_to_replace(path: Path, overwrite: bool) -> None:
    """Raise UserError if ``path`` exists, unless ``overwrite``."""
    try:
        exists = path.exists()
    except OSError as error:  # as of a name that is too long
        raise UserError(f'{path} cannot be written: {error.strerror}.') from error
    if exists and not overwrite:
        raise UserError(f'{path} exists; --overwrite replaces it.')


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote have left in ``folder``; none may write there now."""
    for path in Path(folder).rglob('*.tmp'):
        path.unlink()


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from locking ``folder`` until the end of the block or, however it comes, of this process.

    What is locked is ``.<name>.lock`` beside the folder, so that the folder may be renamed meanwhile. Children of this
    process do not keep the lock. On Windows nothing is locked.

    Raises:
        UserError: Another process has it; names both.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder).with_name(f'.{Path(folder).name}.lock')
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, folder)
    try:
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}')
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path, folder: str | os.PathLike) -> TextIO:
    while True:
        file = path.open('a+', encoding='utf-8')
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            holder = file.read() or 'another process'
            file.close()
            raise UserError(f'{folder} is in use by {holder}. Wait for it, or choose another name.') from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # whoever had it has removed it in between
