"""The routing made visible: which component of a CEA layer acts where in a picture."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cea_arch.errors import UserError, suggest
from cea_arch.layers import CEALayer
from cea_arch.tiling import Span

PANEL_SIDE = 480  # pixels, at most
GAP = 4  # pixels between panels


class RoutingMaps:
    """Records the affinities of one CEA layer while its network restores.

    Args:
        net: Network with CEA layers in ``(B, C, H, W)`` or ``(B, H, W, C)``.
        name: Qualified name of the layer; by default the last one.

    Raises:
        UserError: No layer of that name, or one without a plan of rows and columns.
    """

    def __init__(self, net: nn.Module, name: str | None = None) -> None:
        layers = {name: m for name, m in net.named_modules() if isinstance(m, CEALayer) and m.layout != 'bnc'}
        if not layers:
            raise UserError('the network has no CEA layer whose routing could be drawn.')
        self.name = name or list(layers)[-1]
        if self.name not in layers:
            raise UserError(f'no CEA layer {name!r}.{suggest(name, layers)} There are {", ".join(layers)}.')
        self.layer = layers[self.name]
        self.maps: Tensor | None = None
        self._latest: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """See what the layer does; afterwards ``maps`` are the affinities of the picture, ``(r, h, w)`` on the CPU."""
        self.maps = None
        handle = self.layer.register_forward_hook(self._record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def place(self, rows: Span, columns: Span, size: tuple[int, int]) -> None:
        """Put the affinities of the tile just run into those of the picture of ``size`` (height, width) in pixels."""
        tile = self._latest
        # levels halve; an odd size or a padded one would blur the ratio
        pairs = zip(tile.shape[1:], (rows.stop - rows.start, columns.stop - columns.start))
        ratios = [2.0 ** round(math.log2(cells / pixels)) for cells, pixels in pairs]
        if self.maps is None:
            self.maps = tile.new_zeros(len(tile), *(math.ceil(s * r - 1e-6) for s, r in zip(size, ratios)))
        tops = [round(span.start * ratio) for span, ratio in zip((rows, columns), ratios)]
        part = self.maps[:, tops[0] : tops[0] + tile.shape[1], tops[1] : tops[1] + tile.shape[2]]
        inner = [round(span.core.start * r) for span, r in zip((rows, columns), ratios)]
        # what lies beyond the core is put too, and replaced by the tile that it belongs to
        part[:, inner[0] :, inner[1] :] = tile[:, inner[0] : part.shape[1], inner[1] : part.shape[2]]

    def _record(self, layer: CEALayer, args: tuple, kwargs: dict, out: Tensor) -> None:
        plan = args[0].shape[2:] if layer.layout == 'bchw' else args[0].shape[1:3]
        affinities = layer.affinities(args[0], kwargs.get('components'))  # (1, h*w, r)
        self._latest = affinities[0].T.unflatten(1, plan).float().cpu()


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
