"""`cea_arch.restore` and `Restorer`: arrays in and out, tiles, memory, precision."""

import numpy as np
import pytest
import torch
from torch import nn

import cea_arch
from cea_arch.cli import main
from cea_arch.data.pictures import Picture, read_picture
from cea_arch.errors import UserError
from cea_arch.layers import inject_cea
from cea_arch.restoring import command
from cea_arch.restoring.blending import tones_moved
from cea_arch.restoring.restorer import Restorer, enlarged, restore
from cea_arch.restoring.writing import write_picture

pytestmark = pytest.mark.usefixtures('one_thread')


def test_maps_of_tiles_are_those_of_the_whole(small_net):
    x = torch.rand(1, 3, 90, 110)
    found = []
    for tile, overlap in ((0, 32), (64, 16)):
        restorer = Restorer(small_net, 'cpu', tile=tile, overlap=overlap)
        restorer.maps = cea_arch.restoring.maps.RoutingMaps(small_net, 'decoder.1.0.mixed_cea')
        restorer(x)
        found.append(restorer.maps.maps)
    assert found[0].shape == found[1].shape == (8, 45, 55)
    assert torch.corrcoef(torch.stack([maps.flatten() for maps in found]))[0, 1] > 0.95
    with pytest.raises(UserError, match=r"no CEA layer 'decoder.9.0.mixed_cea'. Did you mean 'decoder"):
        cea_arch.restoring.maps.RoutingMaps(small_net, 'decoder.9.0.mixed_cea')
    with pytest.raises(UserError, match='no CEA layer whose routing'):
        cea_arch.restoring.maps.RoutingMaps(nn.Identity())


class Tokens(nn.Module):
    """Rows of tokens of a picture half as large, as a network of windows has them; too many of them on request."""

    def __init__(self, more=0):
        super().__init__()
        self.mix, self.more = nn.Linear(3, 3), more

    def forward(self, x):
        tokens = nn.functional.avg_pool2d(x, 2).flatten(2).mT
        tokens = torch.cat([tokens, tokens[:, : self.more]], 1)
        return x + self.mix(tokens).mean()


def test_maps_of_tokens_are_laid_out_as_the_picture():
    net, x = Tokens(), torch.rand(1, 3, 40, 24)
    inject_cea(net, 'mix', rank=2, heads=1)
    restorer = Restorer(net, 'cpu')
    restorer.maps = cea_arch.restoring.maps.RoutingMaps(net)
    restorer(x)
    bases = net.mix.cea.adapter(nn.functional.avg_pool2d(x, 2).flatten(2)[..., None])[0][0]
    expected = torch.einsum('rc,chw->rhw', bases, nn.functional.avg_pool2d(x, 2)[0])
    torch.testing.assert_close(restorer.maps.maps, expected)
    net = Tokens(more=1)
    inject_cea(net, 'mix', rank=2, heads=1)
    restorer = Restorer(net, 'cpu')
    restorer.maps = cea_arch.restoring.maps.RoutingMaps(net)
    with pytest.raises(UserError, match=r'mix\.cea reads 241 tokens, which are no rows of a 24 x 40 picture'):
        restorer(x)


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'f4', 'f8'])
@pytest.mark.parametrize('shape', [(20, 31), (20, 31, 1), (20, 31, 2), (20, 31, 3), (20, 31, 4)])
def test_the_library_call_gives_what_it_got(small_net, dtype, shape):
    peak = np.iinfo(dtype).max if dtype[0] == 'u' else 1
    image = (np.random.default_rng(0).random(shape) * peak).astype(dtype)
    before = image.copy()
    out = cea_arch.restore(image, small_net, device='cpu')
    assert out.dtype == image.dtype
    assert out.shape == image.shape
    assert np.array_equal(image, before)
    assert 0.001 < np.abs(out.astype(float) - image).mean() / peak < 0.5
    if shape[-1] in (2, 4):
        assert np.array_equal(out[..., -1], image[..., -1])


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'f4'])
@pytest.mark.parametrize(('channels', 'tile'), [(1, 0), (3, 0), (4, 0), (3, 64)])
def test_strength_blends_result_and_input(small_net, dtype, channels, tile):
    peak = np.iinfo(dtype).max if dtype[0] == 'u' else 1
    image = (np.random.default_rng(0).random((80, 90, channels)) * peak).astype(dtype)

    def restored(strength):
        options = {'tile': tile, 'overlap': 16, 'strength': strength}
        return cea_arch.restore(image, small_net, device='cpu', **options).astype(float)

    whole = restored(1)
    np.testing.assert_allclose(restored(0), image, atol=0 if dtype[0] == 'u' else 1e-6)
    step = 1 if dtype[0] == 'u' else 1e-4  # of tiles that overlap, clipped before they are blended
    np.testing.assert_allclose(restored(0.25), 0.75 * image + 0.25 * whole, atol=step)
    if channels == 4:
        assert np.array_equal(restored(0.25)[..., 3], image[..., 3])


