"""Transformer blocks for restoration: channel attention and a gated feed-forward, as in Restormer (CVPR 2022)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.layers.cea import CEALayer
from cea_arch.layers.tokens import ChannelNorm


class ChannelAttention(nn.Module):
    """Multi-head attention between channels ("transposed" attention): cost linear in the number of pixels.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Groups of channels that attend among themselves.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}.')
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, statistics: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape.

        Args:
            x: Features.
            statistics: What :meth:`statistics` gave, to use instead of this image's own.
        """
        qkv = self.qkv_dwconv(self.qkv(x))
        products, q_norm, k_norm = self.statistics(qkv) if statistics is None else statistics
        # normalising the (C/h, C/h) product instead of q and k saves two passes over the pixels
        scale = q_norm.clamp_min(1e-6).unsqueeze(-1) * k_norm.clamp_min(1e-6).unsqueeze(-2)
        attention = (products / scale * self.temperature).softmax(-1).to(qkv.dtype)
        v = self._heads(qkv.chunk(3, dim=1)[2])
        return self.project_out((attention @ v).reshape(x.shape))

    def statistics(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is summed over the pixels of ``qkv`` ``(B, 3C, H, W)``; parts of an image: :func:`merge_products`.

        Returns:
            ``q k^T`` ``(B, h, C/h, C/h)``, the norms of q and of k ``(B, h, C/h)``.
        """
        q, k = (self._heads(t) for t in qkv.chunk(3, dim=1)[:2])
        norms = [t.norm(dim=-1, dtype=torch.float32 if t.dtype.itemsize < 4 else t.dtype) for t in (q, k)]
        if qkv.dtype == torch.float16:  # whose range a sum over many pixels leaves: the product of unit vectors instead
            q, k = (t / norm.clamp_min(1e-6).unsqueeze(-1).to(t.dtype) for t, norm in zip((q, k), norms))
            return (q @ k.mT).float() * norms[0].unsqueeze(-1) * norms[1].unsqueeze(-2), *norms
        return q @ k.mT, *norms

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.num_heads, -1, x.shape[-2] * x.shape[-1])


def merge_products(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge :meth:`ChannelAttention.statistics` of two sets of pixels into those of both, exactly."""
    norms = [torch.hypot(a, b) for a, b in zip(one[1:], other[1:], strict=True)]
    return one[0] + other[0], *norms


class GatedFeedForward(nn.Module):
    """``W_out (GELU(a) * b)`` with ``a, b`` the halves of a 1x1 and a depthwise 3x3 convolution.

    Args:
        dim: Channels C.
        expansion_factor: Hidden channels as a multiple of C, rounded down.
    """

    def __init__(self, dim: int, expansion_factor: float) -> None:
        super().__init__()
        hidden = int(dim * expansion_factor)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Pre-norm channel attention, then a pre-norm gated feed-forward, each with a residual.

    Both branches start at zero, so that a fresh block is the identity and a fresh network a clear path from input to
    output. Our choice; in a pilot of 300 iterations on mixed degradations it gained 0.5 dB at noise 25, one seed.

    Args:
        dim, num_heads: Of :class:`ChannelAttention`.
        ffn_expansion_factor: Of :class:`GatedFeedForward`.
    """

    def __init__(self, dim: int, num_heads: int = 1, ffn_expansion_factor: float = 2.66) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim)
        self.attn = ChannelAttention(dim, num_heads)
        self.norm2 = ChannelNorm(dim)
        self.ffn = GatedFeedForward(dim, ffn_expansion_factor)
        for branch in (self.attn, self.ffn):
            nn.init.zeros_(branch.project_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class CEABlock(TransformerBlock):
    """A transformer block followed by a :class:`CEALayer`; fresh, it equals the transformer block.

    Args:
        dim, num_heads, ffn_expansion_factor: Of :class:`TransformerBlock`.
        rank, width, cea_heads, conditioning, routing: Of :class:`CEALayer` (``cea_heads`` is its ``num_heads``).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        ffn_expansion_factor: float = 2.66,
        rank: int = 8,
        width: int = 32,
        cea_heads: int = 2,
        conditioning: str = 'cross_attention',
        routing: str = 'signed',
    ) -> None:
        super().__init__(dim, num_heads, ffn_expansion_factor)
        self.cea = CEALayer(dim, rank, width, cea_heads, conditioning, routing)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        return self.cea(super().forward(x))
