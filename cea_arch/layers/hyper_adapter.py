"""The hyper-adapter of a projection: the equations of :mod:`cea_arch.layers.cea`, or the contrasts to them."""

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import (
    ROUTINGS,
    DynamicFactors,
    Factors,
    Heads,
    Parts,
    Spec,
    affinities,
    assemble,
    merge,
    stack,
    top_k,
)
from cea_arch.layers.image_wide import Core, ImageWide, Statistics, mean_of, merge_means
from cea_arch.layers.tokens import as_tokens, from_tokens, multiply, no_autocast


class PooledFactors(ImageWide):
    """The paper's contrast "GAP + MLP": the mean token, through an MLP, takes the place of the cross-attention.

    Hidden channels are a quarter of ``width``, which at r = 8 makes about as many parameters as the attention has (our
    choice).
    """

    merge = staticmethod(merge_means)

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.has_plan = spec.condense
        self.queries = nn.Parameter(torch.randn(2, spec.rank, spec.context))
        hidden = max(spec.context // 4, 1)
        self.describe = nn.Sequential(
            nn.LayerNorm(spec.dim), nn.Linear(spec.dim, hidden), nn.GELU(), nn.Linear(hidden, self.queries.numel())
        )
        self.heads = Heads(spec, spec.context)

    def statistics(self, x: Tensor, core: Core | None = None) -> Statistics:
        """The mean token ``(B, C)`` and the logarithm of the number of tokens, ``(B, 1)``."""
        return mean_of(x if core is None else x[..., core[0], core[1]])

    def write(self, statistics: Statistics) -> Factors:
        """From the mean token to ``(A, B)``, in float32 or wider."""
        with no_autocast(self.queries.device):
            states = self.describe(statistics[0].to(self.queries.dtype)).unflatten(1, self.queries.shape)
            return self.heads(self.queries + states)

    def forward(self, x: Tensor) -> Factors:
        """As :meth:`DynamicFactors.forward`."""
        return self.write(self.read(x))


class StaticFactors(nn.Module):
    """The paper's contrast: A and B are parameters of the block, the same for every image."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.bases = nn.ParameterDict({name: torch.randn(1, spec.rank, spec.dim) for name in spec.parts})
        self.directions = nn.ParameterDict(
            {name: torch.randn(1, spec.rank, b - a) for name, (a, b) in spec.parts.items()}
        )

    def forward(self, x: Tensor) -> Factors:
        """As :meth:`DynamicFactors.forward`; the tokens are not read."""
        factors = stack(list(self.bases.values()), list(self.directions.values()), self.spec)
        return tuple(rows.expand(x.shape[0], -1, -1) for rows in factors)


def _is_plain(projection: nn.Module) -> bool:
    """Whether what a module computes with can be read off it: a convolution with a weight of its own, of one part."""
    weight = projection._parameters.get('weight')
    of_parts = hasattr(weight, '__tensor_flatten__')  # quantised, or sharded
    return type(projection) is nn.Conv2d and isinstance(weight, nn.Parameter) and not of_parts


FACTORS = {'dynamic': DynamicFactors, 'pooled': PooledFactors, 'static': StaticFactors}


class HyperAdapter(nn.Module):
    """Adapts one projection of a block to each image: writes its factors, and merges or assembles them (eq. 7).

    Args:
        dim, dim_out, parts, rank, rank_norm, width, heads: Of :class:`Spec`.
        factors: ``dynamic`` (from the paper), or its contrasts ``static`` and ``pooled``.
        routing: ``signed`` (from the paper), or its contrast ``topk``.
        condense, stride: See :class:`Spec`.

    Raises:
        ValueError: An unknown word, or as :class:`Spec`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        parts: Parts,
        rank: int = 8,
        factors: str = 'dynamic',
        routing: str = 'signed',
        rank_norm: bool = True,
        width: int | None = None,
        heads: int = 4,
        condense: bool = True,
        stride: int = 2,
    ) -> None:
        super().__init__()
        for name, value, known in (('factors', factors, FACTORS), ('routing', routing, ROUTINGS)):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
        self.spec = Spec(dim, dim_out, dict(parts), rank, rank_norm, width, heads, condense, stride)
        self.routing = routing
        self.factors = FACTORS[factors](self.spec)

    def forward(self, x: Tensor) -> Factors:
        """The factors of each image, ``(B, K, d_in)`` and ``(B, K, d_out)``, from its features ``(B, C, H, W)``."""
        return self.factors(x)

    def project(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Y = X W + dY of features ``(B, C, H, W)``, for a 1x1 convolution; ``(B, d_out, H, W)``.

        Merged where it can be: routing is linear, and the projection a plain convolution with a weight of its own,
        rather than one with LoRA, quantised or sharded weights, or one that computes its weight when it is called.
        """
        factors = self(x)
        tokens = as_tokens(x, 'bchw')
        if self.routing == 'signed' and _is_plain(projection):
            weight = merge(projection.weight.flatten(1), factors, self.spec.rank).to(x.dtype)
            bias = None if projection.bias is None else projection.bias.to(x.dtype)
            out = multiply(tokens, weight.mT, bias)
        else:
            onto = as_tokens(projection(x), 'bchw')
            out = assemble(onto, tokens, factors, self.spec.rank, self.routing)
        return from_tokens(out, x, 'bchw')

    def routed(self, tokens: Tensor, bases: Tensor) -> Tensor:
        """How much of each component tokens ``(B, N, d_in)`` take, by target, ``(B, N, targets, r)``."""
        shares = affinities(tokens, bases).unflatten(-1, (-1, self.spec.rank))
        return top_k(shares) if self.routing == 'topk' else shares

    def affinities(self, x: Tensor, factors: Factors) -> dict[str, Tensor]:
        """The routing, made visible: by target, how much of each component every token takes, ``(B, r, H, W)``.

        Args:
            x: Features ``(B, C, H, W)``.
            factors: What :meth:`forward` wrote of them.
        """
        shares = self.routed(as_tokens(x, 'bchw'), factors[0])
        return {name: shares[:, :, number].mT.unflatten(2, x.shape[2:]) for number, name in enumerate(self.spec.parts)}
