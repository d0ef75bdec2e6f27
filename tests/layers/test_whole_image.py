"""Tiles with the statistics of the whole image, against the whole image untiled."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from cea_arch.errors import UserError
from cea_arch.layers import CEALayer, HyperAdapter
from cea_arch.layers.blocks import ChannelAttention, PooledScale
from cea_arch.layers.image_wide import merge_means
from cea_arch.layers.whole_image import WholeImage
from cea_arch.networks import CEAIR
from cea_arch.restoring.tiling import (
    Canvas,
    blend,
    bytes_per_pixel,
    check_tiles,
    choose_tile,
    halvings,
    keep_freed_memory,
    memory_budget,
    restore_tiled,
    spans,
)
from tests.layers.test_cea import randomise
from tests.networks.test_cea_ir import TINIES, TINY, lively

pytestmark = pytest.mark.usefixtures('one_thread')


def tiled(net, whole, x, tile, overlap):
    """A tensor's result by tiles."""
    bands = []
    canvas = Canvas(x.shape[-2:], lambda rows, columns: x[..., rows, columns], lambda top, rows: bands.append(rows))
    restore_tiled(net, whole, canvas, tile, overlap)
    return torch.cat(bands, dim=-2)


def awake(factors, layout='bchw'):
    layer = CEALayer(12, rank=4, factors=factors, layout=layout).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


class Beside(nn.Module):
    """A host whose own output is its input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


def merged(module, x, cores):
    """The statistics of parts of an image, each read from a tile that reaches beyond its core, as one."""
    total = None
    for rows, columns in cores:
        tile = [
            slice(max(s.start - module.reach, 0), min(s.stop + module.reach, n))
            for s, n in zip((rows, columns), x.shape[-2:])
        ]
        core = [slice(s.start - t.start, s.stop - t.start) for s, t in zip((rows, columns), tile)]
        part = module.statistics(x[..., tile[0], tile[1]], tuple(core))
        total = part if total is None else module.merge(total, part)
    return total


CORES = [(slice(0, 4), slice(0, 8)), (slice(0, 4), slice(8, 11)), (slice(4, 9), slice(0, 11))]


@pytest.mark.parametrize('options', [{}, {'stride': 4}, {'factors': 'pooled'}], ids=str)
def test_statistics_of_parts_merge_to_those_of_the_whole(options):
    module = randomise(HyperAdapter(12, 12, {'out': (0, 12)}, **options).double()).factors
    x = torch.randn(2, 12, 9, 11, dtype=torch.float64)
    found, whole = merged(module, x, CORES), module.statistics(x, (slice(0, 9), slice(0, 11)))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole[0], module.statistics(x)[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(module.write(found), module(x), rtol=1e-10, atol=1e-12)


def test_parts_that_reach_less_or_begin_at_odd_pixels_are_not_those_of_the_whole():
    module = awake('dynamic').adapter.factors
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    whole = module.statistics(x)[0]
    halves = [x[..., :4, :], x[..., 4:, :]]  # without what lies beyond their cores
    short = module.merge(*(module.statistics(half, (slice(0, 4), slice(0, 8))) for half in halves))[0]
    odd = merged(module, x, [(slice(0, 3), slice(0, 8)), (slice(3, 8), slice(0, 8))])[0]
    for found in (short, odd):
        assert (found - whole).abs().max() > 1e-3


def test_large_logits_merge_without_overflow():
    one, other = ((torch.ones(1, 1), torch.tensor([[800.0]])), (torch.zeros(1, 1), torch.tensor([[-800.0]])))
    mean, log_weight = merge_means(one, other)
    assert mean.item() == 1
    assert log_weight.item() == 800


def test_channel_statistics_of_parts_merge_to_those_of_the_whole():
    attention, qkv = ChannelAttention(8, 2).double(), torch.randn(2, 24, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(merged(attention, qkv, CORES), attention.statistics(qkv), rtol=1e-10, atol=1e-12)
    scale, x = PooledScale(8).double(), torch.randn(2, 8, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(merged(scale, x, CORES), scale.statistics(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('layout', ['bchw', 'bhwc'])
def test_a_layers_tiles_share_the_factors_of_the_whole_image(layout):
    net = Beside(awake('dynamic', layout))
    x = torch.randn(1, 12, 32, 48, dtype=torch.float64)
    x = x if layout == 'bchw' else x.permute(0, 2, 3, 1)
    tiles = [(slice(0, 24), slice(0, 16)), (slice(8, 32), slice(8, 24))]  # rows of the image; the core within them
    picks = [(0, slice(None), s) if layout == 'bchw' else (0, s) for s, _ in tiles]
    with WholeImage(net) as whole:
        for (_, core), pick in zip(tiles, picks):
            with whole.collecting((core, slice(0, 48)), (24, 48), 8):
                net(x[pick][None])
        whole.merge()
        shared = [net(x[pick][None])[0] for pick in picks]
    expected = [net(x)[pick] for pick in picks]
    torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-10)
    assert whole.exact
    assert net.layer.adapter.factors.exchange is None


@pytest.mark.parametrize(
    ('core', 'overlap', 'reason'),
    [(24, 1, 'overlap by 1 pixels, less than 2'), (23, 8, 'do not start at multiples of 2')],
)
def test_what_is_not_exact_is_named_once(core, overlap, reason, recwarn):
    net = Beside(awake('dynamic'))
    x = torch.randn(1, 12, 32, 32, dtype=torch.float64)
    with WholeImage(net) as whole:
        for _ in range(2):
            with whole.collecting((slice(0, core), slice(0, 32)), (32, 32), overlap):
                net(x)
    assert not whole.exact
    assert [reason in str(w.message) and 'is approximate' in str(w.message) for w in recwarn] == [True]


NETS = {
    name: TINIES[name] | {'cea_stages': ['latent', 'decoder'], 'up_kernel': 1} for name in ('T', 'conv', 'attention')
}


@pytest.mark.parametrize('kind', NETS)
@pytest.mark.parametrize('size', [(137, 64), (71, 203)])
def test_tiles_with_the_whole_images_statistics_equal_untiled(size, kind):
    net = lively(CEAIR(**NETS[kind]))
    x = torch.rand(1, 3, *size)
    x[..., : size[1] // 2] *= 0.2  # so that tiles differ
    with torch.no_grad():
        expected = net(x)
        with WholeImage(net) as whole:
            shared = tiled(net, whole, x, 128, 32)
        own = tiled(net, None, x, 128, 32)
    assert whole.exact
    error, own_error = ((out - expected).square().mean() for out in (shared, own))
    assert error < 2e-3 * (expected - x).square().mean()
    assert error < own_error / 50
    assert (net(x) - expected).abs().max() == 0  # the network is as it was


@pytest.mark.parametrize('kind', NETS)
def test_each_sweep_comes_closer(kind):
    net = lively(CEAIR(**NETS[kind]))
    x = torch.rand(1, 3, 160, 160) * torch.linspace(0.1, 1, 160)
    with torch.no_grad():
        expected = net(x)
        errors = []
        with WholeImage(net) as whole:
            for _ in range(3):
                out = torch.zeros_like(x)
                for a, b, core in ((0, 112, slice(0, 80)), (48, 160, slice(32, 112))):
                    with whole.collecting((slice(0, 160), core), (160, 112), 32):
                        tile = net(x[..., a:b])
                    out[..., a:b][..., core] = tile[..., core]
                whole.merge()
                errors.append((out - expected).abs().mean().item())
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_a_network_without_global_statistics_needs_no_sweep():
    calls = []
    net = nn.Identity()
    x = torch.rand(1, 3, 100, 90)
    with WholeImage(net) as whole:
        assert not whole
        out = tiled(lambda t: calls.append(1) or net(t), whole, x, 64, 16)
    assert len(calls) == len(spans(100, 64, 16)) * len(spans(90, 64, 16))
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize('scale', [1, 2])
def test_no_more_is_read_and_written_at_once_than_a_tile_and_a_row_of_tiles(scale):
    x = torch.rand(1, 3, 200, 150)
    read, written = [], []

    def give(rows, columns):
        read.append((rows.stop - rows.start, columns.stop - columns.start))
        return x[..., rows, columns]

    canvas = Canvas((200, 150), give, lambda top, rows: written.append((top, rows)), scale)
    keep_freed_memory()
    restore_tiled(nn.Upsample(scale_factor=scale), None, canvas, 64, 16)
    assert max(max(size) for size in read) == 64
    assert len(written) > 4
    tops = [top for top, _ in written]
    ends = [top + rows.shape[-2] for top, rows in written]
    assert tops == [0, *ends[:-1]]
    expected = nn.functional.interpolate(x, scale_factor=scale)
    torch.testing.assert_close(torch.cat([rows for _, rows in written], dim=-2), expected)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other systems manage memory by themselves')
def test_the_memory_of_a_freed_tensor_serves_the_next_however_large():
    code = """
