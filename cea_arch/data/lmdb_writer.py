"""Write LMDBs that BasicSR reads: encoded bytes as they are, written aside and renamed when complete."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import lmdb

from cea_arch.data.image_store import decode
from cea_arch.errors import UserError

_FIRST_MAP_SIZE = 64 * 2**20  # bytes; doubled whenever it is full


def write_lmdb(images: Iterable[tuple[str, bytes]], destination: str | Path, overwrite: bool = False) -> int:
    """Store encoded images under their keys, with ``meta_info.txt`` in BasicSR's format.

    Args:
        images: ``(key, bytes of an image file)``. Keys are ASCII, as BasicSR's reader wants them, and unique.
        destination: Folder to make; its name ends in ``.lmdb``.
        overwrite: Replace an existing one, once the new one is complete.

    Returns:
        The number of images written.

    Raises:
        UserError: A bad name, an existing destination, bytes that are no image, a key twice, or no images at all.
    """
    destination = Path(destination)
    if destination.suffix != '.lmdb':
        raise UserError(f'the name of an LMDB must end in .lmdb, got {str(destination)!r}.')
    if destination.exists() and not overwrite:
        raise UserError(f'{destination} exists; remove it first, or ask for it to be overwritten.')
    aside = destination.with_name(destination.name + '.tmp')
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    environment = lmdb.open(str(aside), map_size=_FIRST_MAP_SIZE)
    lines = {}
    for key, data in images:
        if not key.isascii() or key in lines:
            raise UserError(f'{destination}: key {key!r} {"is there twice" if key in lines else "is not ASCII"}.')
        height, width, channels = decode(data, f'image {key!r}').shape
        lines[key] = f'{key}.png ({height},{width},{channels}) 1\n'
        _put(environment, key.encode('ascii'), data)
    environment.close()
    if not lines:
        shutil.rmtree(aside)
        raise UserError(f'no images to write to {destination}.')
    (aside / 'meta_info.txt').write_text(''.join(lines[key] for key in sorted(lines)), 'utf-8')
    if destination.exists():
        shutil.rmtree(destination)
    aside.rename(destination)
    return len(lines)


def _put(environment: lmdb.Environment, key: bytes, data: bytes) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                transaction.put(key, data)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()['map_size'])
