"""`cea restore`: odd inputs one by one, options, failures."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps

from cea_arch.cli import main
from cea_arch.data.pictures import Picture, read_picture
from cea_arch.errors import UserError
from cea_arch.restoring.fitting import Fit
from cea_arch.restoring.writing import write_picture

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def profile():
    """A profile that is not sRGB, as a camera or phone would embed."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB', 5000)).tobytes()


def textured(height, width, channels=3, dtype=np.uint8):
    """A smooth picture with an edge: repeatable, lively, and kind to JPEG."""
    y, x = np.mgrid[:height, :width] / 24
    planes = [0.5 + 0.3 * np.sin(x + phase) * np.cos(y) + 0.1 * (x > 1) for phase in range(channels)]
    return np.round(np.stack(planes, -1) * np.iinfo(dtype).max).astype(dtype).squeeze()


def run(model, *words):
    return main(['restore', '-m', model, *map(str, words)])


def expected(small_net, pixels):
    """What the network makes of a picture, by the shortest way."""
    peak = np.iinfo(pixels.dtype).max
    grey = pixels.ndim == 2
    rgb = np.stack([pixels] * 3, -1) if grey else pixels
    with torch.no_grad():
        image = torch.from_numpy(rgb.astype(np.float32) / peak).permute(2, 0, 1)[None]
        out = Fit(small_net.trained_multiple).run(small_net, image).clamp(0, 1)[0]
    out = (out.mean(0) if grey else out.permute(1, 2, 0)).numpy() * peak
    return np.round(out)


@pytest.mark.parametrize('size', [(1, 1), (7, 5), (1, 3000), (64, 49)])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('dtype', 'suffix'), [('u1', '.png'), ('u1', '.bmp'), ('u2', '.png'), ('u2', '.tif')])
def test_sizes_and_depths(small_net, model, tmp_path, size, channels, dtype, suffix):
    pixels = textured(*size, channels, np.dtype(dtype)).reshape(size + (3,) * (channels == 3))
    source = tmp_path / f'a{suffix}'
    assert cv2.imwrite(str(source), pixels[..., ::-1] if channels == 3 else pixels)
    assert run(model, source, '-o', tmp_path / 'out', '--tile', 0) == 0
    found = read_picture(tmp_path / 'out' / source.name).pixels
    assert found.dtype == pixels.dtype
    assert found.shape == pixels.shape
    assert np.abs(found - expected(small_net, pixels)).max() <= 1
    assert not np.array_equal(found, pixels)


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
@pytest.mark.parametrize(('depth', 'suffix'), [('u1', '.png'), ('u2', '.png'), ('u1', '.webp'), ('u2', '.tif')])
def test_alpha_is_untouched(small_net, model, tmp_path, mode, depth, suffix):
    if mode == 'LA' and suffix == '.webp':
        pytest.skip('WebP has no grey')
    pixels = textured(20, 30, len(mode), np.dtype(depth))
    write_picture(tmp_path / f'a{suffix}', Picture(pixels, {'.png': 'PNG', '.webp': 'WEBP', '.tif': 'TIFF'}[suffix]))
    source = read_picture(tmp_path / f'a{suffix}').pixels
    assert run(model, tmp_path / f'a{suffix}', '-o', tmp_path / 'out') == 0
    found = read_picture(tmp_path / 'out' / f'a{suffix}').pixels
    assert found.shape == pixels.shape
    assert found.dtype == pixels.dtype
    assert np.array_equal(found[..., -1], pixels[..., -1])
    colours = source[..., 0] if mode == 'LA' else source[..., :3]
    error = np.abs(found[..., : len(mode) - 1].squeeze() - expected(small_net, colours))
    assert error.mean() <= (12 if suffix == '.webp' else 1)


def test_palette_with_transparency(model, tmp_path):
    image = Image.fromarray(textured(20, 30)).quantize(8)
    image.save(tmp_path / 'p.png', transparency=0)
    assert run(model, tmp_path / 'p.png', '-o', tmp_path / 'out') == 0
    with Image.open(tmp_path / 'p.png') as source, Image.open(tmp_path / 'out' / 'p.png') as found:
        assert found.mode == 'RGBA'
        assert np.array_equal(found.getchannel('A'), source.convert('RGBA').getchannel('A'))


