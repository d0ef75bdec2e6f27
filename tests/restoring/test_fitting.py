"""Networks that take multiples of some size alone, or enlarge: restored at any size, whole and in tiles."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import cea_arch
from cea_arch.checkpoints import write_checkpoint
from cea_arch.cli import main
from cea_arch.data.pictures import Picture, read_picture
from cea_arch.errors import UserError
from cea_arch.networks.with_cea import WithCEA, merge
from cea_arch.restoring.fitting import Fit, find_fit
from cea_arch.restoring.restorer import Restorer
from cea_arch.restoring.writing import write_picture
from tests.layers.test_inject import awaken, build, options_of
from tests.networks.test_cea_ir import lively

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')


def injected(kind):
    """A network with CEA layers that act, whose result stays an image."""
    options = {name: value for name, value in options_of(kind).items() if name != 'type'}
    torch.manual_seed(0)
    return lively(WithCEA(**options))


class Blocks(nn.Module):
    """Takes multiples of ``multiple`` alone and gives ``scale`` times the size."""

    def __init__(self, multiple, scale=1):
        super().__init__()
        self.window_size, self.scale = multiple, scale

    def forward(self, x):
        cells = nn.functional.pixel_unshuffle(x, self.window_size)
        return nn.functional.interpolate(nn.functional.pixel_shuffle(cells, self.window_size), scale_factor=self.scale)


@pytest.mark.parametrize(('multiple', 'scale'), [(1, 1), (2, 3), (7, 1), (12, 2), (64, 1)])
def test_multiple_and_scale_are_found(multiple, scale):
    assert find_fit(Blocks(multiple, scale), CPU) == Fit(multiple, scale)


@pytest.mark.parametrize(
    ('kind', 'fit'), [('SwinIR', Fit(8, 1)), ('EDSR', Fit(1, 2)), ('RRDBNet', Fit(2, 2)), ('RCAN', Fit(1, 4))]
)
def test_fit_of_injected_networks(kind, fit):
    assert find_fit(injected(kind), CPU) == fit


@pytest.mark.parametrize('size', [(1, 1), (1, 20), (5, 2), (13, 16), (16, 16)])
@pytest.mark.parametrize('scale', [1, 2])
def test_padding_reflects_and_is_cut_off(size, scale):
    seen = []
    x = torch.rand(1, 3, *size)
    net = Blocks(8, scale)
    out = Fit(8, scale).run(lambda padded: seen.append(padded) or net(padded), x)
    pad = [(0, -length % 8) for length in size]
    expected = np.pad(x[0].numpy(), [(0, 0), *pad], mode='reflect')
    np.testing.assert_array_equal(seen[0][0].numpy(), expected)
    torch.testing.assert_close(out, nn.functional.interpolate(x, scale_factor=scale))


@pytest.mark.parametrize(
    ('net', 'message'),
    [
        (nn.Conv2d(1, 1, 1), 'expected input.* to have 1 channels, but got 3'),
        (nn.Conv2d(3, 1, 1), r'of \(1, 3, 37, 53\) it makes \(1, 1, 37, 53\)'),
        (nn.AvgPool2d(2), r'it makes \(1, 3, 18, 26\)'),
        (nn.Flatten(), 'it makes'),
    ],
)
def test_what_restores_no_pictures_is_refused(net, message):
    with pytest.raises(UserError, match=f'not a network that restores RGB pictures.*{message}'):
        Restorer(net, 'cpu')(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize('size', [(1, 1), (33, 40), (97, 110)])
def test_an_injected_swinir_restores_odd_sizes(size):
    net = injected('SwinIR')
    image = np.random.default_rng(0).random((*size, 3), np.float32)
    found = cea_arch.restore(image, net, device='cpu', tile=0)
    padded = np.pad(image, [(0, -size[0] % 8), (0, -size[1] % 8), (0, 0)], mode='reflect')
    with torch.no_grad():
        expected = net(torch.from_numpy(padded).permute(2, 0, 1)[None])[0].permute(1, 2, 0)[: size[0], : size[1]]
    np.testing.assert_allclose(found, expected.clamp(0, 1).numpy(), atol=1e-6)
    tiled = cea_arch.restore(image, net, device='cpu', tile=64, overlap=16)
    assert np.abs(tiled - found).mean() < 0.05 * np.abs(found - image).mean()


@pytest.mark.parametrize(('kind', 'scale'), [('RRDBNet', 2), ('MSRResNet', 3)])
def test_networks_that_enlarge(kind, scale):
    net = injected(kind)
    x = torch.rand(1, 3, 97, 75)
    whole, tiled = (Restorer(net, 'cpu', tile=tile, overlap=overlap)(x) for tile, overlap in ((0, 0), (64, 16)))
    assert whole.shape == tiled.shape == (1, 3, 97 * scale, 75 * scale)
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()


@pytest.mark.parametrize('shape', [(20, 31), (21, 30, 2), (20, 31, 4)])
def test_an_enlarged_picture_has_enlarged_alpha(tmp_path, shape):
    net = injected('EDSR')
    options = options_of('EDSR')
    write_checkpoint({'params': net.state_dict(), 'network_g': options}, tmp_path / 'x2.pth')
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_picture(tmp_path / 'a.png', Picture(pixels, 'PNG'))
    words = ['-m', str(tmp_path / 'x2.pth'), '-o', str(tmp_path / 'out'), '--compare', '--device', 'cpu']
    assert main(['restore', str(tmp_path / 'a.png'), *words]) == 0
    found = read_picture(tmp_path / 'out' / 'a.png').pixels
    assert found.shape == (2 * shape[0], 2 * shape[1], *shape[2:])
    assert read_picture(tmp_path / 'out' / 'a_compare.png').pixels.shape == (2 * shape[0], 4 * shape[1], 3)
    if shape[2:]:
        alpha = cv2.resize(pixels[..., -1], (2 * shape[1], 2 * shape[0]), interpolation=cv2.INTER_CUBIC)
        assert np.array_equal(found[..., -1], alpha)


def test_layers_alone_ask_for_their_base_and_the_merged_file_restores(tmp_path, capsys):
    base = build('SwinIR')
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    options = options_of('SwinIR', pretrained_base=str(tmp_path / 'base.pth'), freeze_base=True)
    net = WithCEA(**{name: value for name, value in options.items() if name != 'type'})
    awaken(net)
    write_checkpoint({'params': net.stored_state(), 'network_g': options}, tmp_path / 'cea.pth')
    write_picture(tmp_path / 'a.png', Picture(np.random.default_rng(0).integers(0, 256, (21, 19, 3), np.uint8), 'PNG'))

    def run(model):
        return main(['restore', str(tmp_path / 'a.png'), '-m', str(tmp_path / model), '-o', str(tmp_path / 'out')])

    assert run('cea.pth') == 2
    assert 'holds CEA layers alone; `cea merge base.pth' in capsys.readouterr().err
    merge(str(tmp_path / 'base.pth'), str(tmp_path / 'cea.pth'), str(tmp_path / 'whole.pth'))
    (tmp_path / 'base.pth').unlink()
    assert run('whole.pth') == 0
    source, found = (read_picture(tmp_path / name).pixels for name in ('a.png', 'out/a.png'))
    np.testing.assert_array_equal(found, cea_arch.restore(source, net, device='cpu'))
