"""Picture files of odd kinds, and the pixels that are in them."""

import io
import struct
import zlib

import numpy as np
import tifffile

SIZE = (24, 40)


def samples(count, dtype):
    """Smooth pixels (H, W, count) over the whole range."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [0.5 + 0.5 * np.sin(x / 7 + phase) * np.cos(y / 5) for phase in range(count)]
    return np.round(np.stack(waves, -1) * np.iinfo(dtype).max).astype(dtype)


def opacity(dtype):
    """Alpha (H, W, 1) from none to all."""
    ramp = np.clip((np.arange(SIZE[1]) + 2) / 30, 0.05, 1)[None, :, None].repeat(SIZE[0], 0)
    return np.round(ramp * np.iinfo(dtype).max).astype(dtype)


def tiff(pixels, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def same(found, wanted):
    return found.dtype == wanted.dtype and found.shape == wanted.shape and np.array_equal(found, wanted)


def png(pixels, bits, colour_type, extra=()):
    """A PNG of samples (H, W, channels) of so many bits, with chunks before its pixels."""
    height, width = pixels.shape[:2]
    if bits == 16:
        rows = pixels.astype('>u2').reshape(height, -1).view(np.uint8)
    else:
        spread = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        rows = np.packbits(spread.reshape(height, -1), axis=1)
    scanlines = np.pad(rows, ((0, 0), (1, 0))).tobytes()
    header = struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in [(b'IHDR', header), *extra, (b'IDAT', zlib.compress(scanlines)), (b'IEND', b'')]
    )


def exif_block(entries, order='<', preview=False):
    """EXIF of ``(tag, type, count, value field)``, with a directory behind it where there is a preview."""
    body = b''.join(struct.pack(f'{order}HHI', tag, kind, count) + field for tag, kind, count, field in entries)
    after = 8 + 2 + len(body) + 4
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}I', 8)
    behind = struct.pack(f'{order}I', after if preview else 0)
    return head + struct.pack(f'{order}H', len(entries)) + body + behind + bytes(6) * preview
