"""The CEA layer: an image's own residual beside a module that this package did not write."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import Parts, assemble
from cea_arch.layers.hyper_adapter import HyperAdapter
from cea_arch.layers.tokens import LAYOUTS, as_tokens, from_tokens

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class CEALayer(nn.Module):
    """``Y = f(X) + gamma * g dY(X)`` for a module ``f``, with dY as in :mod:`cea_arch.layers.cea` and g constant.

    X is the *input* of ``f``, whose output has the same places and channels of its own. A fresh layer changes nothing,
    since gamma, one number for each output channel, starts at zero: so a trained network computes what it did (our
    choice; the paper trains from nothing and has no gamma). g = sqrt(r d_in), without the r where routing is ``topk``,
    makes up for RankNorm, so that g dY is about as large as X.

    Args:
        dim: Channels d_in of X.
        dim_out: Channels d_out of Y; ``None``: as many.
        rank, factors, routing, rank_norm, width, heads: Of :class:`cea_arch.layers.HyperAdapter`.
        layout: Of X and Y: ``bchw`` for ``(B, C, H, W)``, ``bhwc`` for ``(B, H, W, C)``; ``bnc`` for tokens
            ``(B, ..., C)`` whose rows and columns are not known, which are read uncondensed.
        parts: Columns of Y that are adapted, by name, each with factors of its own; by default all, as ``out``.

    Raises:
        ValueError: An unknown word, or a size that :class:`cea_arch.layers.HyperAdapter` refuses.
    """

    alone = False  # copied without its network

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        rank: int = 8,
        factors: str = 'dynamic',
        routing: str = 'signed',
        rank_norm: bool = True,
        width: int | None = None,
        heads: int = 4,
        layout: str = 'bchw',
        parts: Parts | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}.')
        dim_out = dim_out or dim
        parts = parts or {'out': (0, dim_out)}
        self.layout = layout
        self.adapter = HyperAdapter(
            dim, dim_out, parts, rank, factors, routing, rank_norm, width, heads, condense=layout != 'bnc'
        )
        self.gain = math.sqrt(dim * (rank if routing == 'signed' else 1))
        self.gamma = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Add to ``y = f(x)`` what the tokens of ``x`` assemble.

        Args:
            x: Features in the layer's layout, with ``dim`` channels, any number of tokens >= 1.
            y: Features of the same batch and places, with ``dim_out`` channels. Without them ``x`` is returned, as a
                target that is an ``nn.Sequential`` runs all its children, this layer too.

        Returns:
            A tensor of the shape, dtype and layout of ``y``.

        Raises:
            ValueError: They are not such features.
        """
        if y is None:
            return x
        self._check(x, y)
        bases, directions = self.adapter(self.plane(x))
        onto, tokens = as_tokens(y, self.layout), as_tokens(x, self.layout)
        factors = bases, directions * (self.gamma * self.gain)
        spec = self.adapter.spec
        return from_tokens(assemble(onto, tokens, factors, spec.rank, self.adapter.routing), y, self.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'CEALayer':
        """A copy, as torch makes it, which knows whether its module was copied alone.

        So fusing begins, which then changes the module's weights: what the layer adds would no longer fit.
        """
        copied = type(self).__new__(type(self))
        outermost = next(iter(memo.values()), None)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        of_torch = type(outermost).__module__.startswith('torch.nn.modules')
        copied.alone = of_torch and not isinstance(outermost, CONTAINERS)
        return copied

    def plane(self, x: Tensor) -> Tensor:
        """View features in the layer's layout as ``(B, C, H, W)``; tokens without a plan as ``(B, C, N, 1)``."""
        if self.layout == 'bchw':
            return x
        return x.movedim(-1, 1) if self.layout == 'bhwc' else as_tokens(x, self.layout).mT.unsqueeze(-1)

    def _check(self, x: Tensor, y: Tensor) -> None:
        channel = 1 if self.layout == 'bchw' else -1
        places = [tuple(t.movedim(channel, -1).shape[:-1]) if t.ndim > 2 else () for t in (x, y)]
        found = (x.shape[channel], y.shape[channel])
        spec = self.adapter.spec
        if (
            found != (spec.dim, spec.dim_out)
            or places[0] != places[1]
            or (self.layout != 'bnc' and x.ndim != 4)
            or x.numel() == 0
        ):
            raise ValueError(
                f'expected features ({", ".join(self.layout.upper())}) of C={spec.dim} and C={spec.dim_out} channels '
                f'in the same places, got {tuple(x.shape)} and {tuple(y.shape)}.'
            )