def test_cmyk_jpeg_becomes_rgb(small_net, model, tmp_path):
    Image.fromarray(textured(32, 48)).convert('CMYK').save(tmp_path / 'c.jpg', quality=95)
    assert run(model, tmp_path / 'c.jpg', '-o', tmp_path / 'out') == 0
    with Image.open(tmp_path / 'c.jpg') as source, Image.open(tmp_path / 'out' / 'c.jpg') as found:
        assert found.mode == 'RGB'
        assert np.abs(np.array(found) - expected(small_net, np.array(source.convert('RGB')))).mean() < 5


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif', '.16.png', '.16.tif'])
def test_orientation_is_applied_and_cleared(tmp_path, orientation, suffix):
    path = tmp_path / f'o{suffix}'
    exif = Image.Exif()
    exif[274] = orientation
    exif[271] = 'maker'
    pixels = textured(16, 24)
    if suffix == '.16.tif':
        tags = [(274, 'H', 1, orientation, True), (271, 's', 0, 'maker', True)]
        tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric='rgb', extratags=tags)
    elif suffix == '.16.png':
        stored = exif.tobytes().removeprefix(b'Exif\0\0')
        write_picture(path, Picture(pixels.astype(np.uint16) * 257, 'PNG', exif=stored))
    elif suffix == '.tif':
        tifffile.imwrite(path, pixels, photometric='rgb', extratags=[(274, 'H', 1, orientation, True)])
    else:
        Image.fromarray(pixels).save(path, exif=exif, quality=100)
    shown = Image.fromarray(pixels)
    shown.getexif()[274] = orientation
    shown = np.array(ImageOps.exif_transpose(shown))
    picture = read_picture(path)
    assert picture.pixels.shape == shown.shape
    wide = picture.pixels / (257 if '16' in suffix else 1)
    assert np.abs(wide - shown).mean() < 3
    write_picture(tmp_path / f'again{suffix}', picture)
    assert np.abs(read_picture(tmp_path / f'again{suffix}').pixels / (257 if '16' in suffix else 1) - shown).mean() < 3
    with Image.open(tmp_path / f'again{suffix}') as again:
        assert again.getexif().get(274, 1) == 1
        assert suffix == '.tif' or again.getexif()[271] == 'maker'


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif', '.16.png', '.16.tif'])
def test_profile_and_resolution_are_kept(model, tmp_path, profile, suffix):
    kind = {'jpg': 'JPEG', 'png': 'PNG', 'webp': 'WEBP', 'tif': 'TIFF'}[suffix.rpartition('.')[2]]
    pixels = textured(16, 24, 3, np.uint16 if '16' in suffix else np.uint8)
    write_picture(tmp_path / f'i{suffix}', Picture(pixels, kind, profile, dpi=(300, 300)))
    assert run(model, tmp_path / f'i{suffix}', '-o', tmp_path / 'out') == 0
    found = read_picture(tmp_path / 'out' / f'i{suffix}')
    assert found.icc == profile
    assert suffix == '.webp' or found.dpi == pytest.approx((300, 300), abs=0.1)


def test_progressive_jpeg(model, tmp_path):
    Image.fromarray(textured(40, 40)).save(tmp_path / 'p.jpg', progressive=True)
    assert run(model, tmp_path / 'p.jpg', '-o', tmp_path / 'out') == 0


def encoded(kind, dtype=np.uint8, **options):
    if dtype == np.uint16:
        return cv2.imencode(f'.{kind.lower()}', textured(64, 64, 3, dtype))[1].tobytes()
    stream = io.BytesIO()
    Image.fromarray(textured(64, 64)).save(stream, kind, **options)
    return stream.getvalue()


