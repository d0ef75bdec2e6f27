import pytest
import torch
from basicsr.archs import build_network
from torch.utils.flop_counter import FlopCounterMode

import cea_arch.archs.ceanet_arch as ceanet
from cea_arch.archs.ceanet_arch import CEANet
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.layers.transformer import ChannelAttention

TINY = {'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'heads': [1, 1, 2, 4]}
BUDGETS = {'base': (25.3e6, 77e9), 'S': (5.9e6, 11.6e9), 'T': (1e6, 3e9)}  # parameters, multiply-accumulates at 256 x 256


def lively(net):
    """Make every CEA layer act, as after training."""
    with torch.no_grad():
        for layer in (m for m in net.modules() if isinstance(m, CEALayer)):
            layer.gamma.normal_()
            layer.adapter.to_out.weight.normal_()
    return net.eval()


@pytest.mark.parametrize('name', ['CEANet', 'CEABlock', 'CEALayer'])
def test_registered(name):
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


def test_padding_stays_out_of_the_conditioning(monkeypatch):
    """Whatever is padded, and however far, only pixels near the border may notice: nothing reaches the others.

    Convolutions carry a change of the padding inwards by their reach; conditioning and channel attention would carry it
    everywhere. So the upper left of the image must come out the same, to rounding.
    """
    net = lively(CEANet(**TINY)).double()
    x = torch.rand(1, 3, 203, 211, dtype=torch.float64)
    pad = ceanet.pad_to_multiple

    def pad_wildly(img, multiple):
        padded = pad(img, 2 * multiple)
        padded[..., 203:, :] = 50
        padded[..., :, 211:] = -50
        return padded

    with torch.no_grad():
        usual = net(x)
        monkeypatch.setattr(ceanet, 'pad_to_multiple', pad_wildly)
        wild = net(x)
        monkeypatch.setattr(ceanet, 'image_masks', lambda height, width, padded: [None] * ceanet.NUM_LEVELS)
        unmasked = net(x)
    assert (usual - wild)[..., -8:, -8:].abs().max() > 1e-3  # the padding was there
    assert (usual - wild)[..., :64, :64].abs().max() < 1e-9
    assert (usual - unmasked)[..., :64, :64].abs().max() > 1e-6  # and would have been noticed


def test_masked_pixels_do_not_enter_channel_attention():
    attention = ChannelAttention(8, 2)
    x = torch.randn(1, 8, 16, 16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:10, :10] = True
    polluted = torch.where(mask, x, 100 * torch.randn_like(x))
    inside = (slice(None), slice(None), slice(0, 9), slice(0, 9))  # one pixel from the mask's border: 3x3 convolutions
    torch.testing.assert_close(attention.qkv_dwconv(attention.qkv(x))[inside], attention.qkv_dwconv(attention.qkv(polluted))[inside])
    x[..., 9:, :] = polluted[..., 9:, :] = 0  # the same features next to the border
    x[..., :, 9:] = polluted[..., :, 9:] = 0
    assert attention(x, mask).isfinite().all()


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
        ({'size': 'T', 'cea_stages': ['middle']}, "cea_stages may hold encoder, latent, decoder, refinement, got 'middle'"),
        ({'size': 'T', 'dim': 10, 'heads': [3, 2, 4, 8]}, 'dim must be a multiple of num_heads, got dim=10'),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CEANet(**options)
