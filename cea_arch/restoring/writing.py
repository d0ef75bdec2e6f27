"""Pictures out: in each format with what belongs to them."""

import io
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from cea_arch.data import jpeg, png
from cea_arch.data.exif import count_of, descriptive
from cea_arch.data.pictures import Picture, as_rgb
from cea_arch.errors import Notice, UserError
from cea_arch.files import refuse_to_replace, written_beside

# 8-bit encoders' settings; lossy ones near the point where more bytes show nothing
SETTINGS: dict[str, dict[str, Any]] = {
    'JPEG': {'quality': 95, 'subsampling': 0},
    'WEBP': {'quality': 95, 'method': 4, 'exact': True},
}
_HOLDS = {'PNG': ('icc', 'exif', 'xmp', 'dpi'), 'JPEG': ('icc', 'exif', 'xmp', 'dpi'), 'WEBP': ('icc', 'exif', 'xmp')}
_HOLDS |= {'TIFF': ('icc', 'exif', 'xmp', 'dpi'), 'BMP': ('dpi',)}
_WORDS = {'icc': 'colour profile', 'exif': 'EXIF', 'xmp': 'XMP', 'dpi': 'resolution'}
_MOST_SEGMENT = 65533  # bytes in a segment of a JPEG
_XMP_TAG = 700


def write_picture(path: Path, picture: Picture, overwrite: bool = False) -> None:
    """Write a picture, beside and renamed; what its format cannot hold is said in a warning.

    Raises:
        UserError: The file exists and ``overwrite`` is not set.
        OSError: It cannot be written.
    """
    refuse_to_replace(path, overwrite)
    picture, lost = _without_what_it_cannot_hold(picture)
    data = _encode(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as aside:
        aside.write_bytes(data)
    if lost:
        warnings.warn(f'{path}: without {", ".join(lost)}, which {picture.format} cannot hold.', Notice, stacklevel=2)


def as_format(picture: Picture, format: str) -> Picture:
    """A picture in another format: 8 bit where it has no more.

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
    return as_rgb(np.round(pixels / 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels)


def _without_what_it_cannot_hold(picture: Picture) -> tuple[Picture, list[str]]:
    """The picture as its format can hold it, and the words for what that leaves out."""
    lost = [_WORDS[name] for name in _WORDS if getattr(picture, name) and name not in _HOLDS[picture.format]]
    kept = [(kind, content) for kind, content in picture.own if len(kind) == {'PNG': 4, 'JPEG': 1}.get(picture.format)]
    if len(kept) < len(picture.own):
        lost += dict.fromkeys(kind.decode() if len(kind) == 4 else 'comment or IPTC' for kind, _ in picture.own)
    picture = replace(picture, own=kept, **{name: None for name in _WORDS if name not in _HOLDS[picture.format]})
    if picture.format == 'TIFF' and picture.exif and len(descriptive(picture.exif)) < count_of(picture.exif):
        lost.append('EXIF but for its texts')
    if picture.format == 'BMP' and picture.pixels.ndim == 3 and picture.pixels.shape[2] in (2, 4):
        picture = replace(picture, pixels=picture.pixels[..., :-1].squeeze())
        lost.append('transparency')
    for name in ('exif', 'xmp') * (picture.format == 'JPEG'):
        if len(getattr(picture, name) or b'') > _MOST_SEGMENT - 40:
            lost.append(f'{_WORDS[name]} of more than 65,000 bytes')
            picture = replace(picture, **{name: None})
    return picture, lost


def _encode(picture: Picture) -> bytes:
    if picture.format == 'TIFF':
        return _encode_tiff(picture)
    if picture.format == 'PNG':
        return _encode_png(picture)
    options = dict(SETTINGS.get(picture.format, {}))
    if picture.format == 'WEBP' and picture.lossless:
        options |= {'lossless': True, 'quality': 80}
    if picture.exif:
        options['exif'] = jpeg.EXIF + picture.exif
    if picture.icc:
        options['icc_profile'] = picture.icc
    if picture.dpi:
        options['dpi'] = picture.dpi
    if picture.format == 'WEBP' and picture.xmp:
        options['xmp'] = picture.xmp
    if picture.format == 'JPEG':
        xmp = [(b'\xe1', jpeg.XMP + picture.xmp)] if picture.xmp else []
        options['extra'] = b''.join(
            b'\xff' + kind + struct.pack('>H', len(content) + 2) + content for kind, content in xmp + picture.own
        )
    stream = io.BytesIO()
    Image.fromarray(picture.pixels).save(stream, picture.format, **options)
    return stream.getvalue()


def _encode_png(picture: Picture) -> bytes:
    described = [(kind, content) for kind, content in picture.own if kind in png.COLOUR]
    if picture.icc:
        described.append((b'iCCP', b'ICC\0\0' + zlib.compress(picture.icc)))
    if picture.dpi:
        described.append((b'pHYs', struct.pack('>IIB', *(round(dots / 0.0254) for dots in picture.dpi), 1)))
    if picture.exif:
        described.append((b'eXIf', picture.exif))
    if picture.xmp:
        described.append(png.xmp_chunk(picture.xmp))
    described += [(kind, content) for kind, content in picture.own if kind not in png.COLOUR]
    header, *pixels = _png_pixels(picture.pixels)
    return png.write_chunks([header, *described, *pixels])


def _png_pixels(pixels: np.ndarray) -> list[png.Chunk]:
    if pixels.dtype == np.uint8:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, 'PNG')
        return png.chunks(stream.getvalue(), [])
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # OpenCV writes no grey with alpha
        height, width = pixels.shape[:2]
        rows = pixels.astype('>u2').reshape(height, -1).view(np.uint8)
        lines = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # a zero before each row: no filter
        header = struct.pack('>IIBBBBB', width, height, 16, 4, 0, 0, 0)
        return [(b'IHDR', header), (b'IDAT', zlib.compress(lines)), (b'IEND', b'')]
    bgr = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return png.chunks(cv2.imencode('.png', bgr)[1].tobytes(), [])


def _encode_tiff(picture: Picture) -> bytes:
    from tifffile import imwrite

    pixels = picture.pixels
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    tags = [(tag, 's', 0, text, True) for tag, text in descriptive(picture.exif or b'').items()]
    if picture.xmp:
        tags.append((_XMP_TAG, 'B', len(picture.xmp), picture.xmp, True))
    stream = io.BytesIO()
    imwrite(
        stream,
        pixels,
        photometric='rgb' if channels > 2 else 'minisblack',
        planarconfig='contig' if channels > 1 else None,
        extrasamples=['unassalpha'] * (channels in (2, 4)),
        compression='zlib',
        predictor=True,
        metadata=None,
        software=False,
        iccprofile=picture.icc,
        resolution=picture.dpi,
        resolutionunit='INCH' if picture.dpi else None,
        extratags=tags,
    )
    return stream.getvalue()
