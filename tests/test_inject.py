"""CEA layers in foreign networks: the contract on a network of our own, then on every architecture of BasicSR."""

import copy
import pickle

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.utils.hooks import RemovableHandle

from cea_arch.archs.with_cea_arch import AUTO_TARGETS
from cea_arch.errors import lookup
from cea_arch.layers import CEALayer, cea_parameters, cea_state_dict, inject_cea, remove_cea, survey_modules

SMALL_SR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2}
ARCHS = {
    'ECBSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': True, 'act_type': 'relu'}
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
    'VGGStyleDiscriminator': 'scores images of one size only; layouts are told apart by a second size',
}


def build(kind):
    torch.manual_seed(0)
    return lookup(ARCH_REGISTRY, kind, 'test')(**ARCHS[kind])


def options_of(kind, **more):
    return {'type': 'WithCEA', 'base': {'type': kind} | ARCHS[kind], 'rank': 4, 'width': 8} | more


def write_base(folder, kind, content=lambda state: {'params': state}):
    """Write an architecture's fresh weights; returns the path."""
    torch.save(content(build(kind).state_dict()), folder / f'{kind}.pth')
    return str(folder / f'{kind}.pth')


def awaken(net, steps=3):
    """Train: gamma leaves zero at the first step, the value path at the second, what lies below it at the third."""
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
    before = copy.deepcopy(net.state_dict())

    def outputs():
        """In training and in evaluation mode, from one state: a spectral norm moves with every pass."""
        loaded = net.load_state_dict(before, strict=False)
        torch.manual_seed(0)
        return loaded, [net.train(mode)(x).detach().clone() for mode in (True, False)]

    _, expected = outputs()
    assert len(names := inject_cea(net, AUTO_TARGETS[kind], rank=4, width=8)) >= 2
    loaded, injected = outputs()
    assert all(torch.equal(a, b) for a, b in zip(injected, expected))
    layers = cea_state_dict(net)
    assert [key for key in net.state_dict() if key not in layers] == list(before)
    assert {key.partition('.cea.')[0] for key in layers} == set(names)
    assert set(loaded.missing_keys) == layers.keys()
    assert not loaded.unexpected_keys
    assert remove_cea(net) == names
    assert list(net.state_dict()) == list(before)
    assert not any(module._forward_hooks for module in net.modules())
    _, removed = outputs()
    assert all(torch.equal(a, b) for a, b in zip(removed, expected))


@pytest.mark.parametrize('kind', ARCHS)
def test_trained_layers_survive_saving_copying_and_pickling(kind):
    net, other = build(kind), build(kind)
    for each in (net, other):
        inject_cea(each, AUTO_TARGETS[kind], rank=4, width=8)
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


class Mixer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.mix(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x.mean()


class Foreign(nn.Module):
    """All three layouts, a module under two names, and everything that cannot be a target."""

    def __init__(self, dim=6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1), nn.BatchNorm2d(dim))
        self.pixels = nn.ModuleList(Mixer(dim) for _ in range(2))
        self.tokens = Mixer(dim)
        self.again = self.tokens
        self.pair = Pair()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.grow = nn.Linear(dim, 2 * dim)
        self.act = nn.ReLU()
        self.windows = nn.Linear(dim, dim)
        self.unused = nn.Linear(dim, dim)
        self.head = nn.Conv2d(dim, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        y = x.permute(0, 2, 3, 1)
        for mixer in self.pixels:
            y = mixer(y)
        tokens = self.again(self.tokens(y.flatten(1, 2)))
        tokens = tokens + self.windows(tokens.unflatten(1, (-1, 4)).flatten(0, 1)).reshape(tokens.shape)
        self.act(self.grow(self.act(tokens)))
        x, _ = self.pair(tokens.mT.reshape(x.shape))
        return self.head(x + self.pool(x))


def test_layouts_are_found_and_identity_holds():
    net = Foreign().eval()
    x = torch.rand(2, 3, 9, 12)
    before = net(x)
    targets = ['stem.0', 'pixels.*', 'tokens', 'head']
    random = torch.get_rng_state()
    names = inject_cea(net, targets, rank={'pixels.1': 5, '**': 2}, width=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert names == ['stem.0', 'pixels.0', 'pixels.1', 'tokens', 'head']
    layouts = {name: net.get_submodule(name).cea.layout for name in names}
    assert layouts == dict(zip(names, ['bchw', 'bhwc', 'bhwc', 'bnc', 'bchw']))
    assert [len(net.get_submodule(name).cea.adapter.probes) for name in names] == [2, 2, 5, 2, 2]
    assert torch.equal(net(x), before)
    assert not net.stem[0].cea.training


def test_a_shared_module_has_one_layer():
    net = Foreign().eval()
    assert inject_cea(net, ['tokens', 'again'], rank=2, width=4) == ['tokens', 'again']
    layer = net.tokens.cea
    assert net.again.cea is layer
    assert len(net.tokens._forward_hooks) == 1
    assert len(cea_parameters(net)) == len(list(layer.parameters()))
    prefixes = {key.partition('.')[0] for key in cea_state_dict(net)}
    assert prefixes == {'tokens', 'again'}
    assert remove_cea(net) == ['tokens', 'again']
    assert not any(isinstance(module, CEALayer) for module in net.modules())


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('pixels.*', ['pixels.0', 'pixels.1']),
        ('pixels.*.mix', ['pixels.0.mix', 'pixels.1.mix']),
        ('**.mix', ['pixels.0.mix', 'pixels.1.mix', 'tokens.mix', 'again.mix']),
        ('**.head', ['head']),
        ('pixels.[1-9]', ['pixels.1']),
        ('pixels.**.mix', ['pixels.0.mix', 'pixels.1.mix']),
        ('?ead', ['head']),
    ],
)
def test_patterns_work_as_for_paths(pattern, names):
    assert inject_cea(Foreign(), pattern, rank=2, width=4) == names


