import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cea_arch.archs.ceanet_arch import CEANet, Downsample
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.layers.cea import RESIDUAL_STD
from cea_arch.layers.transformer import ChannelAttention

TINY = {'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'heads': [1, 1, 2, 4]}
# parameters, and multiply-accumulates at 256 x 256
BUDGETS = {'base': (25.3e6, 77e9), 'S': (5.9e6, 11.6e9), 'T': (1e6, 3e9)}


def lively(net):
    """Put what starts at zero off it, as after training, so that every part acts."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.1)
        for layer in (m for m in net.modules() if isinstance(m, CEALayer)):
            layer.gamma.normal_(std=1 / RESIDUAL_STD)
            layer.adapter.to_out.weight.normal_(std=0.3)
            for projection in (layer.adapter.to_q, layer.adapter.to_k, layer.adapter.to_v):
                projection.reset_parameters()  # broader attention than a fresh one: parts are like the whole
    return net.eval()


@pytest.mark.parametrize('name', ['CEANet', 'CEABlock', 'CEALayer'])
def test_registered(name):
    build_network = pytest.importorskip('basicsr.archs').build_network
    options = {'type': name} if name == 'CEANet' else {'type': name, 'dim': 8}
    assert type(build_network(options)).__name__ == name


@pytest.mark.parametrize('size', BUDGETS)
def test_sizes_keep_their_budgets_and_ceas_share(size):
    def cost(**options):
        net = CEANet(size=size, **options).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.rand(1, 3, 256, 256))
        return sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 2

    parameters, macs = cost()
    bare_parameters, bare_macs = cost(cea_stages=())
    assert parameters <= BUDGETS[size][0]
    assert macs <= BUDGETS[size][1]
    assert 1 < parameters / bare_parameters <= 1.05
    assert 1 < macs / bare_macs <= 1.05


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 5), (8, 8), (16, 24), (17, 70)])
def test_any_size(size):
    net = lively(CEANet(**TINY))
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        out = net(x)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize('size', [(24, 32), (21, 30)])
def test_batch_equals_one_by_one(size):
    net = lively(CEANet(**TINY)).double()
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.cat([net(img[None]) for img in x]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('size', [(32, 48), (37, 41), (33, 64), (3, 2)])
def test_padding_stays_out_of_the_conditioning(size):
    """Whatever the size, each CEA layer and each attention sees the tokens of the image, and none beside them."""
    net = lively(CEANet(**TINY))
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, (CEALayer, ChannelAttention)):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].shape[-2:]}))
    with torch.no_grad():
        net(torch.rand(1, 3, *size))
    levels = {'latent': 3, 'refinement': 0}
    for name, shape in seen.items():
        stage, number = name.split('.')[:2]
        level = levels.get(stage, int(number))
        assert shape == tuple(-(-side // 2**level) for side in size), name
    assert len(seen) == 2 * 5 + 3


def test_completing_an_odd_cell_reaches_no_further_than_a_convolution():
    """An odd map and the same with its last row and column repeated give equal cells but at that border."""
    down = Downsample(4)
    x = torch.rand(1, 4, 21, 15)
    odd, even = down(x), down(torch.nn.functional.pad(x, (0, 1, 0, 1), mode='replicate'))
    assert odd.shape == even.shape == (1, 8, 11, 8)
    torch.testing.assert_close(odd[..., :-1, :-1], even[..., :-1, :-1])


def test_channel_attention_equals_its_definition():
    attention = ChannelAttention(8, 2).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    q, k, v = (t.reshape(2, 2, 4, 30) for t in attention.qkv_dwconv(attention.qkv(x)).chunk(3, dim=1))
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    expected = ((q @ k.mT) * attention.temperature).softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.project_out(expected.reshape(x.shape)), rtol=1e-9, atol=1e-12)


def test_stages_choose_where_cea_layers_sit():
    def blocks(net):
        return {name.split('.')[0] for name, m in net.named_modules() if isinstance(m, CEABlock)}

    assert blocks(CEANet(**TINY)) == {'latent', 'decoder', 'refinement'}
    assert blocks(CEANet(**TINY, cea_stages=['encoder'])) == {'encoder'}
    assert blocks(CEANet(**TINY, cea_stages=[])) == set()


def test_every_parameter_gets_a_gradient():
    net = lively(CEANet(**TINY)).train()
    net(torch.rand(1, 3, 16, 24)).square().sum().backward()
    for name, p in net.named_parameters():
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
        ({'size': 'T', 'dim': 10, 'heads': [3, 2, 4, 8]}, 'dim must be a multiple of num_heads, got dim=10'),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CEANet(**options)


def test_a_fresh_network_is_the_identity():
    x = torch.rand(1, 3, 19, 22)
    assert torch.equal(CEANet(**TINY)(x), x)


def test_half_precision_does_not_overflow_on_large_pictures():
    attention = ChannelAttention(8, 2)
    qkv = torch.randn(1, 24, 300, 400) + 2  # products that sum to half a million
    exact, half = attention.statistics(qkv), attention.statistics(qkv.half())
    assert exact[0].max() > torch.finfo(torch.float16).max
    for one, other in zip(exact, half):
        torch.testing.assert_close(other, one, rtol=5e-3, atol=0)
