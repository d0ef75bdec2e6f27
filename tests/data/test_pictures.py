"""The one reader of picture files: the right pixels or a refusal that says why; what belongs to them stays."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from cea_arch.data.exif import build_exif, descriptive, orientation, upright_exif
from cea_arch.data.image_store import decode, image_size
from cea_arch.data.pictures import as_rgb, decode_picture, read_picture, upright
from cea_arch.errors import UserError
from cea_arch.restoring.writing import write_picture
from tests.data.mutations import good_files, run
from tests.data.picture_files import SIZE, exif_block, png, same, samples, tiff

DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@pytest.mark.parametrize(
    ('colour_type', 'bits'),
    [
        (0, 1),
        (0, 2),
        (0, 4),
        (0, 8),
        (0, 16),
        (2, 8),
        (2, 16),
        (3, 1),
        (3, 2),
        (3, 4),
        (3, 8),
        (4, 8),
        (4, 16),
        (6, 8),
        (6, 16),
    ],
)
@pytest.mark.parametrize('transparent', [False, True])
def test_pngs_of_every_kind(colour_type, bits, transparent):
    dtype = np.uint16 if bits == 16 else np.uint8
    stored = samples(CHANNELS[colour_type], np.uint16) >> (16 - bits)
    palette = np.random.default_rng(0).integers(0, 256, (2 ** min(bits, 8), 3), np.uint8)
    extra = [(b'PLTE', palette.tobytes())] if colour_type == 3 else []
    wanted = palette[stored[..., 0]] if colour_type == 3 else (stored * (255 // (2**bits - 1) if bits < 8 else 1))
    wanted = wanted.astype(dtype)
    if transparent and colour_type in (0, 2, 3):
        key = stored[5, 7]
        if colour_type == 3:
            values = np.full(2**bits, 255, np.uint8)
            values[key[0]] = 0
            extra.append((b'tRNS', values.tobytes()))
        else:
            extra.append((b'tRNS', key.astype('>u2').tobytes()))
        alpha = np.where((stored == key).all(-1), 0, np.iinfo(dtype).max).astype(dtype)
        assert 0 < (alpha == 0).sum() < alpha.size
        wanted = np.concatenate([wanted, alpha[..., None]], 2)
    wanted = wanted[..., 0] if wanted.shape[2] == 1 else wanted
    data = png(stored, bits, colour_type, extra)
    assert same(decode_picture(data, 'it').pixels, wanted)
    assert same(decode(data, 'it'), as_rgb(wanted))


def test_a_damaged_chunk_that_only_describes_does_not_refuse_the_picture():
    pixels = samples(3, np.uint8)
    gamma = (b'gAMA', struct.pack('>I', 45455))
    data = png(pixels, 8, 2, [(b'tEXt', b'a\0b'), (b'iCCP', b'x\0\0not a profile'), gamma])
    at = data.index(b'tEXt')
    damaged = data[: at + 4] + b'c' + data[at + 5 :]
    picture = decode_picture(damaged, 'it')
    assert same(picture.pixels, pixels)
    assert same(decode(damaged, 'it'), pixels)
    assert picture.notes == [
        'its tEXt chunk is damaged, and dropped',
        'its iCCP chunk holds no colour profile, and is dropped',
    ]
    assert picture.own == [gamma]
    at = data.index(b'IDAT')
    with pytest.raises(UserError, match='it: damaged: its IDAT chunk has a wrong checksum'):
        decode_picture(data[: at + 9] + b'\1' + data[at + 10 :], 'it')


@pytest.mark.parametrize(
    ('chunk', 'said'),
    [
        ((b'cICP', b'\x09\x10\0\1'), 'PQ'),
        ((b'cICP', b'\x09\x12\0\1'), 'HLG'),
        ((b'gAMA', struct.pack('>I', 100_000)), 'coded with gamma 1'),
        ((b'cICP', b'\1\x0d\0\1'), None),
        ((b'gAMA', struct.pack('>I', 45455)), None),
        ((b'sRGB', b'\0'), None),
    ],
)
def test_what_describes_the_colours_of_a_png_stays(tmp_path, chunk, said):
    chunks = [chunk, (b'tEXt', b'parameters\0a cat, steps: 20'), (b'iTXt', b'Title\0\0\0de\0\0' + 'Kätzchen'.encode())]
    (tmp_path / 'a.png').write_bytes(png(samples(3, np.uint16), 16, 2, chunks))
    picture = decode_picture((tmp_path / 'a.png').read_bytes(), 'it')
    assert [said in note for note in picture.notes] == ([True] if said else [])
    write_picture(tmp_path / 'b.png', picture)
    again = decode_picture((tmp_path / 'b.png').read_bytes(), 'it')
    assert same(again.pixels, picture.pixels)
    assert again.own == chunks


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize(('kind', 'code'), [(1, 'B'), (3, 'H'), (4, 'I'), (6, 'b'), (8, 'h'), (9, 'i')])
def test_orientation_of_any_type_of_whole_number(order, kind, code):
    entries = [(271, 2, 4, b'abc\0'), (274, kind, 1, struct.pack(order + code, 6).ljust(4, b'\0'))]
    block = exif_block(entries, order, preview=True)
    assert orientation(block) == 6
    changed = upright_exif(block)
    assert orientation(changed) == 1
    assert descriptive(changed) == {271: b'abc'}
    assert changed[-10:-6] == bytes(4)  # no preview
    assert len(changed) == len(block)
    assert orientation(exif_block([(274, 2, 4, b'abc\0')], order)) == 1
    assert orientation(exif_block([(274, 3, 1, struct.pack(f'{order}H', 9) + bytes(2))], order)) == 1


def test_texts_go_into_a_block_and_out_again():
    texts = {270: 'Zoë 山田'.encode(), 315: b'M\xfcller', 271: b'abc'}
    assert descriptive(build_exif(texts)) == texts
    assert build_exif({}) is None


def stored_exif(path):
    with Image.open(path) as image:
        return image.info['exif'].removeprefix(b'Exif\0\0')


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
def test_metadata_stays_byte_for_byte(tmp_path, suffix):
    long = 40 * 'Zoë 山田 '
    block = exif_block(
        [
            (274, 3, 1, struct.pack('<I', 8)),
            (282, 2, 4, b'abc\0'),  # a resolution that is a text
            (315, 2, 7, struct.pack('<I', 8 + 2 + 12 * 5 + 4)),
            (700, 2, 4, b'xmp\0'),
            (34853, 4, 1, struct.pack('<I', 8 + 2 + 12 * 5 + 4 + 8)),
        ]
    )
    block += b'M\xfcller\0\0' + exif_block([(0, 2, 4, b'2.2\0')])[8:] + long.encode()
    xmp = f'<x:xmpmeta tiff:Orientation="8">{long}</x:xmpmeta>'.encode()
    picture = Image.fromarray(samples(3, np.uint8))
    picture.save(tmp_path / f'a{suffix}', exif=b'Exif\0\0' + block, **({'xmp': xmp} if suffix != '.png' else {}))
    read = read_picture(tmp_path / f'a{suffix}')
    assert read.pixels.shape == (SIZE[1], SIZE[0], 3)
    write_picture(tmp_path / f'b{suffix}', read)
    assert stored_exif(tmp_path / f'b{suffix}') == upright_exif(block)
    assert orientation(stored_exif(tmp_path / f'b{suffix}')) == 1
    if suffix != '.png':
        with Image.open(tmp_path / f'b{suffix}') as again:
            assert again.info['xmp'] == xmp.replace(b'="8"', b'="1"')


def test_texts_of_a_tiff_stay_byte_for_byte(tmp_path):
    tags = [(270, 's', 0, 'Zoë 山田'.encode(), True), (315, 's', 0, b'M\xfcller', True), (700, 'B', 5, b'<xmp>', True)]
    (tmp_path / 'a.tif').write_bytes(tiff(samples(3, np.uint16), photometric='rgb', extratags=tags, byteorder='>'))
    read = read_picture(tmp_path / 'a.tif')
    write_picture(tmp_path / 'b.tif', read)
    with tifffile.TiffFile(tmp_path / 'b.tif') as file:
        data = (tmp_path / 'b.tif').read_bytes()
        found = {tag.code: data[tag.valueoffset :][: tag.valuebytecount].rstrip(b'\0') for tag in file.pages[0].tags}
    assert {code: found[code] for code, *_ in tags} == {code: text for code, _, _, text, _ in tags}


@pytest.mark.parametrize('kind', ['RGB', 'LAB', 'garbage', 'cut'])
@pytest.mark.parametrize('suffix', ['.jpg', '.tif'])
def test_cmyk_with_a_profile_of_something_else(tmp_path, kind, suffix):
    profiles = {'RGB': ImageCms.createProfile('sRGB'), 'LAB': ImageCms.createProfile('LAB', 5000)}
    whole = ImageCms.ImageCmsProfile(profiles['RGB']).tobytes()
    cut = whole[:16] + b'CMYK' + whole[20:150]
    profile = {'garbage': b'nothing' * 30, 'cut': cut}.get(kind)
    profile = profile or ImageCms.ImageCmsProfile(profiles[kind]).tobytes()
    image = Image.fromarray(samples(3, np.uint8)).convert('CMYK')
    image.save(tmp_path / f'a{suffix}', icc_profile=profile, **({'quality': 95} if suffix == '.jpg' else {}))
    with pytest.warns(UserWarning, match=rf'a{suffix}: its colour profile cannot be used'):
        picture = read_picture(tmp_path / f'a{suffix}')
    with Image.open(tmp_path / f'a{suffix}') as stored:
        assert same(picture.pixels, np.array(stored.convert('RGB')))
    assert picture.icc is None


@pytest.mark.parametrize('number', range(1, 9))
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif', '.16.tif'])
def test_one_rule_of_orientation_for_list_training_and_restoring(tmp_path, number, suffix):
    exif = Image.Exif()
    exif[274] = number
    pixels = samples(3, np.uint16 if '16' in suffix else np.uint8)
    path = tmp_path / f'a{suffix}'
    if 'tif' in suffix:
        path.write_bytes(tiff(pixels, photometric='rgb', extratags=[(274, 'H', 1, number, True)]))
    else:
        Image.fromarray(pixels).save(path, exif=exif, lossless=True)
    data = path.read_bytes()
    picture = decode_picture(data, 'it').pixels
    assert np.abs(picture / 1.0 - upright(pixels, number)).mean() < 5 * (257 if '16' in suffix else 1)
    assert same(decode(data, 'it'), picture)
    assert image_size(path, 'it') == image_size(data, 'it') == picture.shape[:2]


@pytest.mark.parametrize('options', [{}, {'subsampling': 0}, {'restart_marker_blocks': 2}], ids=str)
def test_jpegs_that_lack_pixels_but_not_their_end(photograph, options):
    stream = io.BytesIO()
    Image.fromarray(photograph[:64, :96]).save(stream, 'JPEG', quality=90, **options)
    data = stream.getvalue()
    assert decode_picture(data, 'it').pixels.shape == (64, 96, 3)
    for kept in (len(data) // 2, len(data) - 40):
        with pytest.raises(UserError, match='it: damaged: pixels are missing at its end'):
            decode_picture(data[:kept] + b'\xff\xd9', 'it')


@pytest.mark.parametrize('palette', [b'', bytes(5), bytes(6)])
def test_pngs_whose_palette_lacks_colours(palette):
    data = png(samples(1, np.uint16) >> 14, 2, 3, [(b'PLTE', palette)])
    with pytest.raises(UserError, match='it: damaged: its palette'):
        decode_picture(data, 'it')


def test_xmp_says_what_it_said_unless_exif_had_the_pixels_turned(tmp_path):
    xmp = b'<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    turned = exif_block([(274, 3, 1, struct.pack('<I', 6))])
    for name, text, block, kept in (
        ('alone', xmp, b'', xmp),
        ('both', xmp, turned, xmp.replace(b'>6<', b'>1<')),
        ('wide', xmp.decode().encode('utf-16'), turned, None),
    ):
        stream = io.BytesIO()
        Image.fromarray(samples(3, np.uint8)).save(stream, 'JPEG', xmp=text, exif=b'Exif\0\0' + block if block else b'')
        picture = decode_picture(stream.getvalue(), 'it')
        assert (name, picture.xmp) == (name, kept)
        assert picture.pixels.shape[:2] == (SIZE[::-1] if block else SIZE)


def test_a_wrong_checksum_of_a_side_chunk_and_a_short_cicp(tmp_path):
    data = png(samples(3, np.uint8), 8, 2, [(b'cICP', b'\1'), (b'sBIT', b'\5\6\5'), (b'tEXt', b'a\0b')])
    data = data.replace(b'a\0b', b'a\0c')
    picture = decode_picture(data, 'it')
    assert picture.notes == [
        'its cICP chunk is damaged, and dropped',
        'its tEXt chunk is damaged, and dropped',
        'its sBIT chunk is dropped',
    ]
    (tmp_path / 'a.png').write_bytes(data)
    assert image_size(tmp_path / 'a.png', 'it') == SIZE


def test_a_lossless_webp_stays_so(tmp_path):
    Image.fromarray(samples(3, np.uint8)).save(tmp_path / 'a.webp', lossless=True)
    write_picture(tmp_path / 'b.webp', read_picture(tmp_path / 'a.webp'))
    assert same(read_picture(tmp_path / 'b.webp').pixels, samples(3, np.uint8))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'BMP', 'WEBP'])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_what_opencv_decodes_for_training_is_what_restoring_reads(photograph, kind, mode):
    stream = io.BytesIO()
    Image.fromarray(photograph).convert(mode).save(stream, kind)
    assert same(decode(stream.getvalue(), 'it'), as_rgb(decode_picture(stream.getvalue(), 'it').pixels))


def test_mutated_files_are_read_or_refused():
    pytest.importorskip('imagecodecs', reason='some of them are written by it')
    results, faults = run(25)
    assert faults == []
    assert {kind for kind, outcome in results if outcome == 'read'} >= {'jpeg', 'png', 'tiff', 'tiff-planar', 'webp'}
    assert {kind for kind, outcome in results if outcome == 'refused'} == set(good_files())
