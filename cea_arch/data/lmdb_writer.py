"""Write LMDBs that BasicSR reads: encoded bytes as they are, written aside, verified, and renamed when complete."""

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lmdb

from cea_arch.data.image_store import close_lmdb, image_size, open_lmdb
from cea_arch.errors import Notice, UserError
from cea_arch.files import written_beside

_FIRST_MAP_SIZE = 64 * 2**20  # bytes; doubled whenever it is full
_BATCH_SIZE = 32 * 2**20  # bytes of images a transaction; each one waits for the disk once


@dataclass
class Written:
    """What :func:`write_lmdb` did.

    Attributes:
        images: How many images the LMDB holds.
        kept: How many of them an earlier run had stored.
    """

    images: int
    kept: int


def write_lmdb(images: Iterable[tuple[str, bytes]], destination: str | Path, overwrite: bool = False) -> Written:
    """Store encoded images under their keys (UTF-8), with ``meta_info.txt`` in BasicSR's format.

    Images go to ``<destination>.tmp``, a transaction for every 32 MB, so that a run that was killed loses no more: the
    next one keeps what is there byte for byte and goes on. Every stored image is read back and compared with what was
    given, byte for byte, before the folder gets its name. A destination that holds exactly these images is left alone.

    Args:
        images: ``(key, bytes of an image file)``; keys are unique, on one line, at most 511 bytes. Taken one by one.
        destination: Folder to make; its name ends in ``.lmdb``.
        overwrite: Replace an existing one, once the new one is complete.

    Raises:
        UserError: A bad name, a destination that holds something else, bytes that are no image, a key twice, no images.
    """
    destination = Path(destination)
    if destination.suffix != '.lmdb':
        raise UserError(f'the name of an LMDB must end in .lmdb, got {str(destination)!r}.')
    if destination.exists() and not overwrite:
        return _compare(images, destination)
    aside = destination.with_name(destination.name + '.tmp')
    _remove_damaged(aside)
    aside.mkdir(parents=True, exist_ok=True)
    try:
        with lmdb.open(str(aside), map_size=_FIRST_MAP_SIZE) as environment:
            lines, kept = _store(images, environment, destination)
            _drop_others(environment, set(lines), destination)
    except lmdb.Error as error:  # a full disk, a limit on the size of files, a file system without locks
        raise UserError(
            f'{aside} cannot be written: {str(error).rpartition(": ")[2]}. What it holds is kept.'
        ) from error
    if not lines:
        shutil.rmtree(aside)
        raise UserError(f'no images to write to {destination}.')
    _write_meta(aside, lines)
    if destination.exists():
        close_lmdb(destination)
        shutil.rmtree(destination)
    aside.rename(destination)
    return Written(len(lines), kept)


def _write_meta(folder: Path, lines: dict[str, str]) -> None:
    with written_beside(folder / 'meta_info.txt') as aside:
        aside.write_text(''.join(lines[key] for key in sorted(lines)), 'utf-8')


def _remove_damaged(aside: Path) -> None:
    """Begin anew where what an earlier run has left is no LMDB, or is cut short; reading it would kill the process."""
    if not (aside / 'data.mdb').is_file():
        return
    try:
        open_lmdb(aside)
    except (UserError, lmdb.Error) as error:
        warnings.warn(f'{aside} is damaged, and is written anew: {error}', Notice, stacklevel=3)
        shutil.rmtree(aside)
    else:
        close_lmdb(aside)


def _store(
    images: Iterable[tuple[str, bytes]], environment: lmdb.Environment, destination: Path
) -> tuple[dict[str, str], int]:
    """Put the images that are not there yet; returns lines of the meta info by key, and how many images were there."""
    lines, batch, size, kept = {}, [], 0, 0
    for key, data in images:
        stored_key = _encode(key, environment, destination)
        if key in lines:
            raise UserError(f'{destination}: key {key!r} is there twice.')
        lines[key] = _line(key, data)
        with environment.begin(buffers=True) as transaction:
            if transaction.get(stored_key) == data:
                kept += 1
                continue
        batch.append((stored_key, data))
        size += len(data)
        if size >= _BATCH_SIZE:
            _put(environment, batch)
            _read_back(environment, batch, destination)
            batch, size = [], 0
    _put(environment, batch)
    _read_back(environment, batch, destination)
    return lines, kept


def _encode(key: str, environment: lmdb.Environment, destination: Path) -> bytes:
    stored_key = key.encode()
    if not key.isprintable() or not 0 < len(stored_key) <= environment.max_key_size():
        raise UserError(
            f'{destination}: key {key!r} must be one line of 1 to {environment.max_key_size()} bytes, '
            f'it has {len(stored_key)}.'
        )
    return stored_key


def _put(environment: lmdb.Environment, batch: list[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, data in batch:
                    transaction.put(key, data)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()['map_size'])


def _read_back(environment: lmdb.Environment, batch: list[tuple[bytes, bytes]], destination: Path) -> None:
    with environment.begin(buffers=True) as transaction:
        for key, data in batch:
            if transaction.get(key) != data:
                raise UserError(f'{destination}: {key.decode()!r} reads back other than it was written.')


def _drop_others(environment: lmdb.Environment, keys: set[str], destination: Path) -> None:
    """Delete what an earlier run left and this one does not hold."""
    with environment.begin(write=True) as transaction:
        left = [key for key in transaction.cursor().iternext(values=False) if key.decode() not in keys]
        for key in left:
            transaction.delete(key)
        if transaction.stat()['entries'] != len(keys):
            raise UserError(f'{destination}: {transaction.stat()["entries"]} of {len(keys)} images are there.')


def _compare(images: Iterable[tuple[str, bytes]], destination: Path) -> Written:
    """Leave an LMDB alone that holds exactly ``images``, but for a list of them that is absent."""
    count, lines, listed = 0, {}, (destination / 'meta_info.txt').is_file()
    with _opened(destination).begin(buffers=True) as transaction:
        for key, data in images:
            if transaction.get(key.encode()) != data:
                raise UserError(
                    f'{destination} exists and holds another {key!r}; remove it first, or ask for it to be overwritten.'
                )
            count += 1
            if not listed:
                lines[key] = _line(key, data)
        if count != transaction.stat()['entries']:
            raise UserError(
                f'{destination} exists and holds {transaction.stat()["entries"]} images, not {count}; remove it first, '
                'or ask for it to be overwritten.'
            )
    close_lmdb(destination)
    if not listed:
        _write_meta(destination, lines)
    return Written(count, count)


def _opened(destination: Path) -> lmdb.Environment:
    try:
        return open_lmdb(destination)
    except lmdb.Error as error:
        raise UserError(f'{destination} exists and is no LMDB ({error}); remove it first.') from error


def _line(key: str, data: bytes) -> str:
    height, width = image_size(data, f'image {key!r}')
    return f'{key}.png ({height},{width},3) 1\n'
