"""PNG files, chunk by chunk: what describes the pixels is kept as it is stored, transparency is read right."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from cea_arch.errors import UserError

SIGNATURE = b'\x89PNG\r\n\x1a\n'
COLOUR = (b'cHRM', b'gAMA', b'sRGB', b'cICP', b'mDCV', b'cLLI')  # beside iCCP
TEXT = (b'tEXt', b'zTXt', b'iTXt')
_DECODED = (b'IHDR', b'PLTE', b'IDAT', b'IEND')
_TRANSFER = {16: 'PQ', 18: 'HLG', 8: 'linear'}  # of cICP, those that are far from sRGB's
_MOST = 2**25  # bytes of a profile or text
_MOST_SHRUNK = 1032  # by which deflate can shrink anything, at most
_XMP = b'XML:com.adobe.xmp\0'

Chunk = tuple[bytes, bytes]


def chunks(data: bytes, notes: list[str]) -> list[Chunk]:
    """Kind and content of each chunk up to the end; those that only describe, and are damaged, are left out and noted.

    Raises:
        UserError: A chunk that the pixels need is damaged, or the end is missing.
    """
    found = []
    for kind, at, length in headers(io.BytesIO(data)):
        if at + length + 4 > len(data):
            break
        content = data[at : at + length]
        if kind == b'cICP' and length != 4:
            notes.append('its cICP chunk is damaged, and dropped')
        elif struct.pack('>I', zlib.crc32(kind + content)) == data[at + length : at + length + 4]:
            if not found and kind != b'IHDR':
                raise UserError(f'not a PNG as the standard has it: its first chunk is {name(kind)}.')
            found.append((kind, content))
        elif kind[0] & 32 and kind != b'tRNS':  # a small first letter: not needed to show the pixels
            notes.append(f'its {name(kind)} chunk is damaged, and dropped')
        else:
            raise UserError(f'damaged: its {name(kind)} chunk has a wrong checksum.')
        if kind == b'IEND':
            return found
    raise UserError('damaged: image file is truncated.')


def headers(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk, and where its content lies: start and length."""
    at = len(SIGNATURE)
    while True:
        file.seek(at)
        header = file.read(8)
        if len(header) < 8:
            return
        length, kind = struct.unpack('>I4s', header)
        yield kind, at + 8, length
        at += 12 + length


