"""The eight properties of a CEA layer, and the folded computation against a written-out one."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cea_arch.layers import CEALayer, CrossAttentionHyperAdapter, assemble
from cea_arch.layers.cea import CONDITIONINGS, LAYOUTS, ROUTINGS, ChannelNorm, top_k
from cea_arch.layers.tokens import average, project

DIM, RANK = 12, 4
LAYOUT_SHAPES = {'bchw': (2, DIM, 5, 7), 'bnc': (2, 35, DIM), 'bhwc': (2, 5, 7, DIM)}


def randomise(module: nn.Module) -> nn.Module:
    """Put every parameter off its start, so that no property holds by a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def make_layer(**options) -> CEALayer:
    return randomise(CEALayer(DIM, rank=RANK, width=8, num_heads=2, **options).double())


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def naive_forward(layer: CEALayer, tokens: torch.Tensor) -> torch.Tensor:
    """The equations one image, head and probe at a time, with keys and values of shape (N, d/h) written out."""
    adapter = layer.adapter
    rank, width = adapter.probes.shape
    per_head = width // adapter.num_heads
    out = []
    for x in tokens:
        x_hat = layer_norm(x, layer.norm.weight, layer.norm.bias)
        q = adapter.probes @ adapter.to_q.weight.T
        k = x_hat @ adapter.to_k.weight.T
        v = x_hat @ adapter.to_v.weight.T
        probes = []
        for i in range(rank):
            heads = []
            for j in range(adapter.num_heads):
                part = slice(j * per_head, (j + 1) * per_head)
                logits = torch.stack([q[i, part] @ k[n, part] / math.sqrt(per_head) for n in range(len(x))])
                weights = torch.exp(logits - logits.max())
                heads.append((weights / weights.sum()) @ v[:, part])
            probes.append(adapter.probes[i] + torch.cat(heads) @ adapter.to_out.weight.T)
        norm = adapter.write.norm
        z = layer_norm(torch.stack(probes), norm.weight, norm.bias)
        bases, directions = z @ adapter.write.to_bases.weight.T, z @ adapter.write.to_directions.weight.T
        residual = [sum((token @ a) / math.sqrt(DIM) * d for a, d in zip(bases, directions)) for token in x_hat]
        out.append(x + layer.gamma * torch.stack(residual))
    return torch.stack(out)


def as_layout(tokens, layout):
    if layout == 'bnc':
        return tokens
    grid = tokens.unflatten(1, (5, 7))
    return grid.permute(0, 3, 1, 2).contiguous() if layout == 'bchw' else grid


@pytest.mark.parametrize('layout', LAYOUTS)
def test_folded_equals_naive_in_values_and_gradients(layout):
    layer = make_layer(layout=layout)
    tokens = torch.randn(2, 35, DIM, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 35, DIM, dtype=torch.float64)
    inputs = [tokens, *layer.parameters()]
    expected = naive_forward(layer, tokens)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    actual = layer(as_layout(tokens, layout))
    actual_grads = torch.autograd.grad((actual * as_layout(weights, layout)).sum(), inputs)
    torch.testing.assert_close(actual, as_layout(expected, layout), rtol=1e-9, atol=1e-12)
    for got, want in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('conditioning', CONDITIONINGS)
@pytest.mark.parametrize('routing', ROUTINGS)
def test_fresh_layer_is_the_exact_identity(layout, conditioning, routing):
    x = torch.randn(LAYOUT_SHAPES[layout])
    layer = CEALayer(DIM, rank=RANK, conditioning=conditioning, routing=routing, layout=layout)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_a_fresh_layer_acts_as_soon_as_gamma_leaves_zero(conditioning):
    layer = CEALayer(64, conditioning=conditioning)
    x = torch.randn(4, 64, 32, 32)
    nn.init.constant_(layer.gamma, 0.01)
    assert 0.05 < (layer(x) - x).std() < 0.2
    if conditioning == 'cross_attention':  # and its probes attend to different tokens
        assert 0.5 < (layer.adapter.folded_queries() @ x[0].flatten(1)).std(-1).mean() < 2


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_permuting_tokens_permutes_the_output(conditioning):
    layer = make_layer(layout='bnc', conditioning=conditioning)
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    order = torch.randperm(35)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-10, atol=1e-12)
    for moved, kept in zip(layer.condition(x[:, order]), layer.condition(x), strict=True):
        torch.testing.assert_close(moved, kept, rtol=1e-10, atol=1e-12)


