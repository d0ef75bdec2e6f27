"""Continuous Expert Assembly (CEA, arXiv 2605.06127): the equations, as modules.

A feature map is a set of N tokens ``x`` with C channels. With rank r, width d and learned probes ``P``, (r, d)::

    x_hat = LayerNorm(x)                                              (N, C)
    Z     = P + MultiHeadCrossAttention(query=P, key=x_hat, value=x_hat)
    A     = LayerNorm(Z) W_A                                          (r, C)  routing bases
    D     = LayerNorm(Z) W_D                                          (r, C)  residual directions
    S     = x_hat A^T / sqrt(C)                                       (N, r)  signed affinities
    y     = x + gamma * (S D)                                         (N, C)

From the paper: a hyper-adapter reads the image's own features and writes low-rank components; every token assembles
its residual from them by dense signed affinities. Our choice, where the abstract is silent: LayerNorms, the scale
1/sqrt(C), the per-channel ``gamma``, and how everything starts (see :class:`CrossAttentionHyperAdapter`).

Tokens are written ``(B, N, C)`` throughout. A feature map ``(B, C, H, W)`` is *viewed* so, without a copy; every
product below is taken in the memory order of its tokens, so no layout pays for a transposition.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.layers.tokens import (
    LAYOUTS,
    ChannelNorm,
    Tokens,
    add_product,
    as_tokens,
    average,
    from_tokens,
    multiply,
    project,
)

# The deviation of a fresh layer's S D (our choice, measured). gamma leaves zero by about the learning rate a step: with
# 1, CEA has hardly begun after 1,500 steps of 5e-4; with 10, gamma S D is by then as large as long trainings leave it.
RESIDUAL_STD = 10.0


def signed(affinity: Tensor) -> Tensor:
    """CEA's routing (from the paper): affinities ``(B, N, r)`` stay dense, signed and unbounded."""
    return affinity


def softmax(affinity: Tensor) -> Tensor:
    """Contrast: affinities ``(B, N, r)`` become a convex mixture of the components, in float32 or wider."""
    return F.softmax(affinity.float() if affinity.dtype.itemsize < 4 else affinity, -1).to(affinity.dtype)


def top_k(affinity: Tensor, k: int = 2) -> Tensor:
    """Contrast: the ``k`` largest softmax weights of each token, renormalised; all other components are off."""
    values, index = affinity.topk(min(k, affinity.shape[-1]), dim=-1)
    return torch.zeros_like(affinity).scatter(-1, index, softmax(values))


ROUTINGS = {'signed': signed, 'softmax': softmax, 'topk': top_k}


def assemble(
    tokens: Tokens, bases: Tensor, directions: Tensor, routing: str = 'signed', onto: Tensor | None = None
) -> Tensor:
    """Every token assembles its residual from the image's components: ``(x_hat A^T / sqrt(C)) D``.

    With ``signed`` routing this is linear attention with tokens as queries, A as keys, D as values and the identity as
    feature map; equally a 1x1 convolution of rank <= r with weights of this very image, ``A^T D / sqrt(C)``.

    Args:
        tokens: Normalised tokens ``(B, N, C)``, in any memory order.
        bases: Routing bases A ``(B, r, C)``.
        directions: Residual directions D ``(B, r, C)``.
        routing: ``signed`` (CEA), or a contrast: ``softmax``, ``topk``.
        onto: Tokens ``(B, N, C)`` to which the residual is added within the last product.

    Returns:
        The residual ``(B, N, C)``, in the memory order of ``tokens``; or ``onto`` with the residual, as ``onto`` is.
    """
    affinity = affinities(tokens, bases, routing)
    return multiply(affinity, directions) if onto is None else add_product(onto, affinity, directions)


def affinities(tokens: Tokens, bases: Tensor, routing: str = 'signed') -> Tensor:
    """How much of each component every token takes, ``(B, N, r)``; arguments as for :func:`assemble`."""
    return ROUTINGS[routing](project(tokens, bases * bases.shape[-1] ** -0.5))


