"""TIFF files over the grid of what their tags can say: the right pixels, or a refusal that says why."""

import io
import itertools
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from cea_arch.data.image_store import decode, image_size
from cea_arch.data.pictures import as_rgb, decode_picture
from cea_arch.errors import UserError
from tests.data.picture_files import SIZE, opacity, same, samples, tiff

CODECS = (None, 'zlib', 'lzw', 'packbits', 'zstd')


@pytest.mark.parametrize('alpha', [None, 'unassalpha', 'assocalpha', 'unspecified'])
@pytest.mark.parametrize('photometric', ['minisblack', 'miniswhite', 'rgb'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_tiffs_of_every_layout(dtype, photometric, alpha):
    pytest.importorskip('imagecodecs', reason='LZW is written by it')
    peak = np.iinfo(dtype).max
    colours = samples(3 if photometric == 'rgb' else 1, dtype)
    coverage = opacity(dtype)
    stored, wanted = colours, colours
    if alpha == 'assocalpha':
        stored = np.round(colours.astype(float) * coverage / peak).astype(dtype)
        wanted = np.minimum(np.round(stored * np.float64(peak) / coverage), peak).astype(dtype)
    if photometric == 'miniswhite':
        wanted = peak - wanted
    if alpha:
        stored = np.concatenate([stored, coverage], 2)
    if alpha in ('unassalpha', 'assocalpha'):
        wanted = np.concatenate([wanted, coverage], 2)
    wanted = wanted[..., 0] if wanted.shape[2] == 1 else wanted
    tried = 0
    for planar, compression, predictor, tile, order, big in itertools.product(
        ('contig', 'separate'),
        (None, 'zlib', 'lzw', 'packbits', 'zstd'),
        (False, True),
        (None, (16, 16)),
        '<>',
        (False, True),
    ):
        if (predictor and compression in (None, 'packbits')) or (planar == 'separate' and stored.shape[2] == 1):
            continue
        options = {'planarconfig': planar if stored.shape[2] > 1 else None, 'compression': compression, 'tile': tile}
        options |= {'byteorder': order, 'bigtiff': big, 'predictor': predictor or None, 'photometric': photometric}
        pixels = np.moveaxis(stored, -1, 0) if planar == 'separate' else stored.squeeze()
        data = tiff(pixels, **options, rowsperstrip=None if tile else 7, extrasamples=[alpha] if alpha else None)
        picture = decode_picture(data, 'it')
        assert same(picture.pixels, wanted), options
        assert same(decode(data, 'it'), as_rgb(wanted)), options
        assert image_size(data, 'it') == SIZE
        assert any('dropped' in note for note in picture.notes) == (alpha == 'unspecified')
        tried += 1
    assert tried >= 64


@pytest.mark.parametrize('bits', [1, 2, 4])
@pytest.mark.parametrize('photometric', ['minisblack', 'miniswhite'])
def test_tiffs_of_few_bits(bits, photometric):
    values = samples(1, np.uint8)[..., 0] >> (8 - bits)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(SIZE[0], -1), axis=1)
    tags = {256: SIZE[1], 257: SIZE[0], 258: bits, 259: 1, 262: photometric == 'minisblack', 277: 1, 278: SIZE[0]}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: packed.size}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted(tags.items()))
    data = b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + packed.tobytes()
    wanted = values * (255 // (2**bits - 1))
    found = decode_picture(data, 'it').pixels
    assert same(found, 255 - wanted if photometric == 'miniswhite' else wanted)


BY_PILLOW = [('1', fax) for fax in ('group3', 'group4')]
BY_PILLOW += [(mode, 'tiff_jpeg') for mode in ('L', 'RGB', 'CMYK', 'YCbCr')]
BY_PILLOW += list(
    itertools.product(('1', 'L', 'P', 'RGB', 'CMYK', 'YCbCr'), ('tiff_lzw', 'tiff_deflate', 'packbits', None))
)


@pytest.mark.parametrize(('mode', 'compression'), BY_PILLOW)
def test_tiffs_as_pillow_reads_them(mode, compression):
    image = Image.fromarray(samples(3, np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, 'TIFF', compression=compression)
    if mode == 'YCbCr' and compression != 'tiff_jpeg':
        with pytest.raises(UserError, match='it: expected grey, RGB, palette or CMYK, found YCBCR'):
            decode_picture(stream.getvalue(), 'it')
        return
    with Image.open(stream) as stored:
        wanted = np.array(stored.convert('L' if mode in ('1', 'L') else 'RGB'))
    assert same(decode_picture(stream.getvalue(), 'it').pixels, wanted)


@pytest.mark.parametrize('compression', ['group3', 'group4', 'tiff_ccitt', 'tiff_lzw'])
def test_faxes_that_are_white_on_zero(compression):
    image = np.full(SIZE, 255, np.uint8)
    image[4:9, 10:30] = 0
    stream = io.BytesIO()
    Image.fromarray(image).convert('1').save(stream, 'TIFF', compression=compression, tiffinfo={262: 0})
    assert same(decode_picture(stream.getvalue(), 'it').pixels, image)


def test_jpegs_in_tiffs_that_are_white_on_zero_or_planar():
    pytest.importorskip('imagecodecs', reason='JPEG in a TIFF is written by it')
    grey, colour = samples(1, np.uint8)[..., 0], samples(3, np.uint8)
    data = tiff(255 - grey, photometric='miniswhite', compression='jpeg', compressionargs={'level': 100})
    assert np.abs(decode_picture(data, 'it').pixels.astype(int) - grey).max() <= 2
    planar = np.ascontiguousarray(np.moveaxis(colour, -1, 0))
    data = tiff(planar, photometric='rgb', planarconfig='separate', compression='jpeg', compressionargs={'level': 100})
    assert np.abs(decode_picture(data, 'it').pixels.astype(int) - colour).max() <= 2


@pytest.mark.parametrize('shift', [0, 8])
def test_palettes_of_8_and_of_16_bits(shift):
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint16)
    indices = samples(1, np.uint8)[..., 0]
    data = tiff(indices, photometric='palette', colormap=colours << shift)
    assert same(decode_picture(data, 'it').pixels, colours.T[indices].astype(np.uint8))


def with_tag(data, tag, value):
    """The file with another number in a tag that it has."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = file.pages[0].tags[tag]
    changed = bytearray(data)
    struct.pack_into('<H' if found.dtype == 3 else '<I', changed, found.valueoffset, value)
    return bytes(changed)


def test_a_predictor_without_a_compression_that_knows_it_means_nothing():
    pytest.importorskip('imagecodecs', reason='PackBits is written by it')
    pixels = samples(3, np.uint8)
    tags = [(317, 'H', 1, 2, True)]
    for compression in (None, 'packbits'):
        data = tiff(pixels, photometric='rgb', compression=compression, extratags=tags)
        assert same(decode_picture(data, 'it').pixels, pixels)


def test_the_full_picture_behind_a_preview():
    stream, full = io.BytesIO(), samples(3, np.uint8)
    with tifffile.TiffWriter(stream) as writer:
        writer.write(full[::2, ::2], photometric='rgb', subfiletype=1, subifds=1, metadata=None)
        writer.write(full, photometric='rgb', metadata=None)
    assert same(decode_picture(stream.getvalue(), 'it').pixels, full)


def test_what_else_is_refused_says_why():
    plain = tiff(samples(3, np.uint8), photometric='rgb')
    ink = tiff(samples(4, np.uint8), photometric='separated', extratags=[(332, 'H', 1, 2, True)])
    for data, message in (
        (with_tag(plain, 278, 0), 'damaged: strips of no rows'),
        (ink, 'its inks are not cyan, magenta, yellow and black'),
    ):
        with pytest.raises(UserError, match=f'^it: {message}'):
            decode_picture(data, 'it')


@pytest.mark.parametrize(
    ('pixels', 'options', 'message'),
    [
        (samples(1, np.uint8)[..., 0].astype(np.float32), {}, '32 bits float'),
        (samples(1, np.uint8)[..., 0].astype(np.float16), {}, '16 bits float'),
        (samples(1, np.uint8)[..., 0].astype(np.int16), {}, '16 bits signed'),
        (samples(1, np.uint8)[..., 0].astype(np.uint32), {}, '32 bits unsigned'),
        (samples(4, np.uint16), {'photometric': 'separated'}, '16 bits of SEPARATED'),
        (samples(3, np.uint8), {'photometric': 'cielab'}, 'found CIELAB'),
        (samples(3, np.uint8), {'photometric': 'rgb', 'compression': 'webp'}, 'compression WEBP'),
    ],
)
def test_tiffs_that_are_refused(pixels, options, message):
    if options.get('compression'):
        pytest.importorskip('imagecodecs', reason='WebP in a TIFF is written by it')
    data = tiff(pixels, **({'photometric': 'minisblack'} | options))
    for read in (decode_picture, decode):
        with pytest.raises(UserError, match=f'^it: .*{message}'):
            read(data, 'it')


def test_the_first_full_page_is_taken_and_said():
    stream = io.BytesIO()
    pages = [samples(3, np.uint8)[::2, ::2], samples(3, np.uint8), samples(3, np.uint8)[::-1]]
    with tifffile.TiffWriter(stream) as writer:
        for page, kind in zip(pages, (1, 0, 0)):
            writer.write(page, photometric='rgb', subfiletype=kind, metadata=None)
    picture = decode_picture(stream.getvalue(), 'it')
    assert same(picture.pixels, pages[1])
    assert picture.notes == ['page 2 of 3 is taken alone']


def test_a_strip_that_is_cut_short_is_damage():
    for compression in (None, 'zlib'):
        data = tiff(samples(3, np.uint16), photometric='rgb', compression=compression, rowsperstrip=5)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tag = file.pages[0].tags[279]
        for count in (0, 10**6, file.pages[0].databytecounts[0] - 30):
            damaged = bytearray(data)
            kind = {3: '<H', 4: '<I'}[tag.dtype]
            struct.pack_into(kind, damaged, tag.valueoffset, min(count, 65535 if kind == '<H' else count))
            with pytest.raises(UserError, match='it: damaged: image file is truncated'):
                decode_picture(bytes(damaged), 'it')