def test_residual_has_at_most_the_layers_rank():
    layer = make_layer(layout='bnc')
    x = torch.randn(1, 50, DIM, dtype=torch.float64)
    singular = torch.linalg.svdvals((layer(x) - x)[0])
    assert singular[RANK - 1] > 1e-6 * singular[0]
    assert singular[RANK] < 1e-10 * singular[0]


def test_affinities_take_both_signs():
    layer = make_layer(layout='bnc')
    x = torch.randn(1, 500, DIM, dtype=torch.float64)
    affinity = (layer.norm(x) @ layer.condition(x)[0].mT)[0]
    assert (affinity > 0.1).any(dim=0).all()
    assert (affinity < -0.1).any(dim=0).all()


def test_components_depend_on_the_image_and_not_on_its_batch():
    layer = make_layer(layout='bnc')
    x = torch.randn(3, 35, DIM, dtype=torch.float64)
    for component, alone in zip(layer.condition(x), layer.condition(x[1:2]), strict=True):
        assert (component[0] - component[1]).abs().max() > 1e-2
        torch.testing.assert_close(component[1:2], alone, rtol=1e-12, atol=1e-12)


def test_static_bank_does_not_depend_on_the_image():
    layer = make_layer(layout='bnc', conditioning='static')
    first, second = layer.condition(torch.randn(2, 35, DIM, dtype=torch.float64))[0]
    assert torch.equal(first, second)


