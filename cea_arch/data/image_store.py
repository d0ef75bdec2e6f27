"""Folders and LMDBs of images behind one interface."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import lmdb
import numpy as np
from PIL import Image

from cea_arch.data.pictures import SUFFIXES, as_rgb, decode_picture, is_plain, picture_size
from cea_arch.errors import UserError

_META_LINE = re.compile(r'(?P<name>.+) \((?P<height>\d+),(?P<width>\d+),(?P<channels>\d+)\) \d+')
HIDDEN = {
    '__MACOSX',
    '@eaDir',
    '#recycle',
    '$RECYCLE.BIN',
    'System Volume Information',
    'lost+found',
    '__pycache__',
}
_READ = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
_END_MARKS = {b'\xff\xd8': b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}  # of JPEG and PNG, by how they begin
_environments: dict[str, lmdb.Environment] = {}  # one a process and LMDB: lmdb refuses to open one twice


def _forget_environments() -> None:
    """An environment opened before a fork must not be used after it."""
    for environment in _environments.values():
        environment.close()
    _environments.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_environments)


def open_lmdb(root: Path) -> lmdb.Environment:
    """The LMDB for reading, one environment a process. BasicSR's own client would refuse keys that are not ASCII.

    Raises:
        UserError: Its data file is cut short; reading it would kill the process.
    """
    environment = _environments.get(str(root)) or _environments.get(str(root.resolve()))
    if environment is None:
        environment = lmdb.open(str(root.resolve()), readonly=True, lock=False, readahead=False)
        needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
        found = (root / 'data.mdb').stat().st_size
        if found < needed:
            environment.close()
            raise UserError(f'{root / "data.mdb"} is cut short: {found} of {needed} bytes.')
        _environments[str(root.resolve())] = environment
    return environment


def close_lmdb(root: Path) -> None:
    """Let go of an LMDB that is about to be replaced."""
    environment = _environments.pop(str(root.resolve()), None)
    if environment is not None:
        environment.close()


def decode(data: bytes, where: str) -> np.ndarray:
    """Decode a picture file to RGB ``(H, W, 3)``, uint8, or uint16 where the file has 16 bits; upright, without alpha.

    Of a plain PNG or JPEG the result is a view of OpenCV's BGR image: turning the channels of a whole image would cost
    more than all that a training patch needs besides decoding. All others are read as
    :func:`cea_arch.data.pictures.decode_picture` does; a JPEG with EXIF then takes up to five times as long.

    Raises:
        UserError: The bytes are not a picture, or a truncated one; names ``where`` they came from.
    """
    if not is_plain(data):
        return as_rgb(decode_picture(data, where).pixels)
    img = cv2.imdecode(np.frombuffer(data, np.uint8), _READ)
    if img is None or not _is_whole(data):
        raise UserError(f'{where} cannot be decoded: it is damaged ({len(data)} bytes).')
    return img[..., ::-1]


def image_size(file: Path | bytes, where: str) -> tuple[int, int]:
    """Height and width from the header of a picture file, as :func:`decode` will return them.

    Raises:
        UserError: It is not a picture, or bytes without the end of one; names ``where`` it came from.
    """
    if isinstance(file, bytes) and not _is_whole(file):
        raise UserError(f'{where} is not a readable image: its end is missing.')
    return picture_size(file, where)


def walk_images(root: Path, recursive: bool = True, closed: list[Path] | None = None) -> Iterator[Path]:
    """The picture files below a folder, as :func:`walk_files` finds them; ``closed`` gets those that are not there."""
    return (path for path in walk_files(root, recursive, closed=closed) if path.suffix.lower() in SUFFIXES)


def walk_files(
    root: Path, recursive: bool = True, seen: set[str] | None = None, closed: list[Path] | None = None
) -> Iterator[Path]:
    """The files below a folder, in order of name; links to folders are followed, once each.

    What file managers, cameras' servers, trash cans and notebooks keep for themselves (``HIDDEN``, and names that begin
    with a dot) holds copies, and is passed over. ``seen`` are the resolved folders that were walked before; into
    ``closed`` go those that may not be read.
    """
    seen, links = set() if seen is None else seen, [root]

    def note(error: OSError) -> None:
        if closed is not None:
            closed.append(Path(error.filename))

    while links:  # real folders first: a link must not give its name to one of them
        top = links.pop(0)
        for folder, subfolders, names in os.walk(top, onerror=note):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if recursive and not is_hidden(name))
            links += [path for path in (Path(folder, name) for name in subfolders) if path.is_symlink()]
            for name in sorted(names):
                path = Path(folder, name)
                if is_hidden(name):
                    continue
                try:
                    is_file = path.is_file()
                except OSError:
                    is_file = False
                if is_file:
                    yield path
                elif closed is not None and path.suffix.lower() in SUFFIXES and not path.is_dir():
                    closed.append(path)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is kept by a program for itself."""
    return name.startswith('.') or name in HIDDEN


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end: some versions of OpenCV paint the missing rest grey and say nothing."""
    for start, end in _END_MARKS.items():
        if data.startswith(start) and not data.rstrip(b'\0').endswith(end):
            try:
                with Image.open(io.BytesIO(data)) as img:
                    img.load()
            except (OSError, SyntaxError):  # Pillow raises the latter for a broken PNG
                return False
    return True


class ImageStore:
    """The images below a folder, or in an LMDB of BasicSR's format (``data.mdb`` and ``meta_info.txt``).

    Keys are paths below the root without their suffix, with ``/``; in order of name whatever the file system.

    Args:
        root: The folder, or an LMDB folder, whose name ends in ``.lmdb``.
        io_backend: ``{'type': 'disk'}`` or ``{'type': 'lmdb'}``; by default what the name of the root says.
        label: The option that names the root, for error messages.

    Attributes:
        sizes: Height and width in pixels of each image, by key.

    Raises:
        UserError: The root does not exist, is not of the backend's kind, holds no images, or one that is unreadable.
    """

    def __init__(self, root: str, io_backend: dict | None = None, label: str = 'dataroot') -> None:
        self.root = Path(root).expanduser()
        self.label = label
        named_lmdb = self.root.suffix == '.lmdb'
        self.backend = (io_backend or {'type': 'lmdb' if named_lmdb else 'disk'}).get('type')
        if self.backend not in ('disk', 'lmdb'):
            raise UserError(f'{label}: io_backend type must be disk or lmdb, got {self.backend!r}.')
        if not self.root.is_dir():
            raise UserError(f'{label}: folder {str(root)!r} does not exist (looked for {self.root.absolute()}).')
        if (self.backend == 'lmdb') != named_lmdb:
            raise UserError(f'{label}: io_backend is {self.backend}, but the folder is {self.root.name!r}.')
        self._resolved = self.root.resolve()  # once: it would cost a tenth of a patch each time
        self._files: dict[str, str] = {}
        self.sizes = self._scan_lmdb() if self.backend == 'lmdb' else self._scan_folder()
        if not self.sizes:
            raise UserError(f'{label}: {str(root)!r} holds no images.')

    def read(self, key: str) -> np.ndarray:
        """Decode one image, see :func:`decode`."""
        return decode(self.read_bytes(key), f'{self.label}: {self.path(key)}')

    def read_bytes(self, key: str) -> bytes:
        """The image's file as it is stored."""
        if self.backend == 'disk':
            return Path(self.root, self._files[key]).read_bytes()
        with open_lmdb(self._resolved).begin() as transaction:
            data = transaction.get(key.encode())
        if data is None:
            raise UserError(f'{self.label}: {key!r} is listed in meta_info.txt but absent from {self.root}.')
        return data

    def path(self, key: str) -> str:
        """Where the image of ``key`` lies, for messages and results."""
        return f'{self.root}{os.sep}{self._files.get(key, key)}'

    def _scan_lmdb(self) -> dict[str, tuple[int, int]]:
        for name in ('data.mdb', 'meta_info.txt'):
            if not (self.root / name).is_file():
                raise UserError(f'{self.label}: {str(self.root)!r} is not a complete LMDB: {name} is missing.')
        sizes = {}
        for number, line in enumerate((self.root / 'meta_info.txt').read_text('utf-8').splitlines(), 1):
            match = _META_LINE.fullmatch(line)
            if not match:
                raise UserError(
                    f'{self.label}: line {number} of {self.root / "meta_info.txt"} should read like '
                    f'"0001.png (480,320,3) 1", found {line!r}.'
                )
            key = match['name'].rpartition('.')[0] or match['name']
            sizes[key] = (int(match['height']), int(match['width']))
        return sizes

    def _scan_folder(self) -> dict[str, tuple[int, int]]:
        for path in walk_images(self.root):
            relative = path.relative_to(self.root)
            key = relative.with_suffix('').as_posix()
            if key in self._files:
                raise UserError(f'{self.label}: {self._files[key]!r} and {str(relative)!r} share one name.')
            self._files[key] = str(relative)
        return {key: image_size(self.root / name, str(self.root / name)) for key, name in sorted(self._files.items())}