def test_strength_and_tones_at_the_command_line(small_net, model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    write_picture(tmp_path / 'a.png', Picture(pixels, 'PNG'))
    for strength in ('0', '0.5'):
        words = [
            'restore',
            str(tmp_path / 'a.png'),
            '-m',
            model,
            '-o',
            str(tmp_path / strength),
            '--strength',
            strength,
        ]
        assert main(words) == 0
    assert np.array_equal(read_picture(tmp_path / '0' / 'a.png').pixels, pixels)
    half = cea_arch.restore(pixels, small_net, device='cpu', strength=0.5)
    assert np.array_equal(read_picture(tmp_path / '0.5' / 'a.png').pixels, half)
    kept = ['restore', str(tmp_path / 'a.png'), '-m', model, '-o', str(tmp_path / 'kept'), '--keep-tones']
    assert main(kept) == 0
    expected = cea_arch.restore(pixels, small_net, device='cpu', keep_tones=True)
    assert np.array_equal(read_picture(tmp_path / 'kept' / 'a.png').pixels, expected)
    assert main(['restore', str(tmp_path / 'a.png'), '-m', model, '--strength', '2']) == 2
    assert 'strength must be from 0' in capsys.readouterr().err


def test_pictures_whose_tones_moved_are_named_unless_they_were_to_be_kept(model, tmp_path, capsys, monkeypatch):
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3)).astype(np.uint8)
        write_picture(tmp_path / 'in' / f'{number}.png', Picture(pixels, 'PNG'))
    monkeypatch.setattr(command, 'VISIBLE', 0.2)
    words = ['restore', str(tmp_path / 'in'), '-m', model, '-o', str(tmp_path / 'out'), '--overwrite']
    assert main(words) == 0
    said = 'Light or contrast changed visibly: 0.png, 1.png, 2.png and 2 more. Where it was meant so, --keep-tones'
    assert said in capsys.readouterr().out
    for more in (['--keep-tones'], ['--strength', '0']):
        assert main(words + more) == 0
        assert 'Light' not in capsys.readouterr().out


def test_how_far_tones_moved():
    picture = np.random.default_rng(0).integers(0, 200, (300, 200, 3)).astype(np.uint8)
    noise = np.random.default_rng(1).integers(-20, 21, picture.shape)
    assert tones_moved(picture, picture) == 0
    assert tones_moved(picture, picture + 30) == pytest.approx(30, abs=0.5)
    assert tones_moved(picture, (picture + noise).clip(0, 255).astype(np.uint8)) < 3
    assert tones_moved(picture, np.repeat(np.repeat(picture, 2, 0), 2, 1)) < 1
    assert tones_moved(picture[:1, :1], picture[:1, :1] + 7) == 7


