"""Continuous Expert Assembly (CEA, arXiv 2605.06127): the equations, each a function or a module.

For the tokens ``X``, (N, d_in), that a projection ``W``, (d_in, d_out), inside a block reads, and rank r::

    X_hat = PW(DW(X))                                           condensed context             section 3.3
    T_F   = R_F + MultiHeadCrossAttention(R_F, X_hat, X_hat)    F = A, B; r learned queries   eq. 4
    A     = RankNorm(FC_A(T_A))   (r, d_in)                     routing bases                 eq. 5, 6
    B     = RankNorm(FC_B(T_B))   (r, d_out)                    residual directions           eq. 5, 6
    dY    = (1/r) (X A^T) B                                     signed and dense              eq. 2, 3
    Y     = X W + dY                                            adapted to this very image    eq. 7

One projection may have several *targets*, parts of its output such as query and key, each with heads ``FC_A, FC_B`` of
its own; T_A and T_B serve all of them. Their A are stacked, and each B stands in the columns of its target, with zeros
beside it: so one pair ``(A, B)``, (K, d_in) and (K, d_out) with K = r times the number of targets, says it all.

Since dY is linear in X it can be *merged* into the projection, ``W + (1/r) A^T B``, and then costs nothing for each
pixel but the reading (follows from the paper; it does not say so).

Our choice, where the paper is silent: kernel 3 and stride 2, LayerNorms on queries and context, no output projection,
RankNorm's epsilon, and how everything starts. Tokens are written ``(B, N, C)`` and ``(B, C, H, W)`` is viewed so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.layers.image_wide import Core, ImageWide, Statistics, merge_means
from cea_arch.layers.tokens import add_product, as_tokens, multiply, no_autocast, wide

Parts = Mapping[str, tuple[int, int]]  # targets by name: first column of the projection's output, and the one after it
Factors = tuple[Tensor, Tensor]  # A (B, K, d_in), B (B, K, d_out)

ROUTINGS = ('signed', 'topk')


def rank_norm(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """RankNorm (eq. 6): each row ``(..., C)`` divided by its own L2 norm + eps, in float32 or wider."""
    rows = rows.to(wide(rows.dtype))
    return rows / (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + eps)


def affinities(tokens: Tensor, bases: Tensor) -> Tensor:
    """What every token takes of each component, G = X A^T (eq. 3), ``(B, N, K)`` of ``(B, N, C)``, ``(B, K, C)``."""
    return multiply(tokens, bases.mT.to(tokens.dtype))


def top_k(affinity: Tensor, k: int = 2) -> Tensor:
    """The paper's contrast: softmax over the ``k`` largest of affinities ``(..., r)``; all others are off."""
    values, index = affinity.topk(min(k, affinity.shape[-1]), dim=-1)
    weights = values.to(wide(values.dtype)).softmax(-1).to(affinity.dtype)
    return torch.zeros_like(affinity).scatter(-1, index, weights)


def assemble(onto: Tensor, tokens: Tensor, factors: Factors, rank: int, routing: str = 'signed') -> Tensor:
    """Add what every token assembles from the image's components, ``(1/r) (X A^T) B`` (eq. 2, 3).

    With ``signed`` routing it is attention without softmax, of queries X, keys A and values B. With ``topk`` the
    weights of a token add up to 1 for each target already, so nothing is divided by r (our choice).

    Args:
        onto: Tokens ``(B, N, d_out)``, in any memory order, which the result keeps.
        tokens: X ``(B, N, d_in)``.
        factors: A ``(B, K, d_in)`` and B ``(B, K, d_out)``, ``rank`` rows for each target.
        rank: r.
        routing: ``signed`` (from the paper) or its contrast ``topk``.
    """
    bases, directions = factors
    affinity = affinities(tokens, bases)
    if routing == 'topk':
        return add_product(onto, top_k(affinity.unflatten(-1, (-1, rank))).flatten(-2), directions)
    return add_product(onto, affinity, directions / rank)


