import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cea_arch.layers import CEABlock, ConvBlock, HyperAdapter
from cea_arch.layers.blocks import ChannelAttention, PooledScale
from cea_arch.layers.image_wide import ImageWide
from cea_arch.networks import CEAIR
from cea_arch.networks.cea_ir import Downsample, named_size

TINY = {'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1]}
PAPER = TINY | {'block': 'attention', 'modulate': ['q', 'k'], 'cea_stages': ['decoder'], 'up_kernel': 3, 'bias': False}
TINIES = {
    'T': TINY,
    'conv': TINY | {'pooled_scale': False, 'modulate': ['mixer', 'ffn'], 'cea_stages': ['latent', 'decoder']},
    'attention': PAPER,
    'attention, all': PAPER | {'modulate': ['q', 'k', 'v', 'ffn', 'fuse'], 'heads': [1, 1, 2, 4]},
}
# parameters as printed, at ranks 4, 8 and 16; where a size is ours, the most there may be
PARAMETERS = {('S', 4): 9_708_198, ('S', 8): 9_711_526, ('S', 16): 9_718_182, ('base', 8): 21_630_134}


@pytest.fixture(params=TINIES)
def tiny(request):
    return lively(CEAIR(**TINIES[request.param]))


def lively(net):
    """Put what starts at zero off it, as after training, so that every part acts."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return net.eval()


def cost(**options):
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = CEAIR(**options).eval()
        net(torch.rand(1, 3, 256, 256))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 2


@pytest.mark.parametrize('name', ['CEAIR', 'CEABlock', 'CEALayer'])
def test_registered(name):
    build_network = pytest.importorskip('basicsr.archs').build_network
    options = {'type': name} if name == 'CEAIR' else {'type': name, 'dim': 8}
    assert type(build_network(options)).__name__ == name


@pytest.mark.parametrize(('size', 'rank'), PARAMETERS)
def test_the_papers_numbers_of_parameters(size, rank):
    with torch.device('meta'):
        net = CEAIR(size=size, rank=rank)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[size, rank]


def test_the_paper_has_cea_in_alternating_decoder_blocks_from_the_first():
    with torch.device('meta'):
        net = CEAIR(size='S')
    sites = [name for name, m in net.named_modules() if isinstance(m, HyperAdapter)]
    assert sites == [
        f'decoder.{level}.{number}.attn.cea' for level in range(3) for number in ((0,), (0, 2), (0, 2))[level]
    ]
    assert {tuple(net.get_submodule(site).spec.parts) for site in sites} == {('q', 'k')}


@pytest.mark.parametrize('size', ['base', 'S', 'T'])
def test_ceas_share_of_the_compute(size):
    share = cost(size=size)[1] / cost(size=size, modulate=[])[1] - 1
    assert 0 < share <= (0.025 if size == 'T' else 0.01)


def test_t_keeps_its_budget():
    parameters, macs = cost(size='T')
    assert parameters <= 2e6
    assert macs <= 3e9


def test_t_has_no_image_wide_operation_but_cea():
    with torch.device('meta'):
        net = CEAIR(size='T')
    wide = {type(m).__name__ for m in net.modules() if isinstance(m, ImageWide)}
    assert wide == {'DynamicFactors'}
    assert not any(isinstance(m, (nn.AdaptiveAvgPool2d, nn.BatchNorm2d, nn.InstanceNorm2d)) for m in net.modules())


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 5), (8, 8), (16, 24), (17, 70)])
def test_any_size(size, tiny):
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = tiny(x)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize('size', [(24, 32), (21, 30)])
def test_batch_equals_one_by_one(size, tiny):
    net = tiny.double()
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(img[None]) for img in x]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('size', [(32, 48), (37, 41), (33, 64), (3, 2)])
def test_no_padded_token_is_read(size, tiny):
    """Whatever the size, what reads the whole image sees the tokens of the image, and none beside them."""
    seen = {}
    for name, module in tiny.named_modules():
        if isinstance(module, ImageWide | HyperAdapter):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].shape[-2:]}))
    with torch.no_grad():
        tiny(torch.rand(1, 3, *size))
    levels = {'latent': 3, 'refinement': 0}
    for name, shape in seen.items():
        stage, number = name.split('.')[:2]
        level = levels.get(stage, int(number))
        assert shape == tuple(-(-side // 2**level) for side in size), name
    assert seen


def test_completing_an_odd_cell_reaches_no_further_than_a_convolution():
    """An odd map and the same with its last row and column repeated give equal cells but at that border."""
    down = Downsample(4)
    x = torch.rand(1, 4, 21, 15)
    odd, even = down(x), down(nn.functional.pad(x, (0, 1, 0, 1), mode='replicate'))
    assert odd.shape == even.shape == (1, 8, 11, 8)
    torch.testing.assert_close(odd[..., :-1, :-1], even[..., :-1, :-1])


def test_channel_attention_equals_its_definition():
    attention = ChannelAttention(8, 2).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    q, k, v = (t.reshape(2, 2, 4, 30) for t in attention.qkv_dwconv(attention.qkv(x)).chunk(3, dim=1))
    q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
    expected = ((q @ k.mT) * attention.temperature).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.project_out(expected.reshape(x.shape)), rtol=1e-9, atol=1e-12)


def test_pooled_scale_equals_its_definition():
    scale = PooledScale(4).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = x * scale.to_scale(x.mean((2, 3)))[..., None, None]
    torch.testing.assert_close(scale(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('block', 'modulate'),
    [(CEABlock, 'q'), (CEABlock, 'k'), (CEABlock, 'v'), (CEABlock, 'ffn')] + [(ConvBlock, 'mixer'), (ConvBlock, 'ffn')],
)
def test_each_target_changes_what_its_block_computes(block, modulate):
    plain, adapted = lively(block(8, modulate=())), lively(block(8, modulate=[modulate]))
    adapted.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 8, 6, 7)
    assert (adapted(x) - plain(x)).abs().max() > 1e-4
    sites = [m for m in adapted.modules() if isinstance(m, HyperAdapter)]
    assert [list(site.spec.parts) for site in sites] == [[modulate]]


def test_queries_keys_and_values_are_adapted_in_their_own_columns():
    attention = ChannelAttention(8, 2, ['k'])
    x = torch.randn(1, 8, 5, 6)
    changed = (attention.cea.project(attention.qkv, x) - attention.qkv(x)).abs().amax((0, 2, 3))
    assert changed[:8].max() < 1e-6
    assert changed[8:16].min() > 1e-4
    assert changed[16:].max() < 1e-6


def test_stages_choose_where_cea_sits():
    def sites(**options):
        net = CEAIR(**TINY | options)
        return [name.removesuffix('.mixer_cea') for name, m in net.named_modules() if isinstance(m, HyperAdapter)]

    mixer = {'modulate': ['mixer']}
    assert sites(**mixer, cea_stages=['encoder']) == ['encoder.0.0', 'encoder.1.0', 'encoder.2.0']
    assert sites(**mixer, num_blocks=[1, 1, 1, 5], cea_stages=['latent']) == ['latent.0', 'latent.2', 'latent.4']
    assert sites(modulate=['fuse']) == ['fuse.0.cea', 'fuse.1.cea', 'fuse.2.cea']
    assert sites(**mixer, cea_stages=[]) == sites(modulate=[]) == []


def test_every_parameter_gets_a_gradient(tiny):
    tiny.train()(torch.rand(1, 3, 16, 24)).square().sum().backward()
    for name, p in tiny.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'size': 'XL'}, "size must be one of base, S, T, got 'XL'"),
        ({'size': 'T', 'num_blocks': [1, 2]}, r'num_blocks must have 4 numbers, got \[1, 2\]'),
        (
            {'size': 'T', 'cea_stages': ['middle']},
            "cea_stages may hold encoder, latent, decoder, refinement, got 'middle'",
        ),
        ({'size': 'T', 'block': 'mamba'}, "block must be one of attention, conv, got 'mamba'"),
        ({'size': 'T', 'modulate': ['q']}, "modulate may hold mixer, mixed, ffn, fuse, got 'q'"),
        ({'size': 'S', 'modulate': ['mixer']}, "modulate may hold q, k, v, ffn, fuse, got 'mixer'"),
        ({'size': 'S', 'modulate': 'qx'}, "modulate may hold q, k, v, ffn, fuse, got 'x'"),
        ({'size': 'S', 'dim': 10, 'heads': [3, 2, 4, 8]}, 'dim must be a multiple of num_heads, got dim=10'),
        ({'size': 'S', 'cea_heads': 3}, 'width must be a multiple of heads'),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CEAIR(**options)


@pytest.mark.parametrize('options', TINIES.values(), ids=list(TINIES))
def test_a_fresh_network_is_the_identity(options):
    x = torch.rand(1, 3, 19, 22)
    assert torch.equal(CEAIR(**options)(x), x)


@pytest.mark.parametrize('size', ['base', 'S', 'T'])
def test_named_sizes_are_recognised_by_their_weights(size):
    with torch.device('meta'):
        weights = CEAIR(size=size).state_dict()
    assert named_size(weights) == size
    assert named_size(dict(list(weights.items())[1:])) is None


def test_half_precision_does_not_overflow_on_large_pictures():
    attention = ChannelAttention(8, 2)
    qkv = torch.randn(1, 24, 300, 400) + 2  # products that sum to half a million
    exact, half = attention.statistics(qkv), attention.statistics(qkv.half())
    assert exact[0].max() > torch.finfo(torch.float16).max
    for one, other in zip(exact, half):
        torch.testing.assert_close(other, one, rtol=5e-3, atol=0)