class Constant(nn.Module):
    """A network whose output is known."""

    def __init__(self, image):
        super().__init__()
        self.image = torch.from_numpy(image).permute(2, 0, 1)[None]

    def forward(self, x):
        return self.image.to(x) if x.shape == self.image.shape else x


class Brightened(nn.Module):
    """As if the picture were a dark and hazy one."""

    def forward(self, x):
        return (1.6 * (x - 0.15)).clamp(0, 1) ** 0.7


@pytest.mark.parametrize('tile', [0, 128])
def test_tones_are_kept(photograph, tile):
    image = np.ascontiguousarray(photograph[:160, :180])
    changed, kept, half = (
        cea_arch.restore(image, Brightened(), device='cpu', tile=tile, **options).astype(float)
        for options in ({}, {'keep_tones': True}, {'keep_tones': True, 'strength': 0.5})
    )
    assert np.abs(changed - image).mean() > 20
    assert np.abs(kept - image).mean() < 3
    assert np.abs(kept.mean((0, 1)) - image.mean((0, 1))).max() < 0.5
    np.testing.assert_allclose(half, (kept + image) / 2, atol=1)
    assert np.array_equal(cea_arch.restore(image, nn.Identity(), device='cpu', tile=tile, keep_tones=True), image)


def test_details_are_restored_where_tones_are_kept(photograph):
    clean = photograph[:96, :120] / np.float32(255)
    noisy = (clean + np.random.default_rng(0).normal(0, 0.1, clean.shape)).clip(0, 1).astype(np.float32)
    restored = cea_arch.restore(noisy, Constant(clean**0.7), device='cpu', keep_tones=True)
    assert np.square(restored - clean).mean() < 0.1 * np.square(noisy - clean).mean()


