"""Layers in the hands of other programs: those that wrap, quantise, shard or recompute what modules compute with."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from cea_arch.layers import CEABlock, CEALayer, ConvBlock, HyperAdapter, inject_cea
from cea_arch.networks import CEAIR
from tests.networks.test_cea_ir import TINY

pytestmark = pytest.mark.usefixtures('one_thread')
BLOCKS = {
    'conv': lambda **o: ConvBlock(8, modulate=['mixer', 'mixed', 'ffn'], rank=2, **o),
    'attention': lambda **o: CEABlock(8, modulate=['q', 'k', 'v', 'ffn'], rank=2, **o),
}


def lively(net):
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return net.eval()


class LoRA(nn.Module):
    """A module with a low-rank change beside it, as peft puts it in the place of the module."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.weight.shape[1], rank, bias=False)
        self.up = nn.Linear(rank, base.weight.shape[0], bias=False)

    def change(self):
        return self.up.weight @ self.down.weight

    def forward(self, x):
        if isinstance(self.base_layer, nn.Conv2d):
            return self.base_layer(x) + torch.einsum('oi,bihw->bohw', self.change(), x)
        return self.base_layer(x) + x @ self.change().T

    def merged(self):
        with torch.no_grad():
            self.base_layer.weight += self.change().view_as(self.base_layer.weight)
        return self.base_layer


class OfParts(torch.Tensor):
    """A weight that is several tensors, as quantised and sharded ones are."""

    def __tensor_flatten__(self):
        raise NotImplementedError


def of_parts(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(OfParts), requires_grad=False)


@pytest.mark.parametrize('factors', ['dynamic', 'pooled'])
@pytest.mark.parametrize('kind', BLOCKS)
def test_every_module_of_an_adapter_is_called(kind, factors):
    block = lively(BLOCKS[kind](factors=factors))
    called = set()
    leaves = {name: m for name, m in block.named_modules() if not any(m.children()) and list(m.parameters())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    block(torch.rand(2, 8, 8, 8))
    projections = {'mixer_in', 'mixer_out', 'ffn_in', 'attn.qkv', 'ffn.project_in'}  # whose weights are read
    assert leaves.keys() - called <= projections


@pytest.mark.parametrize('kind', BLOCKS)
@pytest.mark.parametrize(
    'change',
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        lambda module: prune.l1_unstructured(module, 'weight', 0.5),
        of_parts,
    ],
    ids=['weight_norm', 'spectral_norm', 'parametrized', 'pruned', 'of parts'],
)
@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning', 'ignore:.*spectral_norm.*:FutureWarning')
def test_a_projection_computes_with_what_its_module_does(kind, change):
    block, x = lively(BLOCKS[kind]()), torch.rand(2, 8, 8, 8)
    plain = copy.deepcopy(block)
    names = [name for name, m in block.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    for name in names:
        change(block.get_submodule(name))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(('weight_g', 'original0')):
                parameter.mul_(1.5)  # what a weight that is kept from before would not tell
    found = block(x)
    with torch.no_grad():
        for name in names:
            module = block.get_submodule(name)
            plain.get_submodule(name).weight.copy_(module.weight)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), plain(x), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize('kind', BLOCKS)
def test_low_rank_changes_of_projections_act_learn_and_merge(kind):
    block, x = lively(BLOCKS[kind]()), torch.rand(2, 8, 8, 8)
    before = block(x)
    for name, module in list(block.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[2:] in ((), (1, 1)):
            parent, _, last = name.rpartition('.')
            holder = block.get_submodule(parent)
            wrapped = LoRA(module)
            if isinstance(holder, nn.ModuleDict):
                holder[last] = wrapped
            else:
                setattr(holder, last, wrapped)
    changed = block(x)
    assert (changed - before).abs().max() > 1e-3
    changed.square().mean().backward()
    changes = {name: p.grad for name, p in block.named_parameters() if '.down.' in name}
    assert [name for name, grad in changes.items() if grad is None or not grad.any()] == []
    for name, module in list(block.named_modules()):
        if isinstance(module, LoRA):
            parent, _, last = name.rpartition('.')
            holder = block.get_submodule(parent)
            if isinstance(holder, nn.ModuleDict):
                holder[last] = module.merged()
            else:
                setattr(holder, last, module.merged())
    torch.testing.assert_close(block(x), changed, rtol=1e-4, atol=1e-4)


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


def test_a_target_that_gets_a_low_rank_change_merges_right():
    host, x = Host(), torch.rand(2, 3, 8, 8)
    inject_cea(host, 'mix', rank=2)
    lively(host)
    host.mix = LoRA(host.mix)
    changed = host(x)
    host.mix = host.mix.merged()
    torch.testing.assert_close(host(x), changed, rtol=1e-5, atol=1e-5)


def test_a_target_that_has_a_low_rank_change_is_not_lost_silently():
    host, x = Host(), torch.rand(2, 3, 8, 8)
    host.mix = LoRA(host.mix)
    inject_cea(host, 'mix', rank=2)
    lively(host)(x)
    host.mix = host.mix.merged()
    with pytest.raises(ValueError, match='had a CEA layer was replaced by another one'):
        host(x)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_linear_layers_may_be_quantised():
    net, x = lively(CEAIR(**TINY)), torch.rand(1, 3, 24, 32)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear})
    assert 0 < (quantised(x) - net(x)).abs().max() < 0.05


@pytest.mark.parametrize('options', [{}, {'block': 'attention', 'modulate': ['q', 'k']}], ids=str)
def test_the_meta_device_tells_shapes(options):
    with torch.device('meta'):
        net = CEAIR(**TINY | options)
    assert net(torch.empty(2, 3, 17, 24, device='meta')).shape == (2, 3, 17, 24)


def test_a_layer_on_the_meta_device():
    layer = CEALayer(8, rank=2, layout='bnc').to('meta')
    x = torch.empty(2, 30, 8, device='meta')
    assert layer(x, x).shape == (2, 30, 8)
    assert [rows.shape for rows in HyperAdapter(8, 8, {'out': (0, 8)}, rank=2).to('meta')(x.mT[..., None])] == [
        (2, 2, 8),
        (2, 2, 8),
    ]
