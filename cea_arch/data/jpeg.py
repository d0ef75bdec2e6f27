"""JPEG files, segment by segment: what describes the pixels is kept as it is stored."""

import struct
from collections.abc import Iterator

from cea_arch.errors import UserError

START = b'\xff\xd8'
XMP, EXIF, _ICC = b'http://ns.adobe.com/xap/1.0/\0', b'Exif\0\0', b'ICC_PROFILE\0'  # how such segments begin
_APP0, APP1, _APP2, _APP11, _APP13, _APP14, _APP15, _COMMENT, _SCAN = (
    0xE0,
    0xE1,
    0xE2,
    0xEB,
    0xED,
    0xEE,
    0xEF,
    0xFE,
    0xDA,
)
_MORE = b'\x5a\xa5\x3c\x81' * 64
_EXTENSION = b'http://ns.adobe.com/xmp/extension/\0'
TEXT = (_APP13, _COMMENT)  # IPTC, and comments
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Of each segment of a JPEG before its pixels: the kind, where its content begins and where it ends."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        if data[at + 1] == 0xFF:  # filling
            at += 1
            continue
        end = at + 2 + struct.unpack_from('>H', data, at + 2)[0]
        yield data[at + 1], at + 4, end
        at = end


def split(data: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """A JPEG without the segments that only describe it, save those that say what its pixels are, and its segments.

    Without the list of further pictures, which phones put behind the first, it is one picture.
    """
    kept, found, rest = [], [], 2
    for kind, at, end in segments(data):
        rest = end
        describes = _APP0 <= kind <= _APP15 or kind == _COMMENT
        if describes:
            found.append((kind, data[at:end]))
        if not describes or kind in (_APP0, _APP14) or (kind == _APP2 and data.startswith(_ICC, at)):
            kept.append(data[at - 4 : end])
    return START + b''.join(kept) + data[rest:], found


def described_by(found: list[tuple[int, bytes]], mark: bytes) -> bytes:
    """EXIF or XMP among the segments, by its ``mark``; empty if there is none."""
    of_mark = (content[len(mark) :] for kind, content in found if kind == APP1 and content.startswith(mark))
    return next(filter(None, of_mark), b'')


def dropped(found: list[tuple[int, bytes]]) -> list[str]:
    """What of the segments is not taken along, in words."""
    words = {
        'further pictures': any(kind == _APP2 and content.startswith(b'MPF\0') for kind, content in found),
        'extended XMP': any(kind == APP1 and content.startswith(_EXTENSION) for kind, content in found),
        'JUMBF (APP11)': any(kind == _APP11 for kind, _ in found),
    }
    return [word for word, is_there in words.items() if is_there]


def with_more(data: bytes) -> bytes | None:
    """A JPEG of one pass with more of what could be pixels before its end; ``None`` if it has several passes.

    A decoder fills up what a picture lacks, and says nothing; but it fills it up otherwise where there is more, which a
    whole picture has no use for.
    """
    found = list(segments(data))
    baseline = any(kind in _FRAMES[:2] for kind, _, _ in found)
    end = data.find(b'\xff\xd9', found[-1][2]) if found else -1
    return data[:end] + _MORE + data[end:] if baseline and end > 0 else None


def frame(data: bytes) -> tuple[int, int, int]:
    """Height, width and number of components as a JPEG's pixels say them; zeros where they say nothing."""
    for kind, at, end in segments(data):
        if kind in _FRAMES and end - at >= 6 and end <= len(data):
            if data[at] not in (8, 16):
                raise UserError(f'JPEG of {data[at]} bits a channel; expected 8.')
            return struct.unpack_from('>HHB', data, at + 1)
    return 0, 0, 0


def is_plain(data: bytes) -> bool:
    """Whether it is grey or RGB, and no EXIF could turn it: any decoder gives the same pixels then."""
    turned = any(kind == APP1 and data.startswith(EXIF, at) for kind, at, _ in segments(data))
    return not turned and frame(data)[2] in (1, 3)