import resource, torch
from cea_arch.restoring.tiling import keep_freed_memory
keep_freed_memory()
for _ in range(7):  # small things of torch's may come to lie behind the first ones
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1100 * 2**18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = [int(line) for line in done.stdout.split()]
    assert faults[-1] < faults[0] / 100


@pytest.mark.parametrize('length', [1, 63, 64, 65, 97, 128, 130, 1000])
@pytest.mark.parametrize(('tile', 'overlap'), [(64, 0), (64, 16), (128, 32), (256, 64)])
def test_spans_cover_each_pixel_once_and_blending_adds_up(length, tile, overlap):
    total = torch.zeros(length)
    found = spans(length, tile, overlap)
    for span in found:
        assert span.stop - span.start <= tile
        assert span.start % 16 == 0
        total[span.start : span.stop] += blend(span, length, overlap)
    torch.testing.assert_close(total, torch.ones(length))
    assert [s.core_start for s in found[1:]] == [s.core_stop for s in found[:-1]]
    assert (found[0].core_start, found[-1].core_stop) == (0, length)


@pytest.mark.parametrize(
    ('tile', 'overlap', 'message'),
    [
        (100, 32, 'tile must be a multiple of 16 pixels, got 100'),
        (128, 5, 'overlap must be a multiple of 16 pixels, got 5'),
        (-16, 0, 'tile must be a multiple of 16 pixels, got -16'),
        (48, 0, 'tile must be at least 64 and four times the overlap of 0, got 48'),
        (112, 32, 'four times the overlap of 32, got 112'),
    ],
)
def test_impossible_tiles_are_named(tile, overlap, message):
    with pytest.raises(UserError, match=message):
        check_tiles(tile, overlap)


def test_tile_follows_memory(monkeypatch):
    net, cpu = lively(CEAIR(**TINY)), torch.device('cpu')
    per_pixel = bytes_per_pixel(net, cpu)
    assert 100 < per_pixel < 5000
    monkeypatch.setattr('cea_arch.restoring.tiling._free_memory', lambda: 2 * per_pixel * 200 * 200)
    assert choose_tile(200, 200, memory_budget(cpu), per_pixel) == 0
    assert choose_tile(201, 200, memory_budget(cpu), per_pixel) == 192
    assert choose_tile(400, 200, memory_budget(cpu, all_of_it=True), per_pixel) == 0
    assert list(halvings(256, 32)) == [(256, 32), (128, 32), (64, 16)]
    assert list(halvings(96, 32)) == [(96, 16), (64, 16)]