def test_device_and_dtype_follow_the_target():
    net = Foreign().double()
    net.pixels[1].bfloat16()
    net.pixels[1].register_forward_pre_hook(lambda module, args: args[0].bfloat16())
    net.pixels[1].register_forward_hook(lambda module, args, output: output.bfloat16())
    net.tokens.register_forward_pre_hook(lambda module, args: args[0].double())
    inject_cea(net, 'pixels.*', rank=2, width=4)
    assert [mixer.cea.gamma.dtype for mixer in net.pixels] == [torch.float64, torch.bfloat16]
    assert net(torch.rand(1, 3, 8, 8, dtype=torch.double)).dtype == torch.double
    meta = Foreign().to('meta')
    inject_cea(meta, 'head', rank=2, width=4)
    assert meta.head.cea.gamma.device.type == 'meta'


MISTAKES = [
    ({'targets': 'pixel.*'}, "'pixel.*' matches no module. The nearest names are pixels.1, pixels.0"),
    ({'targets': []}, 'targets is empty'),
    ({'targets': ['head', 'stem']}, "target 'stem' is a container: name the modules inside it"),
    ({'targets': 'pixels'}, "target 'pixels' is a container"),
    ({'targets': 'pair'}, "target 'pair' returns a tuple, not a tensor"),
    ({'targets': 'pool'}, r"target 'pool' returns (2, 6, 1, 1) for two images and (1, 6, 1, 1) for one of twice"),
    ({'targets': 'windows'}, "target 'windows' returns (128, 4, 6)"),
    ({'targets': 'unused'}, "target 'unused' did not run"),
    ({'targets': 'act'}, "target 'act' runs several times, with different channels: (2, 256, 6) and (2, 256, 12)"),
    ({'rank': 0}, "target 'stem.0': rank must be at least 1, got 0"),
    ({'rank': 4}, "target 'head': rank must be at most its 3 channels, got 4"),
    ({'rank': 1.5}, "target 'stem.0': rank must be a whole number, got 1.5"),
    ({'rank': {'stem.*': 2}}, "target 'head': no pattern of rank matches it, they are stem.*"),
    ({'rank': {'hat': 2}}, "'hat' matches no module. The nearest names are head"),
    ({'num_heads': 3}, "target 'stem.0': width must be a multiple of num_heads"),
    ({'routing': 'soft'}, "target 'stem.0': routing must be one of"),
    ({'example': torch.rand(3, 8, 8)}, 'example must be an image (1, C, H, W), got (3, 8, 8)'),
    ({'example': torch.rand(1, 4, 8, 8)}, 'does not run on an example image ((1, 4, 8, 8)) and on one twice as large'),
]


@pytest.mark.parametrize(('change', 'message'), MISTAKES, ids=[str(*change.values()) for change, _ in MISTAKES])
def test_mistakes_name_the_module_and_change_nothing(change, message):
    net = Foreign()
    before = copy.deepcopy(net.state_dict())
    options = {'targets': ['stem.0', 'head'], 'rank': 2, 'width': 4} | change
    with pytest.raises((ValueError, TypeError)) as caught:
        inject_cea(net, **options)
    assert message in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or hasattr(module, 'cea') for module in net.modules())


def test_a_second_injection_and_a_taken_name_are_refused():
    net = Foreign()
    inject_cea(net, 'head', rank=2, width=4)
    with pytest.raises(ValueError, match="has CEA layers already, the first in 'head'"):
        inject_cea(net, 'tokens', rank=2, width=4)
    remove_cea(net)
    net.head.cea = nn.Identity()
    with pytest.raises(ValueError, match="'head' has something called cea already"):
        inject_cea(net, 'head', rank=2, width=4)
    assert remove_cea(net) == []
    assert isinstance(net.head.cea, nn.Identity)


@pytest.mark.parametrize(('size', 'channels'), [(56, 3), (16, 1)])
def test_images_are_tried_until_the_network_takes_one(size, channels):
    net = nn.Module()
    net.head = nn.Conv2d(channels, 4, 1)

    def forward(x):
        if x.shape[-1] % (size // 2):
            raise RuntimeError('windows do not fit')
        return net.head(x)

    net.forward = forward
    assert survey_modules(net)['head'].shape == (2, 4, size, size)
    size = 999
    with pytest.raises(ValueError, match=r'does not run on an example image .*windows do not fit Give an example'):
        survey_modules(net)


def test_survey_tells_all_modules():
    seen = survey_modules(Foreign())
    assert {name for name, module in seen.items() if not module.problem} == {
        *('stem.0', 'stem.1', 'pixels.0', 'pixels.1', 'pixels.0.mix', 'pixels.1.mix', 'tokens', 'tokens.mix'),
        *('again', 'again.mix', 'grow', 'head'),
    }
    assert (seen['pixels.0'].kind, seen['pixels.0'].shape, seen['pixels.0'].layout) == ('Mixer', (2, 16, 16, 6), 'bhwc')


def test_hooks_of_a_network_from_a_file_are_not_overwritten(monkeypatch):
    """Each process numbers its hooks anew; the next one must not take the number of one that came from a file."""
    net = Foreign()
    inject_cea(net, 'head', rank=2, width=4)
    content = pickle.dumps(net)
    monkeypatch.setattr(RemovableHandle, 'next_id', net.head.cea.hook_handle.id)
    loaded = pickle.loads(content)
    loaded.head.register_forward_hook(lambda module, args, output: None)
    assert len(loaded.head._forward_hooks) == 2
    assert remove_cea(loaded) == ['head']
    assert len(loaded.head._forward_hooks) == 1