def merge(weight: Tensor, factors: Factors, rank: int) -> Tensor:
    """The projection with its residual inside, ``W + (1/r) A^T B``: each image's own weight.

    Args:
        weight: ``(d_out, d_in)``, as nn.Linear keeps it.
        factors: A ``(B, K, d_in)`` and B ``(B, K, d_out)``, ``rank`` rows for each target.
        rank: r.

    Returns:
        Weights ``(B, d_out, d_in)``, in the wider precision of both.
    """
    bases, directions = factors
    dtype = torch.promote_types(weight.dtype, bases.dtype)
    with no_autocast(weight.device):
        return torch.baddbmm(weight.to(dtype)[None], directions.mT.to(dtype), bases.to(dtype), alpha=1 / rank)


class Condense(nn.Module):
    """``PW(DW(X))`` (section 3.3): local structure at a lower resolution, rounded up. Kernel, stride: our choice.

    What is read of the cells is a weighted mean, so a larger stride, which takes a sample of them, gives next to the
    same factors for less (docs/experiments.md).
    """

    def __init__(self, dim: int, width: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor, core: Core | None = None) -> Tensor:
        """Map ``(B, C, H, W)`` to tokens ``(B, ceil(H/s) * ceil(W/s), width)``; with ``core``, those centred in it.

        Cell i has its centre at row ``i * s``, s the stride. So tiles whose starts are multiples of s and which reach s
        pixels beyond their cores give together the cells of the whole image, each once and exactly.
        """
        x = self.depthwise(x)
        if core is not None:
            rows, columns = (slice(-(-side.start // self.stride), -(-side.stop // self.stride)) for side in core)
            x = x[..., rows, columns]
        return self.pointwise(as_tokens(x, 'bchw'))


@dataclass(frozen=True)
class Spec:
    """Which projection is adapted, and how.

    Attributes:
        dim: Channels d_in of the tokens that it reads.
        dim_out: Channels d_out that it writes.
        parts: Its targets, see ``Parts``.
        rank: Number r of components for each target, and of queries for each factor.
        rank_norm: RankNorm or not.
        width: Channels of condensed context and queries; ``None`` is ``dim``, as in the paper. Where it is less, heads
            are smaller and attention is cheaper (our choice).
        heads: Attention heads (four in the paper); they divide ``width``.
        condense: Whether tokens are a plane and condensed; else they have no plan of rows and columns, and are read as
            they are.
        stride: Of the context: one token for each square of so many pixels.

    Raises:
        ValueError: A number below 1, or heads that do not divide the width.
    """

    dim: int
    dim_out: int
    parts: Parts = field(default_factory=dict)
    rank: int = 8
    rank_norm: bool = True
    width: int | None = None
    heads: int = 4
    condense: bool = True
    stride: int = 2

    def __post_init__(self) -> None:
        for name in ('dim', 'dim_out', 'rank', 'heads', 'stride'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}.')
        if self.context % self.heads or self.context < 1:
            raise ValueError(f'width must be a multiple of heads, got width={self.context} and heads={self.heads}.')

    @property
    def context(self) -> int:
        """Channels of context and queries."""
        return self.dim if self.width is None or not self.condense else self.width


class Heads(nn.Module):
    """The fully connected heads (eq. 5), one for each factor and target, and RankNorm (eq. 6).

    Our choice: they start with unit variance for each number, so that learning rates turn rows of every width alike.
    Without RankNorm rows are divided by the square root of their length, so that a fresh residual is as large.
    """

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.to_bases = nn.ModuleDict({name: nn.Linear(width, spec.dim) for name in spec.parts})
        self.to_directions = nn.ModuleDict({name: nn.Linear(width, b - a) for name, (a, b) in spec.parts.items()})
        for head in (*self.to_bases.values(), *self.to_directions.values()):
            nn.init.normal_(head.weight, std=width**-0.5)
            nn.init.zeros_(head.bias)

    def forward(self, states: Tensor) -> Factors:
        """Map T ``(B, 2, r, width)``, first T_A and then T_B, to ``(A, B)``."""
        bases = [head(states[:, 0]) for head in self.to_bases.values()]
        return stack(bases, [head(states[:, 1]) for head in self.to_directions.values()], self.spec)


def stack(bases: list[Tensor], directions: list[Tensor], spec: Spec) -> Factors:
    """One pair ``(A, B)`` of the rows ``(B, r, ...)`` of several targets, each B in the columns of its own."""

    def scaled(rows: Tensor) -> Tensor:
        return rank_norm(rows) if spec.rank_norm else rows * rows.shape[-1] ** -0.5

    placed = [F.pad(scaled(rows), (a, spec.dim_out - b)) for rows, (a, b) in zip(directions, spec.parts.values())]
    return torch.cat([scaled(rows) for rows in bases], 1), torch.cat(placed, 1)


class DynamicFactors(ImageWide):
    """Probe an image's tokens with learned queries and write its factors (eq. 4 to 6; from the paper).

    The matrices of keys and values are folded into the queries, ``softmax((R W_q W_k^T) X_hat^T) X_hat`` first and W_v
    after the sum over tokens, so that nothing of shape (N, d) is written. All of it runs in float32 or wider.
    """

    merge = staticmethod(merge_means)

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        width = spec.context
        self.has_plan = spec.condense
        self.align = self.reach = spec.stride
        self.num_heads = spec.heads
        self.condense = Condense(spec.dim, width, spec.stride) if spec.condense else None
        self.queries = nn.Parameter(torch.empty(2, spec.rank, width))  # R_A and R_B
        self.norm_queries = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Parameter(torch.empty(width, width)) for _ in range(3))
        self.heads = Heads(spec, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Our choice: queries, keys and values of unit variance, so that queries attend to different tokens."""
        nn.init.normal_(self.queries)
        for matrix in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(matrix, std=len(matrix) ** -0.5)

    def folded_queries(self) -> Tensor:
        """All heads' ``LN(R) W_q W_k^T / sqrt(width / heads)``, ``(heads * 2r, width)``: what is sought in X_hat."""
        queries = self.norm_queries(self.queries).flatten(0, 1) @ self.to_q.T
        queries = queries.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, 2r, width / heads)
        keys = self.to_k.unflatten(0, (self.num_heads, -1))  # (heads, width / heads, width)
        return (queries @ keys / math.sqrt(keys.shape[1])).flatten(0, 1)

    def sought(self, x: Tensor, core: Core | None = None) -> tuple[Tensor, Tensor]:
        """Folded queries ``(heads * 2r, width)``; the normalised context ``(B, N, width)`` that they search."""
        tokens = as_tokens(x, 'bchw') if self.condense is None else self.condense(x, core)
        norm = self.norm_context
        with no_autocast(x.device):
            tokens = norm(tokens.to(norm.weight.dtype).contiguous()).to(wide(x.dtype))
            return self.folded_queries().to(tokens.dtype), tokens

    def attention(self, x: Tensor) -> Tensor:
        """Where the probes of A and B look, ``(B, 2, r, N)``: softmax over the N cells, mean of the heads."""
        queries, tokens = self.sought(x)
        with no_autocast(x.device):
            weights = (queries @ tokens.mT).softmax(-1)
        return weights.unflatten(1, (self.num_heads, 2, -1)).mean(1)

    def statistics(self, x: Tensor, core: Core | None = None) -> Statistics:
        """Weighted sums of the context, ``(B, heads, 2r, width)``; of a part, log-sum-exps ``(..., 1)`` beside them."""
        queries, tokens = self.sought(x, core)
        with no_autocast(x.device):
            shared = tokens.unsqueeze(1)  # keys and values of one head: the heads lie in the queries
            sums = F.scaled_dot_product_attention(queries.expand(x.shape[0], 1, -1, -1), shared, shared, scale=1.0)
            found = (sums,) if core is None else (sums, (queries @ tokens.mT).logsumexp(-1, keepdim=True).unsqueeze(1))
            return tuple(rows.squeeze(1).unflatten(1, (self.num_heads, -1)) for rows in found)

    def write(self, statistics: Statistics) -> Factors:
        """From sums of the context to ``(A, B)``, in float32 or wider."""
        with no_autocast(self.to_v.device):
            values = self.to_v.unflatten(0, (self.num_heads, -1))  # (heads, width / heads, width)
            attended = statistics[0].to(self.to_v.dtype) @ values.mT  # (B, heads, 2r, width / heads)
            attended = attended.transpose(1, 2).flatten(2).unflatten(1, self.queries.shape[:2])
            return self.heads(self.queries + attended)

    def forward(self, x: Tensor) -> Factors:
        """Write the factors of each image from its features ``(B, C, H, W)``, the input of the projection."""
        return self.write(self.read(x))
