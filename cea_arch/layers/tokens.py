"""Features as tokens, in whatever order they lie in memory."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = ('bchw', 'bhwc', 'bnc')
PART, MIN_PART = 2**20, 8  # numbers and channels whose squares are summed at a time (measured on CPU)


def as_tokens(x: Tensor, layout: str) -> Tensor:
    """View features ``(B, C, H, W)`` or ``(B, ..., C)`` as tokens ``(B, N, C)``, without copying."""
    return x.flatten(2).mT if layout == 'bchw' else x.flatten(1, -2)


def from_tokens(tokens: Tensor, like: Tensor, layout: str) -> Tensor:
    """Undo :func:`as_tokens`: tokens ``(B, N, C)`` get the places of ``like``, features of any number of channels."""
    if layout == 'bchw':
        return tokens.mT.unflatten(2, like.shape[2:])
    return tokens.unflatten(1, like.shape[1:-1])


def multiply(tokens: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``tokens @ matrix + bias`` for ``(B, N, C)``, ``(B, C, K)`` and ``(K,)``, in the memory order of the tokens."""
    if tokens.stride(-1) == 1:
        return tokens @ matrix if bias is None else torch.baddbmm(bias, tokens, matrix)
    product = matrix.mT @ tokens.mT if bias is None else torch.baddbmm(bias[:, None], matrix.mT, tokens.mT)
    return product.mT


def add_product(tokens: Tensor, factors: Tensor, matrix: Tensor) -> Tensor:
    """``tokens + factors @ matrix`` in the dtype and memory order of ``(B, N, C)``; ``(B, N, K)`` and ``(B, K, C)``."""
    factors, matrix = factors.to(tokens.dtype), matrix.to(tokens.dtype)
    with no_autocast(tokens.device):
        if tokens.stride(-1) == 1:
            return torch.baddbmm(tokens, factors, matrix)
        return torch.baddbmm(tokens.mT, matrix.mT, factors.mT).mT


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of what is summed over many tokens: float32, or ``dtype`` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Let products run in the precision of their operands."""
    if device.type == 'meta':  # it has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def mean_and_scale(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """Means and inverse standard deviations over one axis, which stays with length 1; in float32 or wider.

    By mean squares: over a strided axis ``torch.var_mean`` is 10 to 20 times slower (measured on CPU). The relative
    error is about 1e-7 (1 + mean^2 / variance). Some channels at a time, so that their squares stay in the cache.
    """
    length = x.shape[axis]
    # a traced program serves all sizes, so its number of parts must not depend on the one that was traced
    step = length if torch.compiler.is_compiling() else max(MIN_PART, PART * length // x.numel())
    sums = [
        (part.sum(axis, keepdim=True), part.square().sum(axis, keepdim=True))
        for part in (part.to(wide(x.dtype)) for part in x.split(step, axis))
    ]
    mean, square = (reduce(torch.add, column) / length for column in zip(*sums))
    return mean, (square - mean.square()).clamp_min(0).add(eps).rsqrt()


class ChannelNorm(nn.Module):
    """LayerNorm over the channel axis, wherever that axis lies in memory.

    Args:
        dim: Channels C.
        axis: Axis of the channels: 1 for ``(B, C, H, W)``, -1 for tokens ``(B, ..., C)``.
        bias: Whether a learned shift follows the learned scale.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, axis: int = 1, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.axis = axis
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over its channels: same shape, dtype and memory order; computed in float32 or wider."""
        features = x.to(wide(x.dtype))
        if features.stride(self.axis) == 1:
            normed = F.layer_norm(features.movedim(self.axis, -1), self.weight.shape, eps=self.eps)
            normed = normed.movedim(-1, self.axis)
        else:
            mean, scale = mean_and_scale(features, self.axis, self.eps)
            normed = torch.addcmul(-mean * scale, features, scale)
        shape = [-1 if axis == self.axis % x.ndim else 1 for axis in range(x.ndim)]
        weight = self.weight.view(shape)
        scaled = normed * weight if self.bias is None else torch.addcmul(self.bias.view(shape), normed, weight)
        return scaled.to(x.dtype)
