"""Picture files, decoded with what belongs to them: depth, alpha, orientation, colour profile, metadata. One reader for
restoring, training and scoring."""

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from cea_arch.data import jpeg, png
from cea_arch.data.exif import build_exif, orientation, upright_exif
from cea_arch.data.tiff import Tiff
from cea_arch.errors import Notice, UserError

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
TIFF_STARTS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation\s*(?:=\s*["\']|>)\s*)[2-8]')


@dataclass
class Picture:
    """A decoded picture, upright.

    Attributes:
        pixels: ``(H, W)`` grey, ``(H, W, 2)`` grey and alpha, ``(H, W, 3)`` RGB, ``(H, W, 4)`` RGB and alpha; uint8 or
            uint16.
        format: One of PNG, JPEG, WEBP, TIFF, BMP.
        icc: Colour profile of ``pixels``.
        exif: EXIF as it is stored, a TIFF structure; its orientation is 1.
        xmp: XMP as it is stored; its orientation is 1.
        dpi: Dots per inch, horizontal and vertical.
        own: What else this format alone can hold: a PNG's chunks of colour and text, a JPEG's segments of text.
        notes: What of the file could not be taken along, and what its pixels are if not sRGB.
        lossless: Whether a WebP is.
    """

    pixels: np.ndarray
    format: str
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    own: list[tuple[bytes, bytes]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lossless: bool = False


def read_picture(path: Path) -> Picture:
    """Read a picture file; what of it cannot be taken along is said in a warning.

    Raises:
        UserError: Not a picture of a known format, damaged, animated, too large, or of a depth other than 8 or 16 bit.
    """
    with _without_decoders_words():
        picture = decode_picture(path.read_bytes(), str(path))
    for note in picture.notes:
        warnings.warn(f'{path}: {note}.', Notice, stacklevel=2)
    return picture


def decode_picture(data: bytes, where: str) -> Picture:
    """Decode the bytes of a picture file.

    Raises:
        UserError: As :func:`read_picture`; names ``where`` they came from.
    """
    return _guarded(lambda: _decoder(data)(data), where)


def picture_size(file: Path | bytes, where: str) -> tuple[int, int]:
    """Height and width from the header of a picture file, as it is when upright.

    Raises:
        UserError: It is not a picture; names ``where`` it came from.
    """

    def read() -> tuple[int, int]:
        with io.BytesIO(file) if isinstance(file, bytes) else file.open('rb') as stream:
            start = stream.read(8)
            if start[:4] in TIFF_STARTS:
                return Tiff(file).size
            if start == png.SIGNATURE:
                (height, width), exif = png.size_of(stream), png.exif_of(stream)
            else:
                with Image.open(stream, formats=tuple(set(FORMAT_OF.values()))) as image:
                    (width, height), exif = image.size, image.info.get('exif', b'')
            turned = orientation(exif.removeprefix(jpeg.EXIF)) > 4
            return (width, height) if turned else (height, width)

    with _without_decoders_words():
        return _guarded(read, where)


def is_plain(data: bytes) -> bool:
    """Whether these are a PNG or JPEG, grey or RGB, that no EXIF could turn: any decoder gives the same pixels then."""
    if data[:8] == png.SIGNATURE:
        return png.is_plain(data)
    return data[:2] == jpeg.START and jpeg.is_plain(data)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels stored in one of EXIF's eight orientations upright; other numbers mean nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Any :attr:`Picture.pixels` as RGB ``(H, W, 3)``, without alpha."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., :3] if pixels.shape[2] > 2 else np.repeat(pixels[..., :1], 3, axis=2)


@contextmanager
def _without_decoders_words() -> Iterator[None]:
    """No warnings of decoders. Not in :func:`decode_picture`, which threads call: they share one filter."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _guarded(read: Callable, where: str) -> object:
    """What ``read`` returns; whatever a decoder raises about a file becomes a UserError that names it."""
    try:
        return read()
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    except Image.DecompressionBombError as error:
        raise UserError(f'{where}: refused: {error}') from error
    except UnidentifiedImageError as error:
        raise UserError(f'{where}: not a picture of {", ".join(SUFFIXES)}.') from error
    except MemoryError as error:
        raise UserError(f'{where}: too large for the memory at hand, or damaged.') from error
    except OSError as error:
        if error.errno:  # of the file system
            raise
        raise UserError(f'{where}: damaged: {error}') from error
    except Exception as error:  # thousands of damaged files raise some forty kinds
        raise UserError(f'{where}: damaged: {type(error).__name__}: {error}') from error


def _decoder(data: bytes) -> Callable[[bytes], Picture]:
    if not data:
        raise UserError('the file is empty.')
    if data[:8] == png.SIGNATURE:
        return _decode_png
    if data[:4] in TIFF_STARTS:
        return _decode_tiff
    return _decode_jpeg if data[:2] == jpeg.START else _decode_other


def _decode_png(data: bytes) -> Picture:
    notes: list[str] = []
    found = png.chunks(data, notes)
    _check_size(*struct.unpack('>II', found[0][1][:8]))
    exif = png.first_of(found, b'eXIf').removeprefix(jpeg.EXIF)
    xmp = png.xmp_of(found)
    notes += [f'its {kind} chunk is dropped' for kind in png.dropped(found)]
    far = png.far_from_srgb(found)
    if far:
        notes.append(f'its values are {far}; they are restored as if they were sRGB, and stay tagged so')
    return Picture(
        pixels=upright(png.decode_pixels(found), orientation(exif)),
        format='PNG',
        icc=png.profile_of(found, notes),
        exif=upright_exif(exif) or None,
        xmp=_upright_xmp(xmp, orientation(exif) > 1, notes) if xmp else None,
        dpi=png.resolution_of(found),
        own=[(kind, c) for kind, c in found if kind in (*png.COLOUR, *png.TEXT) and not png.is_xmp(kind, c)],
        notes=notes,
    )


def _decode_tiff(data: bytes) -> Picture:
    tiff = Tiff(data)
    _check_size(*tiff.size)
    notes = tiff.notes
    pixels, icc, exif, dpi = tiff.pixels(), tiff.icc, build_exif(tiff.texts), tiff.dpi
    if tiff.is_cmyk:
        if pixels.shape[2] > 4:
            notes.append('its transparency beside CMYK is dropped')
        pixels, icc = _cmyk_as_rgb(Image.fromarray(pixels[..., :4], 'CMYK'), icc, notes), None
    xmp = _upright_xmp(tiff.xmp, tiff.orientation > 1, notes) if tiff.xmp else None
    notes += [f'its {name} is dropped' for name in tiff.others]
    return Picture(upright(pixels, tiff.orientation), 'TIFF', icc, exif, xmp, dpi, notes=notes)


def _decode_jpeg(data: bytes) -> Picture:
    notes: list[str] = []
    plain, segments = jpeg.split(data)
    exif, xmp = jpeg.described_by(segments, jpeg.EXIF), jpeg.described_by(segments, jpeg.XMP)
    notes += [f'its {word} are left' for word in jpeg.dropped(segments)]
    jpeg.frame(plain)  # says which kinds are not read
    with Image.open(io.BytesIO(plain), formats=['JPEG']) as image:
        icc = image.info.get('icc_profile')
        image.load()
        more = jpeg.with_more(plain)
        if more is not None and not np.array_equal(np.asarray(image), _stored_pixels(more)):
            raise UserError('damaged: pixels are missing at its end.')
        pixels = _cmyk_as_rgb(image, icc, notes) if image.mode == 'CMYK' else np.array(_plain(image))
        return Picture(
            pixels=upright(pixels, orientation(exif)),
            format='JPEG',
            icc=None if image.mode == 'CMYK' else icc,
            exif=upright_exif(exif) or None,
            xmp=_upright_xmp(xmp, orientation(exif) > 1, notes) if xmp else None,
            dpi=_dpi(image),
            own=[(bytes([kind]), content) for kind, content in segments if kind in jpeg.TEXT],
            notes=notes,
        )


def _decode_other(data: bytes) -> Picture:
    """WebP and BMP."""
    notes: list[str] = []
    with Image.open(io.BytesIO(data), formats=['WEBP', 'BMP']) as image:
        if getattr(image, 'n_frames', 1) > 1:
            raise UserError(f'it has {image.n_frames} frames; expected a still picture.')
        exif = image.info.get('exif', b'').removeprefix(jpeg.EXIF)
        xmp = image.info.get('xmp')
        image.load()
        return Picture(
            pixels=upright(np.array(_plain(image)), orientation(exif)),
            format=image.format or 'BMP',
            icc=image.info.get('icc_profile'),
            exif=upright_exif(exif) or None,
            xmp=_upright_xmp(xmp, orientation(exif) > 1, notes) if xmp else None,
            dpi=_dpi(image),
            notes=notes,
            lossless=b'VP8L' in data[12:] and image.format == 'WEBP',
        )


def _stored_pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=['JPEG']) as image:
        return np.asarray(image)


def _plain(image: Image.Image) -> Image.Image:
    """An 8-bit image as grey or RGB, with alpha if it has any kind of transparency."""
    if image.mode in ('F', 'I') or image.mode.startswith('I;'):
        raise UserError(f'expected 8 or 16 bits a channel, found mode {image.mode}.')
    grey = image.mode in ('1', 'L', 'LA', 'La')
    if image.has_transparency_data:
        return image.convert('LA' if grey else 'RGBA')
    return image.convert('L' if grey else 'RGB')


def _cmyk_as_rgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> np.ndarray:
    """CMYK as sRGB: by its profile, or plainly where it has none that is one of CMYK."""
    if icc:
        try:
            if icc[16:20] != b'CMYK':
                raise ValueError('it is none of CMYK')
            srgb = ImageCms.createProfile('sRGB')
            return np.array(ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode='RGB'))
        except (ImageCms.PyCMSError, ValueError, OSError) as error:
            notes.append(f'its colour profile cannot be used ({error}), and is dropped; CMYK is converted without it')
    return np.array(image.convert('RGB'))


def _upright_xmp(xmp: bytes, turned: bool, notes: list[str]) -> bytes | None:
    """XMP for the picture as it is now: what it says of orientation changes where EXIF had the pixels turned."""
    wide = b'O\0r\0i\0e\0n' in xmp or b'\0O\0r\0i\0e' in xmp
    if b':Directory' in xmp or (turned and wide):
        what = 'says in UTF-16 how the picture was turned' if wide else 'lists further pictures in the file'
        notes.append(f'its XMP {what}, and is dropped')
        return None
    if not turned:
        return xmp
    return _XMP_ORIENTATION.sub(rb'\g<1>1', xmp)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        across, down = (float(dots) for dots in image.info['dpi'])  # Pillow's own rationals
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if min(across, down) > 0 else None


def _check_size(width: int, height: int) -> None:
    """As Pillow does for itself."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if width * height > limit:
        raise UserError(f'refused: Image size ({width * height} pixels) exceeds limit of {limit} pixels.')
