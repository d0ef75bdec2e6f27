"""Features as tokens, in whatever order they lie in memory."""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = ('bchw', 'bnc', 'bhwc')
PART, MIN_PART = 2**20, 8  # numbers and channels whose squares are summed at a time (measured on CPU)
LIFT = 256.0  # keeps averages' weights, about 1 / N, within float16's range


def as_tokens(x: Tensor, layout: str) -> Tensor:
    """View features ``(B, C, H, W)``, ``(B, N, C)`` or ``(B, H, W, C)`` as tokens ``(B, N, C)``, without copying."""
    if layout == 'bchw':
        return x.flatten(2).mT
    return x if layout == 'bnc' else x.flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor, layout: str) -> Tensor:
    """Undo :func:`as_tokens`: tokens ``(B, N, C)`` get the shape of ``like``."""
    return tokens.mT.reshape(like.shape) if layout == 'bchw' else tokens.reshape(like.shape)


def multiply(tokens: Tensor, matrix: Tensor) -> Tensor:
    """``tokens @ matrix`` for ``(B, N, C)`` and ``(B, C, K)``, the result laid out in memory as the tokens are."""
    return tokens @ matrix if tokens.stride(-1) == 1 else (matrix.mT @ tokens.mT).mT


def project(tokens: 'Tokens', matrix: Tensor) -> Tensor:
    """``tokens @ matrix^T`` for ``(B, N, C)`` and ``(B, K, C)`` or ``(1, K, C)``, laid out in memory as the tokens are.

    Of :class:`NormedTokens` it comes in float32 or wider.
    """
    if isinstance(tokens, Tensor):
        return multiply(tokens, matrix.mT.to(tokens.dtype))
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.to(tokens.scale.dtype)
        weighted = matrix * tokens.weight
        centred = (weighted - weighted.mean(-1, keepdim=True)).to(tokens.dtype)
        offset = (matrix @ tokens.bias.to(matrix.dtype)).unsqueeze(1)
        return torch.addcmul(offset, multiply(tokens.raw, centred.mT), tokens.scale)


def average(tokens: 'Tokens', weights: Tensor) -> Tensor:
    """``weights @ tokens`` for ``(B, K, N)``, rows of which sum to 1, and ``(B, N, C)``.

    Of :class:`NormedTokens` it comes in float32 or wider.
    """
    if isinstance(tokens, Tensor):
        return weights.to(tokens.dtype) @ tokens
    with torch.autocast(weights.device.type, enabled=False):
        scaled = weights * (tokens.scale.mT * LIFT)
        sums = torch.bmm(scaled.to(tokens.dtype), tokens.raw).to(scaled.dtype) / LIFT
        return (sums - sums.mean(-1, keepdim=True)) * tokens.weight + tokens.bias


def add_product(tokens: Tensor, factors: Tensor, matrix: Tensor) -> Tensor:
    """``tokens + factors @ matrix`` in the dtype and memory order of ``(B, N, C)``; ``(B, N, K)`` and ``(B, K, C)``."""
    factors, matrix = factors.to(tokens.dtype), matrix.to(tokens.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        if tokens.stride(-1) == 1:
            return torch.baddbmm(tokens, factors, matrix)
        return torch.baddbmm(tokens.mT, matrix.mT, factors.mT).mT


@dataclass
class NormedTokens:
    """LayerNorm of tokens x, never written out: a product with it is one with x itself, corrected.

    With mean m and deviation s of a token, weight w and bias b, ``x_hat = (x - m) / s * w + b``. Therefore
    ``x_hat M^T = (x centred(M w)^T) / s + M b``, where rows are centred over the channels, and for weights P whose rows
    sum to 1 ``P x_hat = centred((P / s) x) w + b``. So the passes over x that normalise it, and their copies of it, go.

    Attributes:
        raw: The tokens x ``(B, N, C)``, in any memory order.
        scale: 1 / s, ``(B, N, 1)``, in float32 or wider.
        weight, bias: ``(C,)``.
    """

    raw: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.raw.dtype

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def shape(self) -> torch.Size:
        return self.raw.shape

    def __len__(self) -> int:
        return len(self.raw)


Tokens = Tensor | NormedTokens  # normalised, written out or not


def mean_and_scale(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """Means and inverse standard deviations over one axis, which stays with length 1; in float32 or wider.

    By mean squares: over a strided axis ``torch.var_mean`` is 10 to 20 times slower (measured on CPU). The relative
    error is about 1e-7 (1 + mean^2 / variance). Some channels at a time, so that their squares stay in the cache.
    """
    length = x.shape[axis]
    # a traced program serves all sizes, so its number of parts must not depend on the one that was traced
    step = length if torch.compiler.is_compiling() else max(MIN_PART, PART * length // x.numel())
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = [
        (part.sum(axis, keepdim=True), part.square().sum(axis, keepdim=True))
        for part in (part.to(wide) for part in x.split(step, axis))
    ]
    mean, square = (reduce(torch.add, column) / length for column in zip(*sums))
    return mean, (square - mean.square()).clamp_min(0).add(eps).rsqrt()


class ChannelNorm(nn.Module):
    """LayerNorm over the channel axis, wherever that axis lies in memory.

    Args:
        dim: Channels C.
        axis: Axis of the channels: 1 for ``(B, C, H, W)``, -1 for tokens ``(B, N, C)``.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, axis: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.axis = axis
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over its channels: same shape, dtype and memory order; computed in float32 or wider."""
        wide = x.float() if x.dtype.itemsize < 4 else x
        if wide.stride(self.axis) == 1:
            normed = F.layer_norm(wide.movedim(self.axis, -1), self.weight.shape, eps=self.eps).movedim(-1, self.axis)
        else:
            mean, scale = mean_and_scale(wide, self.axis, self.eps)
            normed = torch.addcmul(-mean * scale, wide, scale)
        shape = [-1 if axis == self.axis % x.ndim else 1 for axis in range(x.ndim)]
        return torch.addcmul(self.bias.view(shape), normed, self.weight.view(shape)).to(x.dtype)

    def fold(self, tokens: Tensor) -> NormedTokens:
        """The same for tokens ``(B, N, C)``, to be multiplied without being written out."""
        _, scale = mean_and_scale(tokens, -1, self.eps)
        if tokens.dtype == torch.float16:  # whose range products of the tokens themselves may leave
            return NormedTokens((tokens * scale).to(tokens.dtype), torch.ones_like(scale), self.weight, self.bias)
        return NormedTokens(tokens, scale, self.weight, self.bias)
