"""Where CEA layers go in a network of our own: layouts, patterns, shared modules, and what cannot be a target."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cea_arch.layers import CEALayer, cea_parameters, cea_state_dict, find_sites, inject_cea, remove_cea


class Mixer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class Pair(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.norm(x), x.mean()


class Foreign(nn.Module):
    """All three layouts, a module under two names, and everything that cannot be a target."""

    def __init__(self, dim=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1), nn.BatchNorm2d(dim))
        self.pixels = nn.ModuleList(Mixer(dim) for _ in range(2))
        self.tokens = Mixer(dim)
        self.again = self.tokens
        self.pair = Pair(dim)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.strided = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.shrink = nn.Conv2d(dim, dim, 3)
        self.grow = nn.Linear(dim, 2 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.act = nn.ReLU()
        self.windows = nn.Linear(dim, dim)
        self.swapped = nn.Linear(dim, dim)
        self.head = nn.Conv2d(dim, 4, 1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        y = x.permute(0, 2, 3, 1)
        for mixer in self.pixels:
            y = mixer(y)
        tokens = self.again(self.tokens(y.flatten(1, 2)))
        tokens = tokens + self.windows(tokens.unflatten(1, (-1, 4)).flatten(0, 1)).reshape(tokens.shape)
        self.act(self.grow(tokens))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        tokens = tokens + q * k.softmax(1) * v
        x, _ = self.pair(tokens.mT.reshape(x.shape))
        x = x + self.pool(x) + self.strided(x).mean() + self.shrink(x).mean()
        return self.last(self.head(x))


def test_sites_and_layouts_are_told_by_the_layers_and_the_output_stays():
    net = Foreign().eval()
    x = torch.rand(2, 3, 9, 12)
    before = net(x)
    targets = ['stem.*', 'pixels.*', 'pixels.*.mix', 'tokens', 'grow', 'qkv:qv', 'head']
    random = torch.get_rng_state()
    names = inject_cea(net, targets, rank={'pixels.1': 4, '**': 2}, width=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert names == [
        *('stem.0', 'stem.1', 'pixels.0', 'pixels.0.mix', 'pixels.1', 'pixels.1.mix', 'tokens', 'grow', 'qkv', 'head')
    ]
    layers = {name: net.get_submodule(name).cea for name in names}
    specs = {name: layer.adapter.spec for name, layer in layers.items()}
    assert [layer.layout for layer in layers.values()] == ['bchw'] * 2 + ['bnc'] * 7 + ['bchw']
    assert [(spec.dim, spec.dim_out) for spec in specs.values()] == [
        *((3, 8), (8, 8), (8, 8), (8, 8), (8, 8), (8, 8), (8, 8), (8, 16), (8, 24), (8, 4))
    ]
    assert [spec.rank for spec in specs.values()] == [2, 2, 2, 2, 4, 2, 2, 2, 2, 2]
    assert specs['qkv'].parts == {'q': (0, 8), 'v': (16, 24)}
    assert torch.equal(net(x), before)
    assert not net.stem[0].cea.training


def test_the_residual_is_made_of_the_targets_input_in_the_columns_that_are_named():
    net = Foreign().eval()
    inject_cea(net, ['qkv:q', 'head'], rank=2)
    seen = {}
    for name in ('qkv', 'head'):
        module = net.get_submodule(name)
        nn.init.normal_(module.cea.gamma)
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    net(torch.rand(2, 3, 8, 8))
    for name, (x, out) in seen.items():
        module = net.get_submodule(name)
        layer = module.cea
        plain = (
            torch.nn.functional.linear(x, module.weight, module.bias)
            if name == 'qkv'
            else module._conv_forward(x, module.weight, module.bias)
        )
        bases, directions = layer.adapter(layer.plane(x))
        tokens = x if name == 'qkv' else x.flatten(2).mT
        residual = (tokens @ bases.mT) @ directions / 2 * layer.gamma * (2 * 8) ** 0.5
        residual = residual if name == 'qkv' else residual.mT.reshape(out.shape)
        torch.testing.assert_close(out, plain + residual)
        assert (out - plain).abs().max() > 1e-3
    assert torch.equal(
        seen['qkv'][1][..., 8:], torch.nn.functional.linear(seen['qkv'][0], net.qkv.weight, net.qkv.bias)[..., 8:]
    )


def test_a_module_that_is_called_by_keyword_is_adapted():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = Mixer(8)

        def forward(self, x):
            return self.mix(x=x)

    net = Host()
    x = torch.rand(2, 5, 8)
    before = net(x)
    inject_cea(net, 'mix', rank=2)
    assert torch.equal(net(x), before)
    nn.init.ones_(net.mix.cea.gamma)
    assert not torch.equal(net(x), before)


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('windows', 'must see 2 images as its batch, Linear sees 32, such as windows or frames: take the block'),
        ('pair', 'must take and return a tensor; Pair takes and returns Tensor and tuple'),
    ],
)
def test_what_only_a_run_can_tell_is_named_by_the_first_run(target, message):
    net = Foreign()
    inject_cea(net, target, rank=2)
    with pytest.raises(ValueError, match=message):
        net(torch.rand(2, 3, 8, 8))


def test_a_part_of_the_network_may_be_run_alone():
    net = Foreign().eval()
    inject_cea(net, 'stem.1', rank=2)
    net(torch.rand(2, 3, 8, 8))
    assert net.stem(torch.rand(5, 3, 8, 8)).shape == (5, 8, 8, 8)


def test_a_sequential_is_adapted_as_a_whole():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1)))
    x = torch.rand(2, 3, 8, 8)
    features, plain = net[0](x), net(x)
    inject_cea(net, '1', rank=2)
    assert torch.equal(net(x), plain)
    layer = net[1].cea
    nn.init.ones_(layer.gamma)
    torch.testing.assert_close(net(x), layer(features, plain))
    assert not torch.allclose(net(x), plain, atol=0.1)


def test_a_shared_module_has_one_layer():
    net = Foreign().eval()
    assert inject_cea(net, ['tokens', 'again'], rank=2) == ['tokens', 'again']
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
    assert inject_cea(Foreign(), pattern, rank=2) == names


def test_device_and_dtype_follow_the_target():
    net = Foreign().double()
    net.pixels[1].bfloat16()
    net.pixels[1].register_forward_pre_hook(lambda module, args: args[0].bfloat16())
    net.tokens.register_forward_pre_hook(lambda module, args: args[0].double())
    inject_cea(net, 'pixels.*', rank=2)
    assert [mixer.cea.gamma.dtype for mixer in net.pixels] == [torch.float64, torch.bfloat16]
    assert net(torch.rand(1, 3, 8, 8, dtype=torch.double)).dtype == torch.double
    meta = Foreign().to('meta')
    inject_cea(meta, 'head', rank=2)
    assert meta.head.cea.gamma.device.type == 'meta'


MISTAKES = [
    ({'targets': 'pixel.*'}, "'pixel.*' matches no module. The nearest names are pixels.1, pixels.0"),
    ({'targets': []}, 'targets is empty'),
    ({'targets': ['head', 'pixels']}, "target 'pixels' is a container that is never called: name the modules inside"),
    ({'targets': 'strided'}, "target 'strided' changes the size: a convolution in it has a stride, or pads"),
    ({'targets': 'shrink'}, "target 'shrink' changes the size"),
    ({'targets': 'pool'}, "target 'pool' has no linear layer, convolution or norm that tells its channels"),
    ({'targets': 'act'}, "target 'act' has no linear layer, convolution or norm that tells its channels"),
    ({'targets': 'head:q'}, "target 'head': parts may be of qkv, three alike, got 'q' of 4 channels"),
    ({'targets': 'qkv:qx'}, "target 'qkv': parts may be of qkv, three alike, got 'qx' of 24 channels"),
    ({'rank': 0}, "target 'grow': rank must be at least 1, got 0"),
    ({'rank': 5}, "target 'head': rank must be at most its 4 channels, got 5"),
    ({'rank': 1.5}, "target 'grow': rank must be a whole number, got 1.5"),
    ({'rank': {'grow': 2}}, "target 'head': no pattern of rank matches it, they are grow"),
    ({'rank': {'hat': 2}}, "'hat' matches no module. The nearest names are head"),
    ({'heads': 3}, "target 'grow': width must be a multiple of heads, got width=8 and heads=3"),
    ({'routing': 'soft'}, "target 'grow': routing must be one of"),
]


@pytest.mark.parametrize(('change', 'message'), MISTAKES, ids=[str(*change.values()) for change, _ in MISTAKES])
def test_mistakes_name_the_module_and_change_nothing(change, message):
    net = Foreign()
    before = copy.deepcopy(net.state_dict())
    options = {'targets': ['grow', 'head'], 'rank': 2} | change
    with pytest.raises((ValueError, TypeError)) as caught:
        inject_cea(net, **options)
    assert message in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or hasattr(module, 'cea') for module in net.modules())


def test_a_second_injection_and_a_taken_name_are_refused():
    net = Foreign()
    inject_cea(net, 'head', rank=2)
    with pytest.raises(ValueError, match="has CEA layers already, the first in 'head'"):
        inject_cea(net, 'tokens', rank=2)
    remove_cea(net)
    net.head.cea = nn.Identity()
    with pytest.raises(ValueError, match="'head' has something called cea already"):
        inject_cea(net, 'head', rank=2)
    assert remove_cea(net) == []
    assert isinstance(net.head.cea, nn.Identity)


def test_sites_are_told_of_all_modules():
    sites = find_sites(Foreign())
    assert {name for name, site in sites.items() if site.problem} == {'pixels', 'pool', 'strided', 'shrink', 'act'}
    site = sites['pixels.0']
    assert (site.kind, site.dim, site.dim_out, site.layout) == ('Mixer', 8, 8, 'bnc')
    assert (sites['stem'].dim, sites['stem'].dim_out, sites['stem'].layout) == (3, 8, 'bchw')


def test_hooks_of_a_network_from_a_file_are_not_overwritten(monkeypatch):
    """Each process numbers its hooks anew; the next one must not take the number of one that came from a file."""
    net = Foreign()
    inject_cea(net, 'head', rank=2)
    content = pickle.dumps(net)
    monkeypatch.setattr(RemovableHandle, 'next_id', net.head.cea.hook_handle.id)
    loaded = pickle.loads(content)
    loaded.head.register_forward_hook(lambda module, args, output: None)
    assert len(loaded.head._forward_hooks) == 2
    assert remove_cea(loaded) == ['head']
    assert len(loaded.head._forward_hooks) == 1
