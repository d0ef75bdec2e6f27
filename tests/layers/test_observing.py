"""What layers do, seen from outside; and networks with layers silenced."""

import pytest
import torch
from torch import nn

from cea_arch.layers import CEALayer, inject_cea, remove_cea
from cea_arch.layers.observing import keeping, observing, silenced, sites
from cea_arch.networks import CEAIR
from tests.networks.test_cea_ir import TINY, lively

pytestmark = pytest.mark.usefixtures('one_thread')


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


def host(**options):
    net = Host()
    inject_cea(net, 'mix', rank=3, **options)
    nn.init.normal_(net.mix.cea.gamma)
    return net.eval()


@pytest.mark.parametrize('routing', ['signed', 'topk'])
def test_a_host_is_seen_and_unchanged(routing):
    net, x = host(routing=routing), torch.rand(2, 3, 8, 10)
    whole = net(x)
    with torch.no_grad(), observing(net) as seen:
        assert torch.equal(net(x), whole)
    assert list(seen) == ['mix.cea']
    (found,) = seen['mix.cea']
    features = net.first(x)
    with silenced(net):
        plain = net.mix(features)
        silent = net(x)
    added = net.mix(features) - plain
    assert found.size == pytest.approx((added.norm() / plain.norm()).item(), rel=1e-4)
    affinity = features[0].flatten(1).T @ found.bases.T
    if routing == 'topk':
        values, places = affinity.topk(2, -1)
        affinity = torch.zeros_like(affinity).scatter(1, places, values.softmax(-1))
    scale = 1 if routing == 'topk' else 3
    torch.testing.assert_close(
        (affinity @ found.directions / scale).T.reshape(8, 8, 10), added[0], rtol=1e-4, atol=1e-5
    )
    assert found.shares.sum() == pytest.approx(1)
    energy = affinity.square().sum(0) * found.directions.square().sum(1)
    torch.testing.assert_close(found.shares, energy / energy.sum())
    remove_cea(net)
    torch.testing.assert_close(net(x), silent)
    assert not torch.allclose(silent, whole, atol=1e-3)


@pytest.mark.parametrize('options', [{}, {'block': 'attention', 'modulate': ['q', 'v', 'ffn']}], ids=str)
def test_layers_of_our_network_are_silenced_one_by_one(options):
    torch.manual_seed(0)
    net, x = lively(CEAIR(**TINY | options)), torch.rand(1, 3, 24, 32)
    names = list(sites(net))
    with torch.no_grad():
        whole = net(x)
        with observing(net) as seen:
            torch.testing.assert_close(net(x), whole, rtol=1e-4, atol=1e-5)
        assert [name for name in names if len(seen[name]) != 1] == []
        with silenced(net, names[:1]):
            one = net(x)
        with silenced(net):
            none = net(x)
        assert torch.equal(net(x), whole)
    assert len({t.sum().item() for t in (whole, one, none)}) == 3
    with silenced(net), pytest.raises(KeyError), silenced(net, ['nothing']):
        pass
    assert not any('project' in vars(net.get_submodule(name)) for name in names)


def test_attention_is_what_the_statistics_are_made_of():
    factors = host().mix.cea.adapter.factors
    x = torch.rand(2, 8, 9, 6)
    weights = factors.attention(x)
    assert weights.shape == (2, 2, 3, 5 * 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3))
    _, tokens = factors.sought(x)
    (sums,) = factors.statistics(x)
    torch.testing.assert_close((weights.flatten(1, 2) @ tokens), sums.mean(1))


def test_a_layer_alone_is_a_site():
    layer = CEALayer(8, rank=2, layout='bhwc')
    assert list(sites(nn.ModuleDict({'a': layer}))) == ['a']
    x = torch.rand(1, 4, 5, 8)
    nn.init.ones_(layer.gamma)
    with torch.no_grad(), observing(nn.ModuleDict({'a': layer})) as seen:
        layer(x, x)
    assert seen['a'][0].bases.shape == (2, 8)


@pytest.mark.parametrize('options', [{}, {'block': 'attention', 'modulate': ['q', 'v']}, {'routing': 'topk'}], ids=str)
def test_components_are_dropped_where_they_add_least(options):
    torch.manual_seed(0)
    net, x = lively(CEAIR(**TINY | options)), torch.rand(2, 3, 24, 32)
    name, site = next(iter(sites(net).items()))
    rank = site.spec.rank
    with torch.no_grad():
        whole = net(x)
        with keeping(net, rank):
            torch.testing.assert_close(net(x), whole)
        with observing(net) as before:
            net(x)
        with keeping(net, 1), observing(net) as seen:
            net(x)
        strongest = before[name][0].shares.unflatten(0, (-1, rank)).argmax(-1)
        kept = seen[name][0].directions.norm(dim=-1).unflatten(0, (-1, rank)) > 0
        assert kept.sum(-1).tolist() == [1] * len(kept)
        assert torch.equal(kept.int().argmax(-1), strongest)
        order = {n: torch.arange(len(found[0].shares)).flip(0) for n, found in before.items()}
        with keeping(net, 1, order), observing(net) as seen:
            net(x)
        assert (seen[name][0].directions.norm(dim=-1) > 0).nonzero().flatten().tolist()[-1] == len(order[name]) - 1
    assert 'forward' not in vars(site)


def test_a_residual_of_lower_rank_is_the_nearest_one():
    torch.manual_seed(0)
    net, x = lively(CEAIR(**TINY)), torch.rand(1, 3, 24, 32)
    name, site = next(iter(sites(net).items()))
    with torch.no_grad():
        whole = net(x)
        with observing(net) as full:
            net(x)
        with keeping(net, site.spec.rank, merged=True):
            torch.testing.assert_close(net(x), whole, rtol=1e-3, atol=1e-4)
        with keeping(net, 2, merged=True), observing(net) as seen:
            net(x)
    product, less = (found[name][0].bases.mT @ found[name][0].directions for found in (full, seen))
    values = torch.linalg.svdvals(product)
    assert torch.linalg.matrix_rank(less, rtol=1e-3) == 2
    torch.testing.assert_close((product - less).square().sum(), values[2:].square().sum(), rtol=1e-3, atol=1e-6)
