"""The properties of CEA's equations, beside a twin that is written out image by image, head by head, query by query."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cea_arch.layers import CEALayer, HyperAdapter, assemble, merge, rank_norm
from cea_arch.layers.cea import ROUTINGS, top_k
from cea_arch.layers.hyper_adapter import FACTORS
from cea_arch.layers.tokens import LAYOUTS

DIM, WIDE, RANK = 12, 20, 4
PARTS = {'q': (0, 8), 'v': (12, 20)}  # four columns between them are not adapted
SIZE = (5, 7)
FIRST_OF = {'bchw': (2, DIM, *SIZE), 'bhwc': (2, *SIZE, DIM), 'bnc': (2, 35, DIM)}


def randomise(module: nn.Module) -> nn.Module:
    """Put every parameter off its start, so that no property holds by a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def make_adapter(**options) -> HyperAdapter:
    return randomise(HyperAdapter(DIM, WIDE, PARTS, **{'rank': RANK} | options).double())


def make_layer(**options) -> CEALayer:
    return randomise(CEALayer(DIM, WIDE, **{'rank': RANK} | options).double())


def features(layout: str = 'bchw', dim: int = DIM) -> torch.Tensor:
    shape = [dim if length == DIM else length for length in FIRST_OF[layout]]
    return torch.randn(shape, dtype=torch.float64)


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def condensed(condense, plane):
    """Section 3.3 by sums: a strided depthwise 3x3 with a border of zeros, then a product with channels."""
    channels, height, width = plane.shape
    padded = torch.zeros(channels, height + 2, width + 2, dtype=plane.dtype)
    padded[:, 1:-1, 1:-1] = plane
    cells = []
    for i in range(0, height, condense.stride):
        for j in range(0, width, condense.stride):
            window = padded[:, i : i + 3, j : j + 3]
            cells.append((window * condense.depthwise.weight[:, 0]).sum((1, 2)) @ condense.pointwise.weight.T)
    return torch.stack(cells)


def naive_factors(adapter: HyperAdapter, plane: torch.Tensor):
    """Eq. 4 to 6 of one image (C, H, W): by target, A (r, d_in) and B (r, d_target)."""
    dynamic = adapter.factors
    context = condensed(dynamic.condense, plane) if dynamic.condense is not None else plane.flatten(1).T
    context = layer_norm(context, dynamic.norm_context.weight, dynamic.norm_context.bias)
    per_head = dynamic.queries.shape[-1] // dynamic.num_heads
    keys, values = context @ dynamic.to_k.T, context @ dynamic.to_v.T
    states = []
    for queries in dynamic.queries:  # R_A, R_B
        rows = []
        for query in queries:
            normed = layer_norm(query, dynamic.norm_queries.weight, dynamic.norm_queries.bias) @ dynamic.to_q.T
            heads = []
            for h in range(dynamic.num_heads):
                part = slice(h * per_head, (h + 1) * per_head)
                logits = torch.stack([normed[part] @ key[part] / math.sqrt(per_head) for key in keys])
                weights = torch.exp(logits - logits.max())
                heads.append((weights / weights.sum()) @ values[:, part])
            rows.append(query + torch.cat(heads))
        states.append(torch.stack(rows))
    found = {}
    for name in adapter.spec.parts:
        rows = []
        for head, state in ((dynamic.heads.to_bases[name], states[0]), (dynamic.heads.to_directions[name], states[1])):
            z = state @ head.weight.T + head.bias
            if adapter.spec.rank_norm:
                z = torch.stack([row / (row.square().sum().sqrt() + 1e-6) for row in z])
            else:
                z = z / math.sqrt(z.shape[-1])
            rows.append(z)
        found[name] = tuple(rows)
    return found


def naive_residual(adapter: HyperAdapter, plane: torch.Tensor) -> torch.Tensor:
    """Eq. 2 and 3 of one image: ``(N, d_out)``, component by component."""
    tokens = plane.flatten(1).T
    out = torch.zeros(len(tokens), adapter.spec.dim_out, dtype=plane.dtype)
    for name, (bases, directions) in naive_factors(adapter, plane).items():
        start, stop = adapter.spec.parts[name]
        for a, b in zip(bases, directions, strict=True):
            out[:, start:stop] += torch.outer(tokens @ a, b) / adapter.spec.rank
    return out


