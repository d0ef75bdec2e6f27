"""EXIF as bytes: what is needed of it is read, and changed, in place, so that all else stays as it was written."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

ORIENTATION = 0x0112
TEXT, LONG, BYTES = 2, 4, 7  # of TIFF's types
# description, make, model, software, date and time, artist, copyright: what a TIFF's own tags say in words
DESCRIPTIVE_TAGS = (270, 271, 272, 305, 306, 315, 33432)
_INTEGERS = {1: 'B', 3: 'H', 4: 'I', 6: 'b', 8: 'h', 9: 'i'}  # TIFF's types of whole numbers, as struct's


@dataclass(frozen=True)
class Entry:
    """One entry of the first directory: its tag, type and count, and where its value field of four bytes begins."""

    tag: int
    type: int
    count: int
    at: int


def orientation(exif: bytes) -> int:
    """How the picture is stored, 1 to 8; 1 where EXIF, a TIFF structure, says nothing that makes sense."""
    for entry in _entries(exif):
        if entry.tag == ORIENTATION and entry.type in _INTEGERS and entry.count == 1:
            value = struct.unpack_from(_order(exif) + _INTEGERS[entry.type], exif, entry.at)[0]
            return value if 1 <= value <= 8 else 1
    return 1


def upright_exif(exif: bytes) -> bytes:
    """The same EXIF for a picture that has been turned upright, without the preview, which shows another picture."""
    out = bytearray(exif)
    end = None
    for entry in _entries(exif):
        end = entry.at + 4
        if entry.tag == ORIENTATION and entry.type in _INTEGERS and entry.count == 1:
            struct.pack_into(_order(exif) + _INTEGERS[entry.type], out, entry.at, 1)
    if end is not None and end + 4 <= len(out):
        out[end : end + 4] = bytes(4)  # where the preview's directory would be
    return bytes(out)


def descriptive(exif: bytes) -> dict[int, bytes]:
    """The texts of ``DESCRIPTIVE_TAGS`` by tag, as bytes without the zero at their end."""
    found = {}
    for entry in _entries(exif):
        if entry.tag in DESCRIPTIVE_TAGS and entry.type == 2:
            start = entry.at if entry.count <= 4 else struct.unpack_from(f'{_order(exif)}I', exif, entry.at)[0]
            found[entry.tag] = exif[start : start + entry.count].rstrip(b'\0')
    return {tag: text for tag, text in found.items() if text}


def count_of(exif: bytes) -> int:
    """How many entries say something, besides orientation."""
    return sum(entry.tag != ORIENTATION for entry in _entries(exif))


def build_exif(texts: dict[int, bytes]) -> bytes | None:
    """EXIF that holds texts by tag, see :func:`descriptive`; ``None`` if there are none."""
    return structure({tag: (TEXT, text + b'\0') for tag, text in texts.items()}) if texts else None


def structure(entries: dict[int, tuple[int, bytes]]) -> bytes:
    """A little-endian TIFF structure of one directory, of types (``TEXT``, ``LONG``, ``BYTES``) and contents by tag."""
    at = 8 + 2 + 12 * len(entries) + 4
    directory, values = struct.pack('<H', len(entries)), b''
    for tag, (kind, content) in sorted(entries.items()):
        inline = len(content) <= 4
        place = content.ljust(4, b'\0') if inline else struct.pack('<I', at + len(values))
        directory += struct.pack('<HHI', tag, kind, len(content) // (4 if kind == LONG else 1)) + place
        values += b'' if inline else content + b'\0' * (len(content) % 2)
    return b'II*\0' + struct.pack('<I', 8) + directory + bytes(4) + values


def _order(exif: bytes) -> str:
    return '<' if exif[:2] == b'II' else '>'


def _entries(exif: bytes) -> Iterator[Entry]:
    """Entries of the first directory, as far as they lie within the bytes."""
    if exif[:4] not in (b'II*\0', b'MM\0*') or len(exif) < 10:
        return
    order = _order(exif)
    start = struct.unpack_from(f'{order}I', exif, 4)[0]
    if start + 2 > len(exif):
        return
    for number in range(struct.unpack_from(f'{order}H', exif, start)[0]):
        at = start + 2 + 12 * number
        if at + 12 > len(exif):
            return
        yield Entry(*struct.unpack_from(f'{order}HHI', exif, at), at + 8)
