"""The tiles of one image with the statistics of the whole: what makes tiled restoration equal to untiled.

Every layer that looks at all tokens at once is an :class:`ImageWide`, and its statistics of parts of an image merge
exactly. But the features that a layer reads depend on the statistics of the layers before it, so no single pass over
tiles gives all of them: in each sweep over the tiles every layer acts by the statistics of the sweep before (in the
first, by the tile's own) and collects new ones. After n sweeps the first n layers are exact, and the others close to
it (our choice).
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from cea_arch.errors import Notice
from cea_arch.layers.image_wide import Core, ImageWide, Statistics
from cea_arch.layers.tokens import wide


class WholeImage:
    """Statistics of one image, collected from its tiles and used by them.

    Within ``with WholeImage(net) as whole:`` the network's layers use what is known of the image. A tile run within
    ``with whole.collecting(core, size, overlap):`` contributes its core, the part that belongs to no other tile;
    ``whole.merge()`` ends a sweep. Outside, the network is as it was. Tokens without a plan of rows and columns (layout
    ``bnc``) are counted with the whole tile, so its overlaps count twice.

    Cores start at multiples of a layer's ``align`` cells of its level, and tiles overlap by its ``reach`` cells; where
    they do not, a warning says that the statistics are approximate.

    Args:
        net: Any network.
    """

    def __init__(self, net: nn.Module) -> None:
        self.layers = [m for m in net.modules() if isinstance(m, ImageWide)]
        self.known: dict[nn.Module, Statistics] = {}
        self.found: dict[nn.Module, Statistics] = {}
        self.core: Core | None = None
        self.size = (0, 0)
        self.overlap = 0
        self.exact = True

    def __bool__(self) -> bool:
        """Whether the network has layers with image-wide statistics at all."""
        return bool(self.layers)

    def __enter__(self) -> 'WholeImage':
        for layer in self.layers:
            layer.exchange = self._exchange
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            del layer.exchange

    @contextmanager
    def collecting(self, core: Core, size: tuple[int, int], overlap: int) -> Iterator[None]:
        """Let the layers collect from the ``core`` of a tile of ``size`` (height, width), both in pixels.

        Towards its neighbours the tile reaches ``overlap`` pixels beyond its core.
        """
        self.core, self.size, self.overlap = core, size, overlap
        try:
            yield
        finally:
            self.core = None

    def merge(self) -> None:
        """End a sweep: what was collected is what is known."""
        self.known, self.found = self.found, {}

    def _exchange(self, layer: ImageWide, x: Tensor) -> Statistics:
        if self.core is not None:
            part = layer.statistics(x, self._cells(layer, x))
            part = tuple(t.to(wide(t.dtype)) for t in part)
            self.found[layer] = layer.merge(self.found[layer], part) if layer in self.found else part
        return self.known[layer] if layer in self.known else layer.statistics(x)

    def _cells(self, layer: ImageWide, x: Tensor) -> Core:
        """The tile's core in features ``x`` ``(B, C, H, W)``; all of them where there is no plan."""
        if not layer.has_plan:
            return slice(0, x.shape[2]), slice(0, x.shape[3])
        return tuple(self._side(layer, *side) for side in zip(self.core, self.size, x.shape[2:], strict=True))

    def _side(self, layer: ImageWide, core: slice, pixels: int, cells: int) -> slice:
        scale = scale_of(pixels, cells)
        start, stop = core.start / scale, cells if core.stop == pixels else core.stop / scale
        if self.exact and (start % layer.align or (stop < cells and stop % layer.align)):
            self._warn(f'cores of tiles do not start at multiples of {layer.align * scale:g} pixels')
        if self.exact and self.overlap < layer.reach * scale:
            self._warn(f'tiles overlap by {self.overlap} pixels, less than {layer.reach * scale:g}')
        return slice(round(start), round(stop))

    def _warn(self, reason: str) -> None:
        self.exact = False
        warnings.warn(f'{reason}: what they read of the whole image is approximate.', Notice, stacklevel=2)


def scale_of(pixels: int, cells: int) -> float:
    """How many pixels a side of a cell has: levels halve, and an odd size or a padded one would blur the ratio."""
    return 2.0 ** round(math.log2(pixels / cells))