def gradients(out, weights, inputs):
    return torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize('options', [{}, {'width': 8, 'heads': 2, 'stride': 4}, {'rank_norm': False}], ids=str)
def test_values_and_gradients_are_those_of_the_written_out_equations(options):
    adapter = make_adapter(**options)
    projection = nn.Conv2d(DIM, WIDE, 1, bias=False).double()
    x = features().requires_grad_()
    weights = features(dim=WIDE)
    inputs = [x, projection.weight, *adapter.parameters()]
    residual = torch.stack([naive_residual(adapter, plane) for plane in x])
    expected = projection(x) + residual.mT.reshape(weights.shape)
    merged = adapter.project(projection, x)
    assembled = adapter.project(nn.Sequential(projection), x)  # no plain convolution, so nothing is merged
    for out in (merged, assembled):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
        for got, want in zip(gradients(out, weights, inputs), gradients(expected, weights, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_hosts_layer_is_the_written_out_residual_times_gamma(layout):
    layer = make_layer(layout=layout)
    x, y = features(layout), features(layout, WIDE)
    out = layer(x, y)
    residual = torch.stack([naive_residual(layer.adapter, plane) for plane in layer.plane(x)])
    residual = residual * layer.gamma * math.sqrt(RANK * DIM)
    residual = residual.mT.reshape(y.shape) if layout == 'bchw' else residual.reshape(y.shape)
    torch.testing.assert_close(out, y + residual, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('factors', FACTORS)
@pytest.mark.parametrize('routing', ROUTINGS)
def test_a_fresh_hosts_layer_changes_nothing(layout, factors, routing):
    y = features(layout, WIDE).float()
    layer = CEALayer(DIM, WIDE, rank=RANK, factors=factors, routing=routing, layout=layout)
    assert torch.equal(layer(features(layout).float(), y), y)


@pytest.mark.parametrize('factors', FACTORS)
def test_the_residual_is_no_larger_than_the_token_and_has_at_most_the_rank(factors):
    adapter = randomise(HyperAdapter(DIM, WIDE, {'q': (0, WIDE)}, rank=RANK, factors=factors).double())
    x = torch.randn(1, DIM, 8, 9, dtype=torch.float64)
    tokens = x[0].flatten(1).T
    residual = assemble(torch.zeros(1, 72, WIDE).double(), tokens[None], adapter(x), RANK)[0]
    assert (residual.norm(dim=1) <= tokens.norm(dim=1)).all()
    assert (residual.norm(dim=1) > 0).all()
    singular = torch.linalg.svdvals(residual)
    assert singular[RANK - 1] > 1e-6 * singular[0]
    assert singular[RANK] < 1e-10 * singular[0]


def test_affinities_take_both_signs():
    adapter = make_adapter()
    x = torch.randn(1, DIM, 20, 25, dtype=torch.float64)
    for target, affinity in adapter.affinities(x, adapter(x)).items():
        assert affinity.shape == (1, RANK, 20, 25), target
        assert (affinity > 0.1).flatten(2).any(-1).all()
        assert (affinity < -0.1).flatten(2).any(-1).all()


@pytest.mark.parametrize('factors', FACTORS)
def test_rows_have_unit_length_for_each_image_and_each_target(factors):
    bases, directions = make_adapter(factors=factors)(features())
    assert bases.shape == (2, 2 * RANK, DIM)
    assert directions.shape == (2, 2 * RANK, WIDE)
    for rows in (bases, directions):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 2 * RANK).double(), rtol=1e-4, atol=0)
    assert not directions[:, :RANK, 8:].any()
    assert not directions[:, RANK:, :12].any()


@pytest.mark.parametrize('factors', ['dynamic', 'pooled'])
def test_factors_depend_on_the_image_and_not_on_its_batch(factors):
    adapter = make_adapter(factors=factors)
    x = features()
    for both, alone in zip(adapter(x), adapter(x[1:]), strict=True):
        assert (both[0] - both[1]).abs().max() > 1e-2
        torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)