@pytest.mark.parametrize('shape', [(1, 1), (5, 40, 3), (20, 3, 4)])
def test_tones_of_small_and_enlarged_pictures(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    out = cea_arch.restore(image, nn.Upsample(scale_factor=2), device='cpu', keep_tones=True)
    assert out.shape == (2 * shape[0], 2 * shape[1], *shape[2:])


def test_strength_of_networks_that_enlarge(photograph):
    image = np.ascontiguousarray(photograph[100:150, 100:160])
    net = nn.Sequential(nn.Upsample(scale_factor=2), Negative())
    none, half, whole = (
        cea_arch.restore(image, net, device='cpu', strength=strength).astype(float) for strength in (0, 0.5, 1)
    )
    assert none.shape == (100, 120, 3)
    assert np.abs(none - enlarged(image, 2)).mean() < 1
    np.testing.assert_allclose(half, (none + whole) / 2, atol=1)


class Negative(nn.Module):
    def forward(self, x):
        return 1 - x


@pytest.mark.parametrize('image', [np.zeros((4, 4, 5), 'u1'), np.zeros((4, 0), 'u1'), np.zeros((4, 4), 'i4')])
def test_what_is_no_image_is_refused(small_net, image):
    with pytest.raises(UserError, match=r'expected an image \(H, W\)'):
        cea_arch.restore(image, small_net, device='cpu')


class Hungry(nn.Module):
    """Has memory for so many pixels only."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, x):
        if x.shape[-2] * x.shape[-1] > self.pixels:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')
        return x


def test_out_of_memory_halves_the_tile_and_says_so():
    x = torch.rand(1, 3, 200, 150)
    with pytest.warns(UserWarning, match='out of memory') as said:
        out = Restorer(Hungry(70 * 70), 'cpu', tile=0)(x)
    torch.testing.assert_close(out, x)
    assert [str(w.message) for w in said] == [
        'out of memory for 150 x 200 pixels at once: trying tiles of 96.',
        'out of memory for tiles of 96 pixels: trying smaller ones.',
    ]
    with (
        pytest.warns(UserWarning, match='out of memory'),
        pytest.raises(UserError, match='out of memory even for tiles of 64 pixels'),
    ):
        Restorer(Hungry(2000), 'cpu', tile=128)(x)


def test_other_errors_are_not_taken_for_memory():
    class Broken(nn.Module):
        def forward(self, x):
            if len(x.flatten()) > 3 * 2000:
                raise RuntimeError('mat1 and mat2')
            return x

    for tile in (0, 64):
        with pytest.raises(RuntimeError, match='mat1 and mat2'):
            Restorer(Broken(), 'cpu', tile=tile, overlap=16)(torch.rand(1, 3, 80, 80))


def test_half_precision_falls_back_where_numbers_overflow(small_net):
    x = torch.rand(1, 3, 33, 40)
    exact = Restorer(small_net, 'cpu')(x)
    assert (Restorer(small_net, 'cpu', 'bf16')(x) - exact).abs().mean() < 0.02

    class Overflowing(nn.Module):
        def forward(self, x):
            return x * (torch.inf if torch.is_autocast_enabled('cpu') else 1)

    with pytest.warns(UserWarning, match='not finite: going on in fp32'):
        torch.testing.assert_close(Restorer(Overflowing(), 'cpu', 'fp16')(x), x)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'device': 'cuda:77'}, "device 'cuda:77' cannot be used"),
        ({'precision': 'int8'}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
        ({'conditioning': 'none'}, "conditioning must be one of whole, tile, got 'none'"),
        ({'tile': 'big'}, "tile must be auto or a number of pixels, got 'big'"),
        ({'tile': 100}, 'tile must be a multiple of 16'),
        ({'strength': 1.5}, 'strength must be from 0, the input, to 1, the result; got 1.5'),
        ({'strength': float('nan')}, 'strength must be from 0'),
    ],
)
def test_bad_options_are_named(small_net, options, message):
    with pytest.raises(UserError, match=message):
        Restorer(small_net, **options)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda image: image.__setitem__((3, 4, 1), np.nan),
            'found some that are not finite',
        ),
        (lambda image: image.__setitem__((3, 4, 1), np.inf), 'not finite'),
        (lambda image: image.__imul__(255), r'expected floats in \[0, 1\], found .* to 2\d\d.*\. Divide by 255 first'),
        (lambda image: image.__imul__(60000), 'Divide by 65535 first'),
        (lambda image: image.__isub__(2), r'found -\d.*\d\.$'),
    ],
)
def test_floats_that_are_no_picture_are_refused(small_net, change, message):
    image = np.random.default_rng(0).random((24, 20, 3)).astype(np.float32)
    change(image)
    restorer = Restorer(small_net, 'cpu')
    with pytest.raises(UserError, match=message):
        restore(image, restorer)
    with pytest.raises(UserError, match=message):
        restorer(torch.from_numpy(image).permute(2, 0, 1)[None])


def test_floats_a_little_beyond_are_clipped_and_said(small_net):
    image = np.random.default_rng(0).random((24, 20, 3)).astype(np.float32) * 1.2 - 0.1
    restorer = Restorer(small_net, 'cpu')
    with pytest.warns(UserWarning, match=r'values of -0\.0.* to 1\.0.* are clipped to \[0, 1\]'):
        found = restore(image, restorer)
    assert np.array_equal(found, restore(image.clip(0, 1), restorer))


@pytest.mark.parametrize('tile', [0, 512])
def test_a_tile_that_memory_cannot_hold_is_made_smaller_and_said(small_net, monkeypatch, tile):
    restorer = Restorer(small_net, 'cpu', tile=tile)
    x = torch.rand(1, 3, 300, 260)
    monkeypatch.setattr('cea_arch.restoring.tiling._free_memory', lambda: restorer.bytes_per_pixel * 150 * 150)
    wanted = tile or 'the whole picture'
    with pytest.warns(UserWarning, match=f'260 x 300 pixels at once .* tiles of 144 are taken instead of {wanted}'):
        found = restorer(x)
    assert torch.equal(found, Restorer(small_net, 'cpu', tile=144)(x))