class CrossAttentionHyperAdapter(nn.Module):
    """Read an image's tokens with r learned probes and write its components ``(A, D)`` (from the paper).

    The projections of keys and values are folded into the probes, ``softmax((P W_q W_k^T) x_hat^T) x_hat`` first and
    ``W_v`` after the sum over tokens, so that nothing of shape ``(N, d)`` exists: two skinny products per head and
    probe.

    Our choice, measured: the probes start as N(0, 1) and the value path (``to_out``) at zero. Conditioning then begins
    as r *different* static components, and the image's share grows from nothing. Queries, keys and values start with
    unit variance, three times that of torch's own start, with which all probes attend alike and read the same. There
    are no biases on them: on keys they cannot act, on values they repeat the probes. Softmax and the small products
    run in float32 under autocast.

    Args:
        dim: Channels C of the tokens.
        rank: Number r of probes, hence of components; at least 1.
        width: Width d of probes and attention (our choice); a multiple of ``num_heads``.
        num_heads: Attention heads h (our choice).

    Raises:
        ValueError: ``rank`` or ``dim`` is below 1, or ``num_heads`` does not divide ``width``.
    """

    def __init__(self, dim: int, rank: int = 8, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        _check_sizes(dim, rank, width, num_heads)
        self.num_heads = num_heads
        self.probes = nn.Parameter(torch.empty(rank, width))
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(dim, width, bias=False)
        self.to_v = nn.Linear(dim, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.write = ComponentWriter(dim, rank, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.probes)
        for projection in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.zeros_(self.to_out.weight)

    def folded_queries(self) -> Tensor:
        """All heads' ``P W_q W_k^T / sqrt(d/h)``, shape ``(h*r, C)``: what each probe looks for among raw tokens."""
        rank, width = self.probes.shape
        queries = self.to_q(self.probes).view(rank, self.num_heads, -1).transpose(0, 1)  # (h, r, d/h)
        keys = self.to_k.weight.view(self.num_heads, width // self.num_heads, -1)  # (h, d/h, C)
        return (queries @ keys / math.sqrt(width // self.num_heads)).flatten(0, 1)

    def read(self, tokens: Tokens) -> Tensor:
        """Attention-weighted sums of tokens ``(B, N, C)``, one a head and probe: ``(B, h, r, C)``."""
        return self._attend(tokens)[0]

    def statistics(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What :meth:`read` gives, and the logarithm of its weight, to be merged over parts of an image.

        Args:
            tokens: Normalised tokens ``(B, N, C)`` of a part of an image.

        Returns:
            The sums ``(B, h, r, C)`` and the log-sum-exp of their logits ``(B, h, r, 1)``, in float32 or wider.
        """
        sums, logits = self._attend(tokens)
        return sums.to(logits.dtype), logits.logsumexp(-1, keepdim=True).unflatten(1, (self.num_heads, -1))

    def components(self, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """From what :meth:`read` gives, ``(B, h, r, C)``, to components ``(A, D)``, each ``(B, r, C)`` in ``dtype``."""
        with torch.autocast(sums.device.type, enabled=False):
            values = self.to_v.weight.view(self.num_heads, -1, sums.shape[-1])  # (h, d/h, C)
            heads = sums.to(values.dtype) @ values.mT  # (B, h, r, d/h)
            attended = self.to_out(heads.transpose(1, 2).flatten(2))  # (B, r, d)
            return self.write(self.probes + attended, dtype)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Write the components of each image.

        Args:
            tokens: Normalised tokens ``(B, N, C)``, N >= 1.

        Returns:
            Routing bases A and residual directions D, each ``(B, r, C)``.
        """
        return self.components(self.read(tokens), tokens.dtype)

    def _attend(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The sums ``(B, h, r, C)`` and their logits ``(B, h*r, N)``, these in float32 or wider."""
        with torch.autocast(self.probes.device.type, enabled=False):
            queries = self.folded_queries().unsqueeze(0)
        products = project(tokens, queries).mT
        logits = products.to(torch.promote_types(products.dtype, torch.float32))
        return average(tokens, logits.softmax(-1)).unflatten(1, (self.num_heads, -1)), logits


class ComponentWriter(nn.Module):
    """``A = LayerNorm(Z) W_A``, ``D = LayerNorm(Z) W_D``: from states ``(B, r, d)`` to components ``(B, r, C)``.

    Our choice: W_A starts so that affinities have unit variance, W_D so that S D has deviation ``RESIDUAL_STD``; with
    softmax 0.17 and top-k 0.26 of that, since their weights sum to 1 (r = 8).
    """

    def __init__(self, dim: int, rank: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_bases = nn.Linear(width, dim, bias=False)
        self.to_directions = nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.to_bases.weight, std=width**-0.5)
        nn.init.normal_(self.to_directions.weight, std=RESIDUAL_STD * (width * rank) ** -0.5)

    def forward(self, states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map Z ``(B, r, d)`` to ``(A, D)``, each ``(B, r, C)`` in ``dtype``."""
        states = self.norm(states)
        return self.to_bases(states).to(dtype), self.to_directions(states).to(dtype)


class PooledHyperAdapter(nn.Module):
    """Contrast: one global descriptor, the mean token, writes ``(A, D)``. Starts as the CEA adapter does.

    Args and errors as for :class:`CrossAttentionHyperAdapter`; ``num_heads`` has no meaning here.
    """

    def __init__(self, dim: int, rank: int = 8, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        _check_sizes(dim, rank, width, num_heads)
        self.probes = nn.Parameter(torch.randn(rank, width))
        self.describe = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, rank * width, bias=False))
        self.write = ComponentWriter(dim, rank, width)
        nn.init.zeros_(self.describe[-1].weight)

    def statistics(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The mean token ``(B, C)`` and the logarithm of the number of tokens, ``(B, 1)``, to be merged likewise."""
        mean = self._mean(tokens)
        return mean, mean.new_full((len(mean), 1), math.log(tokens.shape[1]))

    def components(self, mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """From the mean token ``(B, C)``, the components ``(A, D)``, each ``(B, r, C)`` in ``dtype``."""
        with torch.autocast(mean.device.type, enabled=False):
            states = self.describe(mean.to(self.probes.dtype)).view(-1, *self.probes.shape)
            return self.write(self.probes + states, dtype)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """As :meth:`CrossAttentionHyperAdapter.forward`."""
        return self.components(self._mean(tokens), tokens.dtype)

    def _mean(self, tokens: Tokens) -> Tensor:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        alike = torch.zeros(len(tokens), 1, tokens.shape[1], dtype=wide, device=tokens.device)
        return average(tokens, alike.softmax(-1)).squeeze(1).to(wide)


class StaticBank(nn.Module):
    """Contrast: A and D are parameters, the same for every image: a bank of rank-one experts.

    Args and errors as for :class:`CrossAttentionHyperAdapter`; ``width`` and ``num_heads`` have no meaning here.
    """

    def __init__(self, dim: int, rank: int = 8, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        _check_sizes(dim, rank, width, num_heads)
        self.bases = nn.Parameter(torch.randn(rank, dim))
        self.directions = nn.Parameter(torch.randn(rank, dim) * RESIDUAL_STD * rank**-0.5)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """As :meth:`CrossAttentionHyperAdapter.forward`; the tokens are not read."""
        return tuple(bank.to(tokens.dtype).expand(len(tokens), -1, -1) for bank in (self.bases, self.directions))


CONDITIONINGS = {'cross_attention': CrossAttentionHyperAdapter, 'pooled': PooledHyperAdapter, 'static': StaticBank}


class CEALayer(nn.Module):
    """``y = x + gamma * assemble(x_hat, A, D)`` with ``(A, D)`` written by this image. A fresh layer is the identity.

    Args:
        dim: Channels C.
        rank: Number r of components; the residual has at most this rank.
        width, num_heads: Of the hyper-adapter, see :class:`CrossAttentionHyperAdapter`.
        conditioning: ``cross_attention`` (CEA), or a contrast: ``pooled``, ``static``.
        routing: ``signed`` (CEA), or a contrast: ``softmax``, ``topk``.
        layout: ``bchw`` for ``(B, C, H, W)``, ``bnc`` for ``(B, N, C)``, ``bhwc`` for ``(B, H, W, C)``.

    Raises:
        ValueError: An unknown word, or a size that :class:`CrossAttentionHyperAdapter` refuses.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 8,
        width: int = 32,
        num_heads: int = 2,
        conditioning: str = 'cross_attention',
        routing: str = 'signed',
        layout: str = 'bchw',
    ) -> None:
        super().__init__()
        for name, value, known in (
            ('conditioning', conditioning, CONDITIONINGS),
            ('routing', routing, ROUTINGS),
            ('layout', layout, LAYOUTS),
        ):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
        self.routing = routing
        self.layout = layout
        self.norm = ChannelNorm(dim, axis=-1)
        self.adapter = CONDITIONINGS[conditioning](dim, rank, width, num_heads)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def condition(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Components ``(A, D)``, each ``(B, r, C)``, of features ``x`` in the layer's layout."""
        self._check(x)
        return self.adapter(self.norm.fold(as_tokens(x, self.layout)))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the adapter reads in features ``x``, part of an image: see :mod:`cea_arch.layers.whole_image`."""
        self._check(x)
        return self.adapter.statistics(self.norm.fold(as_tokens(x, self.layout)))

    def affinities(self, x: Tensor, components: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The routing, made visible: how much of each component every token of ``x`` takes, ``(B, N, r)``.

        Args as for :meth:`forward`.
        """
        self._check(x)
        normed = self.norm.fold(as_tokens(x, self.layout))
        return affinities(normed, (components or self.adapter(normed))[0], self.routing)

    def forward(self, x: Tensor, components: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Add to each token of ``x`` the residual it assembles.

        Args:
            x: Features in the layer's layout, any number of tokens >= 1.
            components: ``(A, D)`` to use instead of this image's own, each ``(B, r, C)``.

        Returns:
            A tensor of the shape, dtype and layout of ``x``.

        Raises:
            ValueError: ``x`` does not have the layer's layout, or has no tokens.
        """
        self._check(x)
        tokens = as_tokens(x, self.layout)
        normed = self.norm.fold(tokens)
        bases, directions = self.adapter(normed) if components is None else components
        return from_tokens(assemble(normed, bases, directions * self.gamma, self.routing, tokens), x, self.layout)

    def _check(self, x: Tensor) -> None:
        dim = self.gamma.numel()
        channels = x.shape[1 if self.layout == 'bchw' else -1]
        if x.ndim != len(self.layout) or channels != dim or x.numel() == 0:
            raise ValueError(
                f'expected features ({", ".join(self.layout.upper())}) with C={dim}, got {tuple(x.shape)}.'
            )


def _check_sizes(dim: int, rank: int, width: int, num_heads: int) -> None:
    for name, value in (('dim', dim), ('rank', rank), ('width', width), ('num_heads', num_heads)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    if width % num_heads:
        raise ValueError(f'width must be a multiple of num_heads, got width={width} and num_heads={num_heads}.')