def bomb():
    """A small PNG that promises 40,000 x 40,000 pixels."""
    header = b'IHDR' + struct.pack('>IIBBBBB', 40_000, 40_000, 8, 2, 0, 0, 0)
    data = encoded('PNG')
    return data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('cut.png', encoded('PNG')[:-300], 'damaged'),
        ('cut16.png', encoded('PNG', np.uint16)[:-3000], 'damaged'),
        ('cut.jpg', encoded('JPEG')[:-300], 'damaged: image file is truncated'),
        ('text.png', b'this is no picture', 'not a picture of .png, .jpg'),
        ('zero.png', b'', 'the file is empty'),
        ('bomb.png', bomb(), r'refused: Image size (1600000000 pixels) exceeds limit'),
        (
            'moving.webp',
            encoded('WEBP', save_all=True, append_images=[Image.new('RGB', (64, 64))]),
            'has 2 frames; expected a still picture',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and '.' in value else '',
)
def test_a_bad_file_fails_by_name_and_the_others_are_done(model, tmp_path, capsys, name, data, message):
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / name).write_bytes(data)
    (folder / 'z.png').write_bytes(encoded('PNG'))
    assert run(model, folder, '-o', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert message in said.err
    assert name in said.err
    assert '1 restored to' in said.out
    assert '1 failed' in said.out
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['z.png']


def test_float_tiffs_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / 'f.tif', np.zeros((8, 8), np.float32))
    with pytest.raises(UserError, match='expected 8 or 16 bits a channel, found 32 bits float'):
        read_picture(tmp_path / 'f.tif')