def is_plain(data: bytes) -> bool:
    """Whether a PNG has all its chunks, and none that could change its pixels: any decoder gives the same ones then."""
    stored = 0
    for kind, at, length in headers(io.BytesIO(data)):
        if kind in (b'eXIf', b'tRNS', b'acTL'):
            return False
        if kind == b'IEND':
            return at + length + 4 <= len(data) and _is_possible(data[16:29], stored)
        stored += length if kind == b'IDAT' else 0
    return False


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Height and width of a PNG file, as stored."""
    file.seek(len(SIGNATURE))
    header = file.read(16)
    if header[4:8] != b'IHDR' or len(header) < 16:
        raise UserError('damaged: it has no header.')
    width, height = struct.unpack('>II', header[8:])
    if not (width and height):
        raise UserError(f'damaged: {width} x {height} pixels.')
    return height, width


def exif_of(file: BinaryIO) -> bytes:
    """EXIF of a PNG file, empty where it has none; reads no pixels."""
    for kind, at, length in headers(file):
        if kind == b'eXIf':
            file.seek(at)
            content, checksum = file.read(length), file.read(4)
            if struct.pack('>I', zlib.crc32(kind + content)) == checksum:
                return content
    return b''


def decode_pixels(found: list[Chunk]) -> np.ndarray:
    """Pixels ``(H, W)`` or ``(H, W, 2 to 4)``, uint8 or uint16, of a PNG's chunks.

    Raises:
        UserError: An animation, or pixels that are damaged.
    """
    kinds = [kind for kind, _ in found]
    if b'acTL' in kinds:
        raise UserError('it is an animation; expected a still picture.')
    width, height, bits, colour_type = struct.unpack('>IIBB', found[0][1][:10])
    stored = sum(len(content) for kind, content in found if kind == b'IDAT')
    if not _is_possible(found[0][1], stored):
        raise UserError(f'damaged: {stored} bytes of pixels cannot be {width} x {height} of them.')
    if colour_type == 3 and b'tRNS' in kinds:
        plain = write_chunks(c for c in found if c[0] in (*_DECODED, b'tRNS'))
    else:
        plain = write_chunks(c for c in found if c[0] in _DECODED)
    if colour_type == 3 and b'PLTE' not in kinds:
        raise UserError('damaged: it has no palette (PLTE).')
    with Image.open(io.BytesIO(plain), formats=['PNG']) as image:
        image.load()  # all of it, also where OpenCV decodes again: OpenCV accepts truncated files
        if colour_type == 3:
            _check_palette(dict(found).get(b'PLTE', b''), np.array(image))
            pixels = np.array(image.convert('RGBA' if image.has_transparency_data else 'RGB'))
        elif bits < 16:
            pixels = np.array(image.convert('L') if image.mode == '1' else image)
        else:
            pixels = _decode16(plain, colour_type)
    keys = dict(found).get(b'tRNS')
    if keys is None or colour_type not in (0, 2):
        return pixels
    alpha = _opaque(pixels, keys, bits, colour_type)
    return np.concatenate([pixels.reshape(height, width, -1), alpha[..., None]], axis=2)


def first_of(found: list[Chunk], kind: bytes) -> bytes:
    """The content of the first chunk of a kind; empty where there is none."""
    return next((content for other, content in found if other == kind), b'')


def dropped(found: list[Chunk]) -> list[str]:
    """Names of chunks that describe the picture, and are not taken along."""
    known = (*_DECODED, *COLOUR, *TEXT, b'tRNS', b'iCCP', b'pHYs', b'eXIf')
    return [name(kind) for kind in dict.fromkeys(kind for kind, _ in found) if kind not in known]


def profile_of(found: list[Chunk], notes: list[str]) -> bytes | None:
    """The colour profile, if there is one that can be read."""
    content = dict(found).get(b'iCCP')
    if content is None:
        return None
    profile = _inflated(content[content.find(b'\0') + 2 :])
    if profile is None:
        notes.append('its iCCP chunk holds no colour profile, and is dropped')
    return profile


def xmp_of(found: list[Chunk]) -> bytes | None:
    """The XMP packet, if there is one."""
    text = next((content for kind, content in found if is_xmp(kind, content)), None)
    if text is None:
        return None
    compressed, rest = text[len(_XMP) :][:1] == b'\1', text[len(_XMP) + 2 :].split(b'\0', 2)[-1]
    return _inflated(rest) if compressed else rest


def is_xmp(kind: bytes, content: bytes) -> bool:
    """Whether a chunk holds XMP."""
    return kind == b'iTXt' and content.startswith(_XMP)


def xmp_chunk(xmp: bytes) -> Chunk:
    """The chunk that holds XMP."""
    return b'iTXt', _XMP + bytes(4) + xmp


def resolution_of(found: list[Chunk]) -> tuple[float, float] | None:
    """Dots per inch, if they are said."""
    content = dict(found).get(b'pHYs', b'')
    if len(content) != 9 or content[8] != 1:
        return None
    return tuple(dots * 0.0254 for dots in struct.unpack('>II', content[:8]))


def far_from_srgb(found: list[Chunk]) -> str | None:
    """What these pixels are if their values stand for light in a way far from sRGB's."""
    content = dict(found)
    transfer = _TRANSFER.get(content.get(b'cICP', b'\0\0')[1])
    if transfer is None and b'cICP' not in content and len(content.get(b'gAMA', b'')) == 4:
        gamma = struct.unpack('>I', content[b'gAMA'])[0] / 100_000
        transfer = f'coded with gamma {gamma:g}' if gamma and not 0.35 < gamma < 0.6 else None
    return transfer


def write_chunks(written: 'Iterator[Chunk] | list[Chunk]') -> bytes:
    """A PNG file of chunks."""
    return SIGNATURE + b''.join(
        struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in written
    )


def _is_possible(header: bytes, stored: int) -> bool:
    """Whether so many bytes can hold the pixels that the header promises; 100 of them could promise gigabytes."""
    width, height, bits = struct.unpack('>IIB', header[:9])
    return height * -(-width * bits // 8) <= _MOST_SHRUNK * stored


def _inflated(content: bytes) -> bytes | None:
    """Decompressed bytes, none if they are damaged or far too many."""
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(content, _MOST)
    except zlib.error:
        return None
    return text if reader.eof else None


def name(kind: bytes) -> str:
    """A chunk's name for messages."""
    return kind.decode('latin-1')


def _check_palette(palette: bytes, indices: np.ndarray) -> None:
    if not palette or len(palette) % 3 or indices.max() >= len(palette) // 3:
        raise UserError(f'damaged: its palette (PLTE) of {len(palette)} bytes lacks colours that it uses.')


def _decode16(data: bytes, colour_type: int) -> np.ndarray:
    """Pixels of 16 bits; Pillow would reduce them to 8."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise UserError('the 16-bit pixels cannot be decoded.')
    if pixels.ndim == 2:
        return pixels
    return pixels[..., [0, 3] if colour_type in (0, 4) else [2, 1, 0, 3][: pixels.shape[2]]]


def _opaque(pixels: np.ndarray, keys: bytes, bits: int, colour_type: int) -> np.ndarray:
    """Alpha of pixels ``(H, W)`` or ``(H, W, 3)`` of which one value, or colour, is transparent."""
    count = 3 if colour_type == 2 else 1
    if len(keys) < 2 * count:
        raise UserError('damaged: its tRNS chunk is too short.')
    key = np.array(struct.unpack(f'>{count}H', keys[: 2 * count]))
    if bits < 8:
        key = key * (255 // (2**bits - 1))  # as the pixels are spread
    peak = np.iinfo(pixels.dtype).max
    transparent = (pixels.reshape(*pixels.shape[:2], count) == key).all(axis=2)
    return np.where(transparent, 0, peak).astype(pixels.dtype)
