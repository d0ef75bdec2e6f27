"""The routing made visible: which component of CEA acts where in a picture."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cea_arch.errors import UserError, suggest
from cea_arch.layers import HyperAdapter
from cea_arch.layers.cea import Factors
from cea_arch.layers.whole_image import scale_of
from cea_arch.restoring.tiling import Span

PANEL_SIDE = 480  # pixels, at most
GAP = 4  # pixels between panels


class RoutingMaps:
    """Records the affinities, G = X A^T, of one target of one hyper-adapter while its network restores.

    Args:
        net: Network with CEA. Tokens without rows and columns of their own, as SwinIR's, are taken to be those of the
            picture or of a smaller one, row by row.
        name: A layer, such as ``decoder.0.0.attn.cea``, or one of its targets, ``decoder.0.0.attn.cea.q``; by default
            the last layer, and of a layer its first target.

    Raises:
        UserError: No such layer or target.
    """

    def __init__(self, net: nn.Module, name: str | None = None) -> None:
        layers = {name.removesuffix('.adapter'): m for name, m in net.named_modules() if isinstance(m, HyperAdapter)}
        if not layers:
            raise UserError('the network has no CEA layer whose routing could be drawn.')
        first = {layer: next(iter(m.spec.parts)) for layer, m in layers.items()}
        known = {layer: (layer, target) for layer, target in first.items()}
        known |= {f'{layer}.{target}': (layer, target) for layer, m in layers.items() for target in m.spec.parts}
        self.name = name or list(layers)[-1]
        if self.name not in known:
            raise UserError(f'no CEA layer {name!r}.{suggest(name, known)} There are {", ".join(layers)}.')
        layer, self.target = known[self.name]
        self.net = net
        self.adapter = layers[layer]
        self.maps: Tensor | None = None
        self._latest: Tensor | None = None
        self._size = (0, 0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See what the layer does; afterwards ``maps`` are the affinities of the picture, ``(r, h, w)`` on the CPU."""
        self.maps = None
        handles = [self.net.register_forward_pre_hook(self._note), self.adapter.register_forward_hook(self._record)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def place(self, rows: Span, columns: Span, size: tuple[int, int]) -> None:
        """Put the affinities of the tile just run into those of the picture of ``size`` (height, width) in pixels.

        Raises:
            UserError: The layer's tokens cannot be laid out as a picture.
        """
        tile = self._laid_out()
        lengths = (rows.stop - rows.start, columns.stop - columns.start)
        scales = [scale_of(pixels, cells) for pixels, cells in zip(lengths, tile.shape[1:])]
        if self.maps is None:
            self.maps = tile.new_zeros(len(tile), *(math.ceil(s / scale - 1e-6) for s, scale in zip(size, scales)))
        tops = [round(span.start / scale) for span, scale in zip((rows, columns), scales)]
        part = self.maps[:, tops[0] : tops[0] + tile.shape[1], tops[1] : tops[1] + tile.shape[2]]
        inner = [round(span.core.start / scale) for span, scale in zip((rows, columns), scales)]
        # what lies beyond the core is put too, and replaced by the tile that it belongs to
        part[:, inner[0] :, inner[1] :] = tile[:, inner[0] : part.shape[1], inner[1] : part.shape[2]]

    def _note(self, net: nn.Module, args: tuple) -> None:
        self._size = args[0].shape[-2:]

    def _record(self, adapter: HyperAdapter, args: tuple, factors: Factors) -> None:
        self._latest = adapter.affinities(args[0], factors)[self.target][0].float().cpu()

    def _laid_out(self) -> Tensor:
        """The latest affinities, ``(r, h, w)``; where tokens have no rows, as many rows as the picture's shape has."""
        if self.adapter.spec.condense:
            return self._latest
        try:
            return laid_out(self._latest.flatten(1), self._size)
        except UserError as error:
            raise UserError(f'{self.name} reads {error}') from error


def laid_out(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(n, N)`` of tokens without a plan as ``(n, h, w)``, in the shape of a picture of ``size``, or smaller.

    Raises:
        UserError: So many tokens make no such rows.
    """
    count, (height, width) = maps.shape[1], size
    step = max(round(math.sqrt(height * width / count)), 1)
    if height * width != count * step**2:
        raise UserError(f'{count} tokens, which are no rows of a {width} x {height} picture.')
    return maps.unflatten(1, (height // step, width // step))


def draw_maps(maps: Tensor) -> np.ndarray:
    """Draw affinities ``(r, h, w)`` as a sheet, RGB uint8: one panel a component, all in one scale.

    Red takes the component, blue takes it with the opposite sign, white leaves it.
    """
    scale = min(PANEL_SIDE / max(maps.shape[1:]), 1)
    size = [max(round(side * scale), 1) for side in maps.shape[1:]]
    small = nn.functional.interpolate(maps[None], size, mode='area')[0]
    limit = torch.quantile(small.abs().flatten()[:: max(small.numel() // 100_000, 1)], 0.99).clamp_min(1e-12)
    signed = (small / limit).clamp(-1, 1).numpy()
    rgb = np.stack([1 + signed.clip(max=0), 1 - abs(signed), 1 - signed.clip(min=0)], axis=-1)
    panels = [cv2.copyMakeBorder(p, *[GAP] * 4, cv2.BORDER_CONSTANT, value=(0,) * 3) for p in (rgb * 255).astype('u1')]
    columns = int(np.ceil(len(panels) ** 0.5))
    panels += [np.zeros_like(panels[0])] * (-len(panels) % columns)
    rows = [np.concatenate(panels[start : start + columns], axis=1) for start in range(0, len(panels), columns)]
    return np.concatenate(rows)