def test_static_factors_do_not_depend_on_the_image():
    first, second = make_adapter(factors='static')(features())[0]
    assert torch.equal(first, second)


def test_assembling_is_attention_without_softmax_and_linear_in_its_tokens():
    tokens, more = torch.randn(2, 2, 35, DIM, dtype=torch.float64)
    factors = torch.randn(2, RANK, DIM, dtype=torch.float64), torch.randn(2, RANK, WIDE, dtype=torch.float64)
    nothing = torch.zeros(2, 35, WIDE, dtype=torch.float64)
    attention = (tokens @ factors[0].mT) @ factors[1] / RANK  # queries X, keys A, values B
    torch.testing.assert_close(assemble(nothing, tokens, factors, RANK), attention, rtol=1e-10, atol=1e-12)
    both = assemble(nothing, 2 * tokens - 3 * more, factors, RANK)
    apart = 2 * assemble(nothing, tokens, factors, RANK) - 3 * assemble(nothing, more, factors, RANK)
    torch.testing.assert_close(both, apart, rtol=1e-10, atol=1e-11)


def test_merging_is_assembling():
    tokens = torch.randn(3, 35, DIM, dtype=torch.float64)
    factors = tuple(torch.randn(3, 2 * RANK, dim, dtype=torch.float64) for dim in (DIM, WIDE))
    weight = torch.randn(WIDE, DIM, dtype=torch.float64)
    assembled = assemble(tokens @ weight.T, tokens, factors, RANK)
    torch.testing.assert_close(tokens @ merge(weight, factors, RANK).mT, assembled, rtol=1e-10, atol=1e-12)
    # the spectral norm of the residual's own weight is at most 1, for rows of unit length
    residual = merge(torch.zeros_like(weight), tuple(rank_norm(rows) for rows in factors), 2 * RANK)
    assert torch.linalg.matrix_norm(residual, 2).max() <= 1


@pytest.mark.parametrize('change', ['parametrised', 'another class'])
def test_what_is_no_plain_convolution_is_not_read_past(change):
    """Its own forward is used: weights that are quantised, or carry LoRA, are not what ``weight`` says."""
    adapter, projection = make_adapter(), nn.Conv2d(DIM, WIDE, 1).double()
    x = features()
    expected = adapter.project(projection, x) + projection(x) - projection.bias[:, None, None]
    if change == 'parametrised':

        class Doubled(nn.Module):
            def forward(self, weight):
                return 2 * weight

        changed = copy.deepcopy(projection)
        parametrize.register_parametrization(changed, 'weight', Doubled())
    else:

        class DoubledConv(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x) - self.bias[:, None, None]

        changed = DoubledConv(DIM, WIDE, 1).double()
        changed.load_state_dict(projection.state_dict())
    torch.testing.assert_close(adapter.project(changed, x), expected, rtol=1e-10, atol=1e-12)


