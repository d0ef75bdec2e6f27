"""TIFF files: grey, RGB, palette and CMYK of up to 16 bits, of any compression, planes, tiles and byte order."""

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cea_arch.data import jpeg
from cea_arch.data.exif import BYTES, DESCRIPTIVE_TAGS, LONG, ORIENTATION, structure
from cea_arch.errors import UserError

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6  # of PhotometricInterpretation
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_NONE, _ZLIB, _FAX, _JPEG = 1, (8, 32946), (2, 3, 4), (7,)  # of Compression; JPEG gives RGB for YCbCr
_OF_BYTES = (5, 32773, 34925, 50000)  # LZW, PackBits, LZMA, Zstandard
_PREDICTABLE = (*_ZLIB, *(kind for kind in _OF_BYTES if kind != 32773))
_DIFFERENCES = 2  # of Predictor
_PREDICTED = {(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (_DIFFERENCES, 8), (_DIFFERENCES, 16)}
_OF_CODECS = (292, 347)  # T4Options, JPEGTables
_STRIPS = 273
_INK_SET = 332
_OTHERS = {34665: 'Exif', 34853: 'GPS', 33723: 'IPTC', 34377: 'Photoshop', 33550: 'GeoTIFF'}
_SEPARATE, _REVERSED = 2, 2  # of PlanarConfiguration and FillOrder
_DEPTHS = {_WHITE_IS_ZERO: (1, 2, 4, 8, 16), _BLACK_IS_ZERO: (1, 2, 4, 8, 16), _PALETTE: (1, 2, 4, 8)}
_FORMATS = {1: 'unsigned', 2: 'signed', 3: 'float', 5: 'complex', 6: 'complex'}  # of SampleFormat
_ASSOCIATED, _UNASSOCIATED = 1, 2  # of ExtraSamples
_REDUCED = 1  # of NewSubfileType: another page, or a preview, in less resolution
_X_RESOLUTION, _Y_RESOLUTION, _UNIT, _XMP, _ICC = 282, 283, 296, 700, 34675
_UNITS = {2: 1, 3: 2.54}  # of ResolutionUnit: inch and centimetre

logging.getLogger('tifffile').setLevel(logging.CRITICAL + 1)  # what is wrong with a file is said in our words


class Tiff:
    """The first full picture of a TIFF or BigTIFF file, turned upright.

    Args:
        file: The file's bytes; or its path, of which headers alone are read: then there are no pixels.

    Attributes:
        size: Height and width.
        notes: What of the file is not taken.

    Raises:
        UserError: No picture in it.
    """

    def __init__(self, file: bytes | Path) -> None:
        from tifffile import TiffFile  # takes a while, and few need it

        self.notes: list[str] = []
        self._data = file if isinstance(file, bytes) else b''
        tiff = TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file)
        try:
            pages = list(tiff.pages)
        finally:
            if not self._data:
                tiff.close()
        full = [page for page in pages if not page.subfiletype & _REDUCED]
        full = full or [page for top in pages for page in top.pages or () if not page.subfiletype & _REDUCED] or pages
        if not full:
            raise UserError('damaged: it has no picture.')
        self._page: Any = full[0]
        if len(full) > 1:
            number = pages.index(full[0]) + 1 if full[0] in pages else 1
            self.notes.append(f'page {number} of {len(pages)} is taken alone')
        height, width = self._page.imagelength, self._page.imagewidth
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise UserError(f'damaged: {width} x {height} pixels.')
        self.size = (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)

    @property
    def orientation(self) -> int:
        """How :meth:`pixels` are stored, 1 to 8."""
        return self._number(ORIENTATION) or 1

    def pixels(self) -> np.ndarray:
        """Pixels as stored, ``(H, W)``, ``(H, W, 2)``, ``(H, W, 3)`` or ``(H, W, 4)``, uint8 or uint16; alpha, where
        there is any, not multiplied into the colours. Of CMYK the four colours: see :attr:`is_cmyk`."""
        samples, photometric = self._read(), self._page.photometric
        count = _COLOURS[photometric]
        colours, extra = samples[..., :count], samples[..., count:]
        if photometric == _PALETTE:
            colours = self._palette()[colours[..., 0]]
        else:
            colours = _spread(colours, self._page.bitspersample)
        peak = np.iinfo(colours.dtype).max
        kind = next(iter(self._page.extrasamples), None)
        alpha = _spread(extra[..., :1], self._page.bitspersample) if kind in (_ASSOCIATED, _UNASSOCIATED) else None
        if alpha is None and extra.shape[2]:
            self.notes.append(f'{extra.shape[2]} channels beside the colours, which say not what they are, are dropped')
        elif extra.shape[2] > 1:
            self.notes.append(f'{extra.shape[2] - 1} channels beside colours and alpha are dropped')
        if alpha is not None and kind == _ASSOCIATED:
            divided = colours * np.float64(peak) / np.maximum(alpha, 1)
            colours = divided.round().clip(0, peak).astype(colours.dtype)
        if photometric == _WHITE_IS_ZERO:
            colours = peak - colours
        pixels = colours if alpha is None else np.concatenate([colours, alpha], axis=2)
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels

    def _palette(self) -> np.ndarray:
        """Colours ``(entries, 3)``; old programs wrote them with 8 bits."""
        found = self._page.colormap
        if found is None or found.shape != (3, 2**self._page.bitspersample):
            raise UserError('damaged: its palette is absent, or of another length.')
        return (found >> 8 if found.max() > 255 else found).astype(np.uint8).T

    @property
    def is_cmyk(self) -> bool:
        """Whether :meth:`pixels` are cyan, magenta, yellow and black."""
        return self._page.photometric == _CMYK

    @property
    def texts(self) -> dict[int, bytes]:
        """What its tags say in words, as :func:`cea_arch.data.exif.descriptive` gives it."""
        found = {tag: self._bytes(tag).rstrip(b'\0') for tag in DESCRIPTIVE_TAGS if self._is_text(tag)}
        # ImageJ's says how many pages there are, and would mislead readers of one
        return {tag: text for tag, text in found.items() if text and not text.startswith(b'ImageJ=')}

    @property
    def others(self) -> list[str]:
        """Names of further tags that describe the picture, and are not read."""
        return [name for tag, name in _OTHERS.items() if tag in self._page.tags]

    @property
    def icc(self) -> bytes | None:
        """The colour profile."""
        return self._bytes(_ICC) or None

    @property
    def xmp(self) -> bytes | None:
        """The XMP packet."""
        return self._bytes(_XMP) or None

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Dots per inch, if they are said in a way that makes sense."""
        values = [self._page.tags.valueof(tag) for tag in (_X_RESOLUTION, _Y_RESOLUTION)]
        unit = _UNITS.get(self._number(_UNIT) or 2)
        try:
            across, down = (float(numerator / denominator) for numerator, denominator in values)
        except (TypeError, ValueError, ZeroDivisionError):
            if any(value is not None for value in values):
                self.notes.append('its resolution makes no sense, and is dropped')
            return None
        return (across * unit, down * unit) if unit and min(across, down) > 0 and max(across, down) < 1e9 else None

    def _read(self) -> np.ndarray:
        """Samples ``(H, W, samples)`` as they are stored."""
        self._check_kind()
        page = self._page
        height, width = page.imagelength, page.imagewidth
        planes = page.samplesperpixel if page.planarconfig == _SEPARATE else 1
        samples = page.samplesperpixel // planes
        high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        across, down = -(-width // wide), -(-height // high)
        if len(page.databytecounts) < len(page.dataoffsets):
            raise UserError('damaged: it does not say how long its strips are (StripByteCounts).')
        if len(page.dataoffsets) < planes * down * across:
            raise UserError('damaged: image file is truncated.')
        out = np.empty((height, width, planes * samples), np.uint16 if page.bitspersample == 16 else np.uint8)
        for number in range(planes * down * across):
            plane, row, column = number // (down * across), number // across % down, number % across
            top, left = row * high, column * wide
            rows = high if page.is_tiled else min(high, height - top)
            part = out[top : top + rows, left : left + wide, plane * samples : (plane + 1) * samples]
            part[:] = self._segment(number, rows, wide, samples)[: part.shape[0], : part.shape[1]]
        return out

    def _segment(self, number: int, rows: int, columns: int, samples: int) -> np.ndarray:
        """Samples ``(rows, columns, samples)`` of a strip or tile."""
        page, bits = self._page, self._page.bitspersample
        start, count = page.dataoffsets[number], page.databytecounts[number]
        stored = self._data[start : start + count]
        if not count or len(stored) < count:
            raise UserError('damaged: image file is truncated.')
        if page.compression in _JPEG:
            high, wide, count_found = jpeg.frame(stored)
            if high < rows or wide != columns or count_found != samples:  # libtiff would fill up what is not there
                raise UserError(f'damaged: {wide} x {high} pixels in JPEG, expected {columns} x {rows}.')
            return self._by_libtiff(stored, rows, columns, bits, samples).reshape(rows, columns, samples)
        if page.fillorder == _REVERSED:
            stored = np.packbits(np.unpackbits(np.frombuffer(stored, np.uint8), bitorder='little')).tobytes()
        width = -(-columns * samples * bits // 8)  # of a row, in bytes
        if page.compression in _FAX:
            unpacked = self._by_libtiff(stored, rows, columns, 1, 1)
            return unpacked.astype(np.uint8).reshape(rows, columns, 1)
        if page.compression in _ZLIB:
            stored = zlib.decompressobj().decompress(stored, rows * width)
        elif page.compression != _NONE:  # as if the bytes were grey pixels
            stored = self._by_libtiff(stored, rows, width, 8, 1).tobytes()
        if len(stored) < rows * width:
            raise UserError('damaged: image file is truncated.')
        packed = np.frombuffer(stored, np.uint8, rows * width).reshape(rows, width)
        if bits < 8:
            values = np.unpackbits(packed, axis=1)[:, : columns * samples * bits].reshape(rows, -1, bits)
            return (values @ (1 << np.arange(bits, dtype=np.uint8))[::-1]).reshape(rows, columns, samples)
        order = page.parent.byteorder
        values = packed.view(f'{order}u{bits // 8}').astype(f'u{bits // 8}').reshape(rows, columns, samples)
        differences = page.predictor == _DIFFERENCES and page.compression in _PREDICTABLE  # elsewhere it means nothing
        return np.add.accumulate(values, axis=1, dtype=values.dtype) if differences else values

    def _by_libtiff(self, stored: bytes, rows: int, columns: int, bits: int, samples: int) -> np.ndarray:
        """Samples of one strip or tile whose compression libtiff, which Pillow brings, can undo."""
        page = self._page
        compression = int(page.compression)
        # of JPEG in colour alone it matters to libtiff; Pillow would turn min-is-white, as pixels() does
        photometric = int(page.photometric) if compression in _JPEG and samples > 1 else _BLACK_IS_ZERO
        tags = {256: [columns], 257: [rows], 258: [bits] * samples, 259: [compression], 262: [photometric]}
        tags |= {277: [samples], 278: [rows], 279: [len(stored)]}
        for tag in (found for found in _OF_CODECS if found in page.tags):
            value = page.tags[tag].value
            tags[tag] = value if isinstance(value, bytes) else [int(value)]
        with Image.open(io.BytesIO(_one_strip(tags, stored)), formats=['TIFF']) as image:
            return np.array(image)

    def _check_kind(self) -> None:
        page = self._page
        bits, sample_format = page.bitspersample, page.sampleformat
        found = f'{bits} bits {_FORMATS.get(sample_format, "of an unknown kind")}'
        if sample_format != 1 or bits not in (1, 2, 4, 8, 16):
            raise UserError(f'expected 8 or 16 bits a channel, found {found}.')
        photometric = page.photometric
        if photometric not in _COLOURS or (photometric == _YCBCR and page.compression not in _JPEG):
            kind = getattr(photometric, 'name', photometric)
            raise UserError(f'expected grey, RGB, palette or CMYK, found {kind} (PhotometricInterpretation).')
        if bits not in _DEPTHS.get(photometric, (8, 16)) or (photometric == _CMYK and bits == 16):
            raise UserError(f'{bits} bits of {getattr(photometric, "name", photometric)} are not supported.')
        if photometric == _CMYK and page.tags.valueof(_INK_SET) not in (None, 1):
            raise UserError('its inks are not cyan, magenta, yellow and black (InkSet).')
        if not page.is_tiled and page.rowsperstrip < 1:
            raise UserError('damaged: strips of no rows.')
        if page.samplesperpixel < _COLOURS[photometric]:
            raise UserError(f'damaged: {page.samplesperpixel} channels are too few for its colours.')
        known = (_NONE, *_ZLIB, *_JPEG, *_FAX, *_OF_BYTES)
        if page.compression not in known or (page.predictor, bits) not in _PREDICTED:
            raise UserError(
                f'compression {getattr(page.compression, "name", page.compression)} with predictor {page.predictor} '
                f'of {bits} bits is not supported.'
            )

    def _number(self, tag: int) -> int | None:
        value = self._page.tags.valueof(tag)
        return int(value) if isinstance(value, int) else None

    def _is_text(self, tag: int) -> bool:
        return tag in self._page.tags and self._page.tags[tag].dtype == 2

    def _bytes(self, tag: int) -> bytes:
        found = self._page.tags.get(tag)
        return self._data[found.valueoffset :][: found.valuebytecount] if found else b''


def _one_strip(tags: dict[int, bytes | list[int]], stored: bytes) -> bytes:
    """A TIFF file of one strip, with these tags; where the strip begins is added."""
    entries = {
        tag: (BYTES, value) if isinstance(value, bytes) else (LONG, struct.pack(f'<{len(value)}I', *value))
        for tag, value in tags.items()
    }
    size = len(structure(entries | {_STRIPS: (LONG, bytes(4))}))
    return structure(entries | {_STRIPS: (LONG, struct.pack('<I', size))}) + stored


def _spread(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 1, 2 or 4 bits over the range of 8; others as they are."""
    return samples.astype(np.uint8) * np.uint8(255 // (2**bits - 1)) if bits < 8 else samples
