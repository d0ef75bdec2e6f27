"""The tiles of one image with the global statistics of the whole: what makes tiled restoration equal to untiled.

Two kinds of layer look at all tokens at once: the hyper-adapter of a :class:`CEALayer` (softmax-weighted means) and
:class:`ChannelAttention` (products of channels). Both statistics of parts of an image merge exactly. But the features
that a layer reads depend on the statistics of the layers before it, so no single pass over tiles gives all of them: in
each sweep over the tiles every layer acts by the statistics of the sweep before (in the first, by the tile's own) and
collects new ones. After n sweeps the first n layers are exact, and the others close to it (our choice).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import CEALayer
from cea_arch.layers.transformer import ChannelAttention, merge_products

Region = tuple[slice, slice]


class WholeImage:
    """Global statistics of one image, collected from its tiles and used by them.

    Within ``with WholeImage(net) as whole:`` the network's layers use what is known of the image. A tile run within
    ``with whole.collecting(core, size):`` contributes its core, the part that belongs to no other tile;
    ``whole.merge()`` ends a sweep. Outside, the network is as it was. Tokens without a plan of rows and columns (layout
    ``bnc``) are counted with the whole tile, so its overlaps count twice.

    Args:
        net: Any network; its CEA layers and channel attentions are found.
    """

    def __init__(self, net: nn.Module) -> None:
        self.layers = [m for m in net.modules() if isinstance(m, CEALayer) and hasattr(m.adapter, 'statistics')]
        self.attentions = [m for m in net.modules() if isinstance(m, ChannelAttention)]
        self.known: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.found: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.core: Region | None = None
        self.size = (0, 0)
        self.handles = []

    def __bool__(self) -> bool:
        """Whether the network has layers with global statistics at all."""
        return bool(self.layers or self.attentions)

    def __enter__(self) -> 'WholeImage':
        for layer in self.layers:
            self.handles.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
        for attention in self.attentions:
            self.handles.append(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))
            self.handles.append(attention.qkv_dwconv.register_forward_hook(self._read_attention(attention)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def collecting(self, core: Region, size: tuple[int, int]) -> Iterator[None]:
        """Let the layers collect from the ``core`` of a tile of ``size`` (height, width), both in pixels."""
        self.core, self.size = core, size
        try:
            yield
        finally:
            self.core = None

    def merge(self) -> None:
        """End a sweep: what was collected is what is known."""
        self.known, self.found = self.found, {}

    def _before_layer(self, layer: CEALayer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = args[0]
        if self.core is not None:
            self._add(layer, layer.statistics(x[self._region(x, layer.layout)]), merge_means)
        if layer not in self.known:
            return None
        return args, {'components': layer.adapter.components(self.known[layer][0], x.dtype)}

    def _before_attention(self, attention: ChannelAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return (args, {'statistics': self.known[attention]}) if attention in self.known else None

    def _read_attention(self, attention: ChannelAttention) -> Callable[[nn.Module, tuple, Tensor], None]:
        def read(_: nn.Module, args: tuple, qkv: Tensor) -> None:
            if self.core is not None:
                self._add(attention, attention.statistics(qkv[self._region(qkv, 'bchw')]), merge_products)

        return read

    def _add(self, module: nn.Module, statistics: tuple[Tensor, ...], merge: Callable[..., tuple]) -> None:
        statistics = tuple(t.float() if t.dtype.itemsize < 4 else t for t in statistics)
        seen = self.found.get(module)
        self.found[module] = statistics if seen is None else merge(seen, statistics)

    def _region(self, x: Tensor, layout: str) -> tuple[Any, ...]:
        """The tile's core in features ``x``, whose scale follows from the tile's size; ``()`` takes all."""
        if layout == 'bnc':
            return ()
        axes = (2, 3) if layout == 'bchw' else (1, 2)
        region: list[Any] = [slice(None)] * 4
        for axis, core, pixels in zip(axes, self.core, self.size, strict=True):
            length = x.shape[axis]
            scale = 2.0 ** round(math.log2(pixels / length))
            stop = length if core.stop == pixels else round(core.stop / scale)
            region[axis] = slice(round(core.start / scale), stop)
        return tuple(region)


def merge_means(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge weighted means of two sets of tokens, each a mean and the logarithm of its weight, into that of both.

    Exact: a softmax over tokens is a sum of exponentials, so the weights of its parts are their log-sum-exps.
    """
    log_weight = torch.logaddexp(one[1], other[1])
    shares = [(part[1] - log_weight).exp() for part in (one, other)]
    return one[0] * shares[0] + other[0] * shares[1], log_weight
