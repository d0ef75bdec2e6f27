"""Files that are whole whenever they are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` at the end, and goes if that fails."""
    aside = Path(f'{os.fspath(path)}.{os.getpid()}.tmp')
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