def test_folders_trees_patterns_and_names(model, tmp_path, capsys):
    for name in ('照片/一.png', '照片/sub/二.jpg', '照片/.hidden.png', '照片/notes.txt', 'empty/x.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded('JPEG' if name.endswith('jpg') else 'PNG'))
    out = tmp_path / '照片' / 'out'

    def written():
        return sorted(p.relative_to(out).as_posix() for p in out.rglob('*.*'))

    assert run(model, tmp_path / '照片', '-o', out) == 0
    assert written() == ['一.png']
    assert run(model, tmp_path / '照片', '-r', '-o', out, '--overwrite') == 0
    assert written() == ['sub/二.jpg', '一.png']
    assert run(model, f'{tmp_path}/照片/sub/*.jpg', '-o', out) == 0
    assert written() == ['sub/二.jpg', '一.png', '二.jpg']
    assert run(model, tmp_path / 'empty', tmp_path / 'nowhere', '-o', out) == 1
    said = capsys.readouterr().err
    assert 'empty holds no pictures; -r looks into the folders below it.' in said
    assert 'nowhere does not exist.' in said
    assert run(model, tmp_path / '照片/一.png', tmp_path / '照片', '-o', tmp_path / 'two') == 0
    (tmp_path / '一.png').write_bytes(encoded('PNG'))
    assert run(model, tmp_path / '一.png', tmp_path / '照片/一.png', '-o', tmp_path / 'three') == 1
    assert '一.png is written to' in capsys.readouterr().err


def test_nothing_is_overwritten_unless_asked(model, tmp_path, capsys):
    source, target = tmp_path / 'a.png', tmp_path / 'out' / 'a_compare.png'
    source.write_bytes(encoded('PNG'))
    target.parent.mkdir()
    target.write_bytes(b'mine')
    assert run(model, source, '-o', tmp_path / 'out', '--compare') == 1
    assert 'a_compare.png exists; --overwrite replaces it.' in capsys.readouterr().err
    assert [p.name for p in target.parent.iterdir()] == ['a_compare.png']
    assert target.read_bytes() == b'mine'
    assert run(model, source, '-o', tmp_path, '--overwrite', '--compare') == 0
    assert source.read_bytes() != encoded('PNG')
    with pytest.raises(UserError, match='exists; --overwrite replaces it'):
        write_picture(source, Picture(textured(4, 4), 'PNG'))


def test_an_output_that_cannot_be_written(model, tmp_path, capsys, monkeypatch):
    (tmp_path / 'a.png').write_bytes(encoded('PNG'))
    (tmp_path / 'file').write_bytes(b'')
    assert run(model, tmp_path / 'a.png', '-o', tmp_path / 'file' / 'below') == 1
    assert 'a.png: ' in capsys.readouterr().err

    def refuse(source, target):
        raise PermissionError(13, 'Permission denied', str(target))

    monkeypatch.setattr('cea_arch.files.os.replace', refuse)
    assert run(model, tmp_path / 'a.png', '-o', tmp_path / 'out') == 1
    assert 'Permission denied' in capsys.readouterr().err
    assert list((tmp_path / 'out').iterdir()) == []


@pytest.mark.parametrize('words', [(), ('--tile', '64', '--overlap', '16')])
def test_comparison_and_maps(small_net, model, tmp_path, words):
    (tmp_path / 'a.png').write_bytes(encoded('PNG'))
    pixels = textured(64, 100, 4)
    write_picture(tmp_path / 'b.png', Picture(pixels, 'PNG'))
    assert run(model, tmp_path / 'b.png', '-o', tmp_path / 'out', '--compare', '--maps', *words) == 0
    pair = read_picture(tmp_path / 'out' / 'b_compare.png').pixels
    restored = read_picture(tmp_path / 'out' / 'b.png').pixels
    assert np.array_equal(pair, np.concatenate([pixels[..., :3], restored[..., :3]], axis=1))
    sheet = read_picture(tmp_path / 'out' / 'b_maps.png').pixels
    assert sheet.shape == (3 * 72, 3 * 108, 3)  # eight components and an empty place, 4 pixels around each
    assert sheet[:72, :108].std() > 1


@pytest.mark.parametrize('ext', ['png', 'jpg', 'webp', 'tif', 'bmp'])
@pytest.mark.parametrize('dtype', ['u1', 'u2'])
def test_results_in_another_format_have_the_same_pixels(small_net, model, tmp_path, ext, dtype):
    pixels = textured(40, 56, 3, np.dtype(dtype))
    source = tmp_path / 'a.TIFF'
    tifffile.imwrite(source, pixels, photometric='rgb')
    words = ['-i', source, '-o', tmp_path, '--suffix', '_restored', '--ext', ext, '-t', '0', '--device', 'cpu']
    assert run(model, *words) == 0
    found = read_picture(tmp_path / f'a_restored.{ext}')
    wide = dtype == 'u2' and ext in ('png', 'tif')
    assert found.pixels.dtype == (np.uint16 if wide else np.uint8)
    want = expected(small_net, pixels) if wide or dtype == 'u1' else np.round(expected(small_net, pixels) / 257)
    error = np.abs(found.pixels - want)
    assert error.max() <= 1 if ext in ('png', 'tif', 'bmp') else error.mean() < 2
    assert Image.open(tmp_path / f'a_restored.{ext}').format == {'jpg': 'JPEG', 'tif': 'TIFF'}.get(ext, ext.upper())


@pytest.mark.parametrize('ext', ['jpg', 'bmp'])
def test_alpha_is_not_dropped_for_a_format_without_it(model, tmp_path, ext, capsys):
    Image.fromarray(textured(16, 16, 4)).save(tmp_path / 'a.png')
    assert run(model, tmp_path / 'a.png', '-o', tmp_path / 'out', '--ext', ext, '--device', 'cpu') == 1
    said = capsys.readouterr().err
    assert f'a.png: it has transparency, which {"JPEG" if ext == "jpg" else "BMP"} cannot hold' in said
    assert not (tmp_path / 'out').exists()


def test_two_pictures_that_would_become_one_are_named(model, tmp_path, capsys):
    for name in ('a.png', 'a.bmp'):
        Image.fromarray(textured(16, 16)).save(tmp_path / name)
    assert run(model, '-i', tmp_path / 'a.png', tmp_path / 'a.bmp', '-o', tmp_path / 'out', '--ext', 'png') == 1
    assert 'is written to' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a.png']


def test_no_picture_at_all_is_a_mistake(model, capsys):
    assert run(model) == 2
    assert 'name pictures, folders of them, or patterns' in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(model, tmp_path, capsys):
    Image.fromarray(textured(16, 16)).save(tmp_path / 'a.png')
    assert run(model, tmp_path / 'a.png', '-o', tmp_path / 'out', '-g', 7) == 2
    assert 'cuda:7' in capsys.readouterr().err


def test_the_output_folder_may_lie_above_the_pictures(model, tmp_path):
    (tmp_path / 'scans').mkdir()
    cv2.imwrite(str(tmp_path / 'scans/a.png'), np.full((8, 8, 3), 90, np.uint8))
    assert run(model, tmp_path / 'scans', '-o', tmp_path) == 0
    assert (tmp_path / 'a.png').is_file()
