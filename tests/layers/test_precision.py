"""CEA's layers in other precisions, traced, and in parts."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cea_arch.layers import rank_norm
from cea_arch.layers.hyper_adapter import FACTORS
from cea_arch.layers.tokens import ChannelNorm
from tests.layers.test_cea import DIM, WIDE, make_adapter, make_layer, randomise


class AttentionTypes(TorchDispatchMode):
    """Notes the dtype of the queries of every attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'scaled_dot_product' in str(func):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_autocast_reads_in_float32_and_errs_little():
    adapter, projection = make_adapter().float(), nn.Conv2d(DIM, WIDE, 1, bias=False)
    x = torch.randn(1, DIM, 64, 64)
    exact = adapter.project(projection, x)
    with torch.autocast('cpu', torch.bfloat16), AttentionTypes() as attention:
        out = adapter.project(projection, x)
    assert set(attention.seen) == {torch.float32}
    assert (out - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [1, 20])
def test_half_precision_weights_and_input(dtype, size):
    layer = make_layer().to(dtype)
    x, y = (torch.randn(1, dim, 8, 8) * size for dim in (DIM, WIDE))
    exact = make_layer()
    exact.load_state_dict(layer.state_dict())
    out, expected = layer(x.to(dtype), y.to(dtype)), exact(x.double(), y.double())
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 0.03 * expected.norm()


def test_rank_norm_of_zero_is_zero_in_half_precision_too():
    assert not rank_norm(torch.zeros(2, 3, dtype=torch.float16)).any()


@pytest.mark.parametrize('factors', FACTORS)
def test_a_traced_layer_serves_other_sizes(factors):
    layer = make_layer(factors=factors)
    size = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    example = torch.randn(1, DIM, 6, 8).double(), torch.randn(1, WIDE, 6, 8).double()
    traced = torch.export.export(layer, example, dynamic_shapes=(size, size)).module()
    x, y = torch.randn(1, DIM, 13, 6).double(), torch.randn(1, WIDE, 13, 6).double()
    torch.testing.assert_close(traced(x, y), layer(x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('bias', [True, False])
def test_channel_norm_equals_torch(bias, monkeypatch):
    monkeypatch.setattr('cea_arch.layers.tokens.PART', 1)  # several parts, the last one smaller
    norm = randomise(ChannelNorm(DIM, bias=bias))
    x = torch.randn(2, DIM, 5, 7)
    expected = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (DIM,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), expected)