def test_top_k_routing_takes_the_two_largest_of_each_target():
    weights = top_k(torch.randn(2, 9, 5), k=2)
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    adapter = make_adapter(routing='topk')
    x = features()
    projection = nn.Conv2d(DIM, WIDE, 1).double()
    residual = (adapter.project(projection, x) - projection(x)).flatten(2).mT
    bases, directions = adapter(x)
    for number in range(2):
        rows = slice(number * RANK, (number + 1) * RANK)
        affinity = x.flatten(2).mT @ bases[:, rows].mT
        largest = affinity.topk(2, -1)
        expected = torch.zeros_like(affinity).scatter(-1, largest.indices, largest.values.softmax(-1))
        start, stop = list(PARTS.values())[number]
        torch.testing.assert_close(
            residual[..., start:stop], (expected @ directions[:, rows])[..., start:stop], rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize('factors', FACTORS)
@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('rank_norm', [True, False])
def test_every_parameter_gets_a_gradient(factors, routing, rank_norm):
    layer = make_layer(factors=factors, routing=routing, rank_norm=rank_norm)
    layer(features(), features(dim=WIDE)).square().sum().backward()
    for name, p in layer.named_parameters():
        # a softmax does not see what is added to all of its logits alike
        if not (routing == 'topk' and not rank_norm and name.endswith('to_bases.out.bias')):
            assert p.grad.abs().max() > 1e-9, name


def test_training_moves_a_fresh_hosts_layer():
    layer = CEALayer(DIM, rank=RANK)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x, y, target = (features().float() for _ in range(3))
    losses = []
    for _ in range(30):
        loss = (layer(x, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert layer.gamma.abs().min() > 0


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_one_token_and_any_memory_order(layout, memory_format):
    layer = make_layer(layout=layout)
    one = {'bchw': (1, DIM, 1, 1), 'bnc': (1, 1, DIM), 'bhwc': (1, 1, 1, DIM)}[layout]
    out = [WIDE if length == DIM else length for length in one]
    assert layer(torch.randn(one).double(), torch.randn(out).double()).shape == tuple(out)
    x, y = features(layout), features(layout, WIDE)
    moved = [t.contiguous(memory_format=memory_format) if t.ndim == 4 else t.mT.contiguous().mT for t in (x, y)]
    torch.testing.assert_close(layer(*moved), layer(x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (1, 8), (2, 1), (3, 4), (16, 5)])
def test_any_size_and_memory_order_of_a_plane(size):
    adapter, projection = make_adapter(), nn.Conv2d(DIM, WIDE, 1, bias=False).double()
    x = torch.randn(2, DIM, *size, dtype=torch.float64)
    out = adapter.project(projection, x)
    residual = torch.stack([naive_residual(adapter, plane) for plane in x]).mT.reshape(out.shape)
    torch.testing.assert_close(out, projection(x) + residual, rtol=1e-9, atol=1e-12)
    last = adapter.project(projection, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, out, rtol=1e-10, atol=1e-12)
    assert min(size) == 1 or last.is_contiguous(memory_format=torch.channels_last)


def test_layouts_of_a_plane_agree():
    layer, other = make_layer(), make_layer(layout='bhwc')
    other.load_state_dict(layer.state_dict())
    x, y = features(), features(dim=WIDE)
    out = other(x.movedim(1, -1), y.movedim(1, -1))
    torch.testing.assert_close(out.movedim(-1, 1), layer(x, y), rtol=1e-10, atol=1e-12)


def test_tokens_without_a_plan_may_come_in_any_order_and_shape():
    layer = make_layer(layout='bnc')
    x, y = features('bnc'), features('bnc', WIDE)
    order = torch.randperm(35)
    torch.testing.assert_close(layer(x[:, order], y[:, order]), layer(x, y)[:, order], rtol=1e-10, atol=1e-12)
    grid = layer(x.unflatten(1, SIZE), y.unflatten(1, SIZE))
    torch.testing.assert_close(grid.flatten(1, 2), layer(x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'rank': 0}, 'rank must be at least 1, got 0'),
        ({'width': 9}, 'width must be a multiple of heads, got width=9 and heads=4'),
        ({'heads': 5}, 'width must be a multiple of heads, got width=12 and heads=5'),
        ({'factors': 'prompt'}, "factors must be one of dynamic, pooled, static, got 'prompt'"),
        ({'routing': 'dense'}, "routing must be one of signed, topk, got 'dense'"),
        ({'layout': 'nchw'}, "layout must be one of bchw, bhwc, bnc, got 'nchw'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CEALayer(DIM, **options)


@pytest.mark.parametrize(
    'shapes', [((1, 3, 8, 8), (1, 20, 8, 8)), ((1, 12, 8, 8), (1, 20, 8, 9)), ((1, 12, 0, 8),) * 2]
)
def test_wrong_features_are_named(shapes):
    with pytest.raises(ValueError, match=r'expected features \(B, C, H, W\) of C=12 and C=20 channels in the same'):
        CEALayer(DIM, WIDE)(*map(torch.zeros, shapes))


def test_state_dict_round_trip():
    adapter, other = make_adapter(), make_adapter()
    x = features()
    assert not torch.equal(adapter(x)[0], other(x)[0])
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(x)[0], other(x)[0])
