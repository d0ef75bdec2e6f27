"""Features as tokens, in whatever order they lie in memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = ('bchw', 'bnc', 'bhwc')


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
            # over a strided axis torch.var_mean is 10 to 20 times slower than these two means (measured on CPU)
            centred = wide - wide.mean(self.axis, keepdim=True)
            normed = centred * (centred.square().mean(self.axis, keepdim=True) + self.eps).rsqrt()
        shape = [-1 if axis == self.axis % x.ndim else 1 for axis in range(x.ndim)]
        return torch.addcmul(self.bias.view(shape), normed, self.weight.view(shape)).to(x.dtype)