def test_assemble_is_linear_attention_and_linear_in_its_tokens():
    tokens, more = torch.randn(2, 2, 35, DIM, dtype=torch.float64)
    a, d = torch.randn(2, 2, RANK, DIM, dtype=torch.float64)
    image_weights = a.mT @ d / math.sqrt(DIM)  # of a 1x1 convolution
    torch.testing.assert_close(assemble(tokens, a, d), tokens @ image_weights, rtol=1e-10, atol=1e-12)
    both = assemble(2 * tokens - 3 * more, a, d)
    torch.testing.assert_close(both, 2 * assemble(tokens, a, d) - 3 * assemble(more, a, d), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_every_parameter_gets_a_gradient(conditioning):
    layer = make_layer(conditioning=conditioning)
    layer(torch.randn(LAYOUT_SHAPES['bchw'], dtype=torch.float64)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().max() > 1e-9, name


def test_training_moves_a_fresh_layer_off_the_identity():
    layer = CEALayer(DIM, rank=RANK)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(2, *LAYOUT_SHAPES['bchw'])
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert layer.adapter.to_out.weight.abs().max() > 0


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_one_token_and_any_memory_order(layout, memory_format):
    layer = make_layer(layout=layout)
    shapes = {'bchw': (1, DIM, 1, 1), 'bnc': (1, 1, DIM), 'bhwc': (1, 1, 1, DIM)}
    assert layer(torch.randn(shapes[layout], dtype=torch.float64)).shape == shapes[layout]
    x = torch.randn(LAYOUT_SHAPES[layout], dtype=torch.float64)
    moved = x.contiguous(memory_format=memory_format) if x.ndim == 4 else x.mT.contiguous().mT
    torch.testing.assert_close(layer(moved), layer(x), rtol=1e-10, atol=1e-12)


def test_layouts_agree():
    layer = make_layer(layout='bnc')
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    for layout in ('bchw', 'bhwc'):
        other = make_layer(layout=layout)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(as_layout(x, layout)), as_layout(layer(x), layout), rtol=1e-10, atol=1e-12)


def test_components_can_be_taken_out_and_put_back():
    layer = make_layer()
    x = torch.randn(LAYOUT_SHAPES['bchw'], dtype=torch.float64)
    torch.testing.assert_close(layer(x, components=layer.condition(x)), layer(x), rtol=1e-12, atol=1e-12)
    swapped = layer(x, components=tuple(c.flip(0) for c in layer.condition(x)))
    assert (swapped - layer(x)).abs().max() > 1e-3


class SoftmaxTypes(TorchDispatchMode):
    """Notes the dtype of every softmax's input."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._softmax.default:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_autocast_keeps_the_softmax_in_float32():
    layer = make_layer().float()
    x = torch.randn(1, DIM, 64, 64)
    exact = layer(x)
    with torch.autocast('cpu', torch.bfloat16), SoftmaxTypes() as softmax:
        out = layer(x)
    assert out.dtype == x.dtype
    assert softmax.seen == [torch.float32]
    assert (out - exact).norm() < 0.02 * (exact - x).norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_input(dtype):
    layer = make_layer().to(dtype)
    x = torch.randn(1, DIM, 8, 8).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_top_k_keeps_k_weights_that_sum_to_one():
    weights = top_k(torch.randn(2, 9, 5), k=2)
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize('memory_order', ['channels first', 'channels last'])
def test_products_with_folded_tokens_equal_those_with_normed_ones(memory_order, monkeypatch):
    monkeypatch.setattr('cea_arch.layers.tokens.PART', 1)  # several parts, the last one smaller
    norm = randomise(ChannelNorm(42, axis=-1).double())
    x = torch.randn(2, 42, 35, dtype=torch.float64).mT * 3 + 2
    x = x if memory_order == 'channels first' else x.contiguous()
    matrix, weights = torch.randn(1, 5, 42, dtype=torch.float64), torch.randn(2, 5, 35, dtype=torch.float64).softmax(-1)
    products = project(norm.fold(x), matrix)
    normed = layer_norm(x, norm.weight, norm.bias)
    torch.testing.assert_close(products, normed @ matrix.mT, rtol=1e-10, atol=1e-11)
    assert products.stride(-1) == (1 if memory_order == 'channels last' else 35)
    torch.testing.assert_close(average(norm.fold(x), weights), weights @ normed, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(norm(x), normed, rtol=1e-10, atol=1e-11)


def test_folded_tokens_lose_little_to_an_offset():
    layer = make_layer()
    x = torch.randn(LAYOUT_SHAPES['bchw'], dtype=torch.float64) + 10  # ten times the deviation
    residual = layer(x) - x
    found = layer.float()(x.float()).double() - x
    assert (found - residual).norm() < 1e-4 * residual.norm()


def test_float16_takes_large_features():
    layer = make_layer()
    layer.norm.weight.data.fill_(8)
    x = (torch.rand(1, DIM, 16, 16, dtype=torch.float64) - 0.5) * 1e5
    expected = layer.affinities(x, components=layer.condition(x))
    found = layer.half().affinities(x.half(), components=layer.condition(x.half()))
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_float16_averages_many_tokens():
    norm = ChannelNorm(2, axis=-1).half()
    x = torch.tensor([0.0, 4.0], dtype=torch.float16).expand(1, 3_000_000, 2)
    weights = torch.full((1, 1, 3_000_000), 1 / 3_000_000)
    torch.testing.assert_close(average(norm.fold(x), weights), torch.tensor([[[-1.0, 1.0]]]), rtol=0, atol=0.01)


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_a_traced_layer_serves_other_sizes(conditioning):
    layer = make_layer(conditioning=conditioning)
    size = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    traced = torch.export.export(layer, (torch.randn(1, DIM, 5, 8).double(),), dynamic_shapes=(size,)).module()
    x = torch.randn(1, DIM, 13, 6, dtype=torch.float64)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-10, atol=1e-12)


def test_channel_norm_equals_torch():
    norm = randomise(ChannelNorm(DIM))
    x = torch.randn(2, DIM, 5, 7)
    expected = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (DIM,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'rank': 0}, 'rank must be at least 1, got 0'),
        ({'width': 9}, 'width must be a multiple of num_heads, got width=9'),
        ({'conditioning': 'prompt'}, "conditioning must be one of cross_attention, pooled, static, got 'prompt'"),
        ({'routing': 'dense'}, "routing must be one of signed, softmax, topk, got 'dense'"),
        ({'layout': 'nchw'}, "layout must be one of bchw, bnc, bhwc, got 'nchw'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CEALayer(DIM, **options)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r'expected features \(B, C, H, W\) with C=12, got \(1, 3, 8, 8\)'):
        CEALayer(DIM)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match='expected features'):
        CEALayer(DIM)(torch.zeros(1, DIM, 0, 8))


def test_adapter_state_dict_round_trip():
    adapter, other = (randomise(CrossAttentionHyperAdapter(DIM, RANK, 8)) for _ in range(2))
    x = torch.randn(1, 9, DIM)
    assert not torch.equal(adapter(x)[0], other(x)[0])
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter(x)[0], other(x)[0])
