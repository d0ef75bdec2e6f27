"""Damaged picture files, made from good ones by changes that a seed decides, and what reading them does.

``python -m tests.data.mutations --count 3000`` reads so many of each kind, and prints what came of them. A file must be
read or refused in a sentence (UserError): anything else that is raised, or takes seconds, is a fault of the reader.
"""

import argparse
import io
import resource
import sys
import time
import zlib
from collections import Counter

import cv2
import numpy as np
import tifffile
from PIL import Image

from cea_arch.data.image_store import decode
from cea_arch.data.pictures import decode_picture, picture_size
from cea_arch.errors import UserError

SLOW = 5  # seconds


def good_files():
    """Small picture files by name, of every format and many of their kinds."""
    y, x = np.mgrid[:24, :31]
    rgb = np.stack([x * 8, y * 10, x * y % 256], -1).astype(np.uint8)
    alpha = np.concatenate([rgb, rgb[..., :1]], -1)
    wide = rgb.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[274], exif[271], exif[282] = 6, 'maker', 300.0
    exif.get_ifd(0x8769)[0x9003] = '2026:01:01 00:00:00'

    def pillow(image, kind, **options):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    def tiff(pixels, **options):
        stream = io.BytesIO()
        tifffile.imwrite(stream, pixels, metadata=None, **options)
        return stream.getvalue()

    image = Image.fromarray(rgb)
    described = {'exif': exif, 'dpi': (300, 300), 'icc_profile': b'not a profile' * 20}
    return {
        'jpeg': pillow(image, 'JPEG', xmp=b'<x:xmpmeta tiff:Orientation="6"/>', comment=b'said', **described),
        'jpeg-cmyk': pillow(image.convert('CMYK'), 'JPEG', **described),
        'jpeg-progressive': pillow(image.convert('L'), 'JPEG', progressive=True),
        'png': pillow(image, 'PNG', **described),
        'png-palette': pillow(image.quantize(7), 'PNG', transparency=1, bits=4),
        'png-16': cv2.imencode('.png', wide)[1].tobytes(),
        'webp': pillow(Image.fromarray(alpha), 'WEBP', lossless=True, exif=exif),
        'bmp': pillow(image, 'BMP'),
        'tiff': tiff(rgb, photometric='rgb', extratags=[(274, 'H', 1, 6, True), (315, 's', 0, 'me', True)]),
        'tiff-lzw': tiff(wide, photometric='rgb', compression='lzw', predictor=True),
        'tiff-planar': tiff(np.moveaxis(wide, -1, 0), photometric='rgb', planarconfig='separate', compression='zlib'),
        'tiff-tiled': tiff(alpha, photometric='rgb', extrasamples=['assocalpha'], tile=(16, 16), byteorder='>'),
        'tiff-jpeg': tiff(rgb, photometric='rgb', compression='jpeg'),
        'tiff-big': tiff(rgb[..., 0], photometric='minisblack', bigtiff=True, compression='packbits'),
        'tiff-pillow': pillow(image.quantize(9), 'TIFF', compression='tiff_lzw'),
    }


def mutated(data, rng):
    """The file with a few bytes changed, most of them in its first or last hundreds, or with a part gone or twice."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        where = rng.random()
        span = 400 if where < 0.7 else len(out)
        start = max(len(out) - span, 0) if where < 0.3 else 0
        at = start + int(rng.integers(max(min(span, len(out)), 1)))
        what = rng.random()
        if what < 0.5:
            out[at : at + 1] = bytes([int(rng.choice([0, 1, 2, 3, 4, 127, 128, 255, rng.integers(256)]))])
        elif what < 0.8:
            out[at : at + 4] = int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1, rng.integers(2**32)])).to_bytes(
                4, 'little'
            )
        elif what < 0.9:
            del out[at : at + int(rng.integers(1, 40))]
        else:
            out[at:at] = out[at : at + int(rng.integers(1, 40))]
    return with_checksums(bytes(out)) if data.startswith(b'\x89PNG') and rng.random() < 0.7 else bytes(out)


def with_checksums(data):
    """A PNG whose chunks have right checksums, so that it is not refused for these alone."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], 'big')
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, 'big')
        at = end + 4
    return bytes(out)


def run(count, seed=0, kinds=None):
    """What came of reading ``count`` mutated files of each kind: how often each, and faults in words."""
    results, faults = Counter(), []
    for kind, data in good_files().items():
        if kinds and kind not in kinds:
            continue
        rng = np.random.default_rng([seed, len(kind), *kind.encode()])
        for number in range(count):
            damaged = mutated(data, rng)
            began = time.perf_counter()
            outcome = []
            for read in (decode_picture, decode, picture_size):
                try:
                    found = read(damaged, 'it')
                    outcome.append('read')
                    if read is picture_size and not all(type(side) is int and side > 0 for side in found):
                        faults.append(f'{kind} {number}: a size of {found}')
                except UserError:
                    outcome.append('refused')
                except Exception as error:
                    outcome.append(type(error).__name__)
                    faults.append(f'{kind} {number}: {read.__name__}: {type(error).__name__}: {error}')
            if time.perf_counter() - began > SLOW:
                faults.append(f'{kind} {number}: took {time.perf_counter() - began:.0f} s')
            results[kind, outcome[0]] += 1
            if outcome[:2].count('read') == 1:
                results[kind, 'read by one of both'] += 1
    return results, faults


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=3000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', nargs='*')
    args = parser.parse_args()
    results, faults = run(args.count, args.seed, args.kinds)
    lines = [f'{kind:18} {outcome:20} {number:7}' for (kind, outcome), number in sorted(results.items())]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write('\n'.join([*lines, *faults, f'{len(faults)} faults; at most {memory:.0f} MB\n']))
    sys.exit(bool(faults))
