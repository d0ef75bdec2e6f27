"""CEA layers in every architecture of BasicSR."""

import copy
import pickle

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from cea_arch.errors import lookup
from cea_arch.layers import cea_parameters, cea_state_dict, inject_cea, remove_cea
from cea_arch.networks.with_cea import AUTO_TARGETS

SMALL_SR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2}
ARCHS = {
    'ECBSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': True, 'act_type': 'prelu'}
    | {'scale': 2},
    'EDSR': SMALL_SR | {'upscale': 2},
    'MSRResNet': SMALL_SR | {'upscale': 3},
    'RCAN': SMALL_SR | {'num_group': 2, 'squeeze_factor': 4, 'upscale': 4},
    'RIDNet': {'in_channels': 3, 'mid_channels': 16, 'out_channels': 3, 'num_block': 2},
    'RRDBNet': SMALL_SR | {'num_grow_ch': 4, 'scale': 2},
    'SRVGGNetCompact': {'num_feat': 8, 'num_conv': 2, 'upscale': 2},
    'SwinIR': {'embed_dim': 8, 'depths': [2, 2], 'num_heads': [2, 2], 'window_size': 8, 'img_size': 16, 'upscale': 1},
    'UNetDiscriminatorSN': {'num_in_ch': 3, 'num_feat': 8},
}
VIDEO = 'takes several frames'
FACES = 'for aligned faces'
EXCLUDED = {
    'BasicVSR': VIDEO,
    'BasicVSRPlusPlus': VIDEO,
    'DUF': VIDEO,
    'EDVR': VIDEO,
    'IconVSR': VIDEO,
    'SpyNet': VIDEO,
    'TOFlow': VIDEO,
    'DFDNet': FACES,
    'HiFaceGAN': FACES,
    'HiFaceGANDiscriminator': FACES,
    'StyleGAN2Discriminator': FACES,
    'StyleGAN2Generator': FACES,
    'VGGFeatureExtractor': 'features for losses, of weights that it downloads',
    'VGGStyleDiscriminator': 'scores images of one size only',
}


def build(kind):
    torch.manual_seed(0)
    return lookup(ARCH_REGISTRY, kind, 'test')(**ARCHS[kind])


def options_of(kind, **more):
    return {'type': 'WithCEA', 'base': {'type': kind} | ARCHS[kind], 'rank': 4} | more


def write_base(folder, kind, content=lambda state: {'params': state}):
    """Write an architecture's fresh weights; returns the path."""
    torch.save(content(build(kind).state_dict()), folder / f'{kind}.pth')
    return str(folder / f'{kind}.pth')


def hooks_of(net):
    """How many hooks each module has; a spectral norm is one."""
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()]


def awaken(net, steps=3):
    """Train: gamma leaves zero at the first step, the rest of a layer at the second."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.rand(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()


def test_every_architecture_of_basicsr_is_covered():
    shipped = {k.removesuffix('_basicsr') for k, cls in ARCH_REGISTRY if cls.__module__.startswith('basicsr.')}
    assert shipped == ARCHS.keys() | EXCLUDED.keys()
    assert AUTO_TARGETS.keys() == ARCHS.keys()


@pytest.mark.parametrize('kind', ARCHS)
def test_injection_changes_no_output_no_key_and_can_be_undone(kind):
    net = build(kind)
    x = torch.rand(2, 3, 16, 24)
    before, hooks = copy.deepcopy(net.state_dict()), hooks_of(net)

    def outputs():
        """In training and in evaluation mode, from one state: a spectral norm moves with every pass."""
        loaded = net.load_state_dict(before, strict=False)
        torch.manual_seed(0)
        return loaded, [net.train(mode)(x).detach().clone() for mode in (True, False)]

    _, expected = outputs()
    assert len(names := inject_cea(net, AUTO_TARGETS[kind], rank=4)) >= 2
    loaded, injected = outputs()
    assert all(torch.equal(a, b) for a, b in zip(injected, expected))
    layers = cea_state_dict(net)
    assert [key for key in net.state_dict() if key not in layers] == list(before)
    assert {key.partition('.cea.')[0] for key in layers} == set(names)
    assert set(loaded.missing_keys) == layers.keys()
    assert not loaded.unexpected_keys
    assert remove_cea(net) == names
    assert list(net.state_dict()) == list(before)
    assert hooks_of(net) == hooks
    _, removed = outputs()
    assert all(torch.equal(a, b) for a, b in zip(removed, expected))


@pytest.mark.parametrize('kind', ARCHS)
def test_trained_layers_survive_saving_copying_and_pickling(kind):
    net, other = build(kind), build(kind)
    for each in (net, other):
        inject_cea(each, AUTO_TARGETS[kind], rank=4)
    net.requires_grad_(False)
    for parameter in cea_parameters(net):
        parameter.requires_grad_(True)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    awaken(net)
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == cea_state_dict(net).keys()
    x = torch.rand(1, 3, 16, 16)
    expected = net(x).detach()
    with torch.no_grad():
        assert not torch.equal(other.eval()(x), expected)
        other.load_state_dict(net.state_dict())
        for copied in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert torch.equal(copied(x), expected)


def test_layers_of_a_part_are_taken_out_of_the_whole():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 1))
    x = torch.rand(1, 8, 4, 4)
    plain = net(x)
    for _ in range(2):
        inject_cea(net[0], '0', rank=2)
        assert remove_cea(net) == ['0.0']
        torch.testing.assert_close(net(x), plain)
