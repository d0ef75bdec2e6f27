"""Picture files in and out, with what belongs to them: depth, alpha, orientation, colour profile, EXIF."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from cea_arch.errors import UserError
from cea_arch.files import refuse_to_replace, written_beside

FORMATS = ('PNG', 'JPEG', 'WEBP', 'TIFF', 'BMP')
FORMAT_OF = {
    '.png': 'PNG',
    '.jpg': 'JPEG',
    '.jpeg': 'JPEG',
    '.webp': 'WEBP',
    '.tif': 'TIFF',
    '.tiff': 'TIFF',
    '.bmp': 'BMP',
}
SUFFIXES = tuple(FORMAT_OF)
ORIENTATION = 0x0112
# description, make, model, software, date and time, artist, copyright
DESCRIPTIVE_TAGS = (270, 271, 272, 305, 306, 315, 33432)
# 8-bit encoders' settings; lossy ones near the point where more bytes show nothing
SETTINGS: dict[str, dict[str, Any]] = {
    'JPEG': {'quality': 95, 'subsampling': 0},
    'WEBP': {'quality': 95, 'method': 4, 'exact': True},
    'TIFF': {'compression': 'tiff_adobe_deflate'},
}


@dataclass
class Picture:
    """A decoded picture, upright.

    Attributes:
        pixels: ``(H, W)`` grey, ``(H, W, 2)`` grey and alpha, ``(H, W, 3)`` RGB, ``(H, W, 4)`` RGB and alpha; uint8 or
            uint16.
        format: One of ``FORMATS``.
        icc: Colour profile of ``pixels``.
        exif: EXIF without orientation.
        dpi: Dots per inch, horizontal and vertical.
    """

    pixels: np.ndarray
    format: str
    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    dpi: tuple[float, float] | None = None


def read_picture(path: Path) -> Picture:
    """Read a picture file.

    Raises:
        UserError: Not a picture of a known format, damaged, animated, too large, or of a depth other than 8 or 16 bit.
    """
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _decode(image, data)
    except Image.DecompressionBombError as error:
        raise UserError(f'{path}: refused: {error}') from error
    except UnidentifiedImageError as error:
        what = 'the file is empty' if not data else f'not a picture of {", ".join(SUFFIXES)}'
        raise UserError(f'{path}: {what}.') from error
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f'{path}: damaged: {error}') from error


def write_picture(path: Path, picture: Picture, overwrite: bool = False) -> None:
    """Write a picture, beside and renamed.

    Raises:
        UserError: The file exists and ``overwrite`` is not set.
        OSError: It cannot be written.
    """
    refuse_to_replace(path, overwrite)
    data = _encode(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as aside:
        aside.write_bytes(data)


def as_format(picture: Picture, format: str) -> Picture:
    """A picture in another of ``FORMATS``: 8 bit where it has no more.

    Raises:
        UserError: The picture has alpha, and the format has none.
    """
    pixels = picture.pixels
    if format in ('JPEG', 'BMP') and pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        raise UserError(f'it has transparency, which {format} cannot hold; PNG, WebP and TIFF can.')
    if format not in ('PNG', 'TIFF') and pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    return replace(picture, pixels=pixels, format=format)


def as_rgb8(pixels: np.ndarray) -> np.ndarray:
    """Any :attr:`Picture.pixels` as RGB uint8 ``(H, W, 3)``, without alpha."""
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., :3] if pixels.shape[2] > 2 else np.repeat(pixels[..., :1], 3, axis=2)


def _decode(image: Image.Image, data: bytes) -> Picture:
    # MPO: a JPEG with more pictures behind it, as phones write
    if getattr(image, 'n_frames', 1) > 1 and image.format != 'MPO':
        raise UserError(f'it has {image.n_frames} frames; expected a still picture.')
    bits = image.tag_v2.get(258, (8,))[0] if image.format == 'TIFF' else 16 if _is_png16(data) else 8
    exif = image.getexif()
    # both decoders turn TIFFs by themselves
    orientation = exif.get(ORIENTATION, 1) if image.format != 'TIFF' else 1
    icc = image.info.get('icc_profile')
    image.load()  # all of it, also where OpenCV decodes again: OpenCV accepts truncated files
    if bits == 16:
        pixels = upright(_decode16(image, data), orientation)
    elif image.mode in ('F', 'I') or bits > 16:
        raise UserError(f'expected 8 or 16 bits a channel, found mode {image.mode} of {bits} bits.')
    else:
        if image.mode == 'CMYK' and icc:
            image = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile('sRGB'), outputMode='RGB')
            icc = None
        pixels = upright(np.array(_plain(image)), orientation)
    kept = Image.Exif()
    kept.load(exif.tobytes())
    kept.pop(ORIENTATION, None)
    return Picture(
        pixels=pixels,
        format='JPEG' if image.format == 'MPO' else image.format or 'JPEG',
        icc=icc,
        exif=kept,
        dpi=tuple(map(float, image.info['dpi'])) if 'dpi' in image.info else None,  # of Pillow's own rationals
    )


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels stored in one of EXIF's eight orientations upright; other numbers mean nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _plain(image: Image.Image) -> Image.Image:
    """An 8-bit image as grey or RGB, with alpha if it has any kind of transparency."""
    grey = image.mode in ('1', 'L', 'LA', 'La')
    if image.has_transparency_data:
        return image.convert('LA' if grey else 'RGBA')
    return image.convert('L' if grey else 'RGB')


def _is_png16(data: bytes) -> bool:
    return data[:8] == b'\x89PNG\r\n\x1a\n' and data[24] == 16


def _decode16(image: Image.Image, data: bytes) -> np.ndarray:
    """Pixels of a 16-bit PNG or TIFF; Pillow would reduce them to 8 bits."""
    if image.mode == 'CMYK':
        raise UserError('16-bit CMYK is not supported.')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise UserError('the 16-bit pixels cannot be decoded.')
    if pixels.ndim == 3:
        order = [2, 1, 0, 3][: pixels.shape[2]]
        grey = image.format == 'PNG' and data[25] in (0, 4)  # colour types grey, grey and alpha
        pixels = pixels[..., [0, 3] if grey else order]
    return pixels


def _encode(picture: Picture) -> bytes:
    if picture.pixels.dtype == np.uint16:
        return _encode_png16(picture) if picture.format == 'PNG' else _encode_tiff16(picture)
    options = dict(SETTINGS.get(picture.format, {}))
    # a TIFF's own tags are its EXIF; those that describe pixels are the encoder's
    tags = {tag: value for tag, value in picture.exif.items() if picture.format != 'TIFF' or tag in DESCRIPTIVE_TAGS}
    if picture.format == 'TIFF':
        options['tiffinfo'] = tags
    elif picture.format != 'BMP' and tags:
        options['exif'] = picture.exif.tobytes()
    if picture.icc and picture.format != 'BMP':
        options['icc_profile'] = picture.icc
    if picture.dpi:
        options['dpi'] = picture.dpi
    stream = io.BytesIO()
    Image.fromarray(picture.pixels).save(stream, picture.format, **options)
    return stream.getvalue()


def _encode_png16(picture: Picture) -> bytes:
    pixels = picture.pixels
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # OpenCV writes no grey with alpha
        return _png([_header(pixels, colour_type=4), *_metadata(picture), (b'IDAT', _scanlines(pixels))])
    bgr = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    data = cv2.imencode('.png', bgr)[1].tobytes()
    after_header = 8 + 25  # signature and IHDR
    return data[:after_header] + b''.join(_chunk(*c) for c in _metadata(picture)) + data[after_header:]


def _header(pixels: np.ndarray, colour_type: int) -> tuple[bytes, bytes]:
    height, width = pixels.shape[:2]
    return b'IHDR', struct.pack('>IIBBBBB', width, height, 16, colour_type, 0, 0, 0)


def _scanlines(pixels: np.ndarray) -> bytes:
    rows = pixels.astype('>u2').reshape(len(pixels), -1).view(np.uint8)
    return zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # a zero before each row: no filter


def _metadata(picture: Picture) -> list[tuple[bytes, bytes]]:
    chunks = [(b'iCCP', b'ICC\0\0' + zlib.compress(picture.icc))] if picture.icc else []
    if picture.dpi:
        chunks.append((b'pHYs', struct.pack('>IIB', *(round(dots / 0.0254) for dots in picture.dpi), 1)))
    exif = picture.exif.tobytes().removeprefix(b'Exif\0\0') if len(picture.exif) else b''
    return chunks + [(b'eXIf', exif)] * bool(exif)


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b'\x89PNG\r\n\x1a\n' + b''.join(_chunk(*c) for c in [*chunks, (b'IEND', b'')])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def _encode_tiff16(picture: Picture) -> bytes:
    import tifffile

    pixels = picture.pixels
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    tags = [(tag, 's', 0, str(picture.exif[tag]), True) for tag in DESCRIPTIVE_TAGS if tag in picture.exif]
    stream = io.BytesIO()
    tifffile.imwrite(
        stream,
        pixels,
        photometric='rgb' if channels > 2 else 'minisblack',
        planarconfig='contig' if channels > 1 else None,
        extrasamples=['unassalpha'] * (channels in (2, 4)),
        compression='zlib',
        metadata=None,
        software=False,
        iccprofile=picture.icc,
        resolution=picture.dpi,
        resolutionunit='INCH' if picture.dpi else None,
        extratags=tags,
    )
    return stream.getvalue()
