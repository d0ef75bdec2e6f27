"""Restore pictures: arrays in, arrays of the same kind out. Needs no basicsr."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cea_arch.checkpoints import load_network
from cea_arch.errors import UserError
from cea_arch.layers.whole_image import WholeImage
from cea_arch.maps import RoutingMaps
from cea_arch.tiling import ALIGN, MIN_TILE, Span, check_tiles, choose_tile, halvings, is_out_of_memory, restore_tiled

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
CONDITIONINGS = ('whole', 'tile')


def choose_device(name: str = 'auto') -> torch.device:
    """The device of that name; ``auto``: CUDA, else Apple's MPS, else the CPU."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {name!r} cannot be used: {str(error).splitlines()[0]}') from error


class Restorer:
    """A network on a device that restores images of any size, in tiles where memory asks for it.

    Args:
        model: File of weights, see :func:`cea_arch.checkpoints.load_network`, or a network that maps RGB images
            ``(1, 3, H, W)`` in [0, 1] to the same shape.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: ``fp32``, or ``bf16`` or ``fp16`` under autocast; where that gives no finite numbers, fp32 is used
            and a warning says so.
        tile: Side in pixels of the square that is restored at once, overlaps included; 0: never tiled; ``auto``:
            whole if memory allows. Where memory runs out it is halved, and a warning says so.
        overlap: Pixels that a tile reaches beyond its own.
        conditioning: ``whole``: all tiles share the global statistics of the whole image, found in sweeps over the
            tiles; ``tile``: each has its own, which is faster and shows.
        progress: Called after each tile with the number of tiles done and the number of all.

    Attributes:
        maps: A :class:`cea_arch.maps.RoutingMaps` of the network, to be filled by each call; none by default.

    Raises:
        UserError: A word or size that is not possible, or a file that is no model.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        device: str = 'auto',
        precision: str = 'fp32',
        tile: int | str = 'auto',
        overlap: int = 32,
        conditioning: str = 'whole',
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        for name, value, known in (
            ('precision', precision, PRECISIONS),
            ('conditioning', conditioning, CONDITIONINGS),
        ):
            if value not in known:
                raise UserError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
        if tile != 'auto' and not isinstance(tile, int):
            raise UserError(f'tile must be auto or a number of pixels, got {tile!r}.')
        check_tiles(0 if tile == 'auto' else tile, overlap)
        self.device = choose_device(device)
        net = model if isinstance(model, nn.Module) else load_network(model)
        self.net = net.to(self.device).eval()
        self.dtype = PRECISIONS[precision]
        self.tile = tile
        self.overlap = overlap
        self.conditioning = conditioning
        self.progress = progress
        self.maps: RoutingMaps | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Restore an RGB image ``(1, 3, H, W)`` in [0, 1], float32 on the CPU; the same out, clipped.

        Raises:
            UserError: Memory does not suffice even for the smallest tile, or the network changes the image's size.
        """
        with self.maps.recording() if self.maps else nullcontext():
            return self._restore(x).clamp_(0, 1)

    def _restore(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tile = choose_tile(self.net, height, width, self.device) if self.tile == 'auto' else self.tile
        if not tile or max(height, width) <= tile:
            try:
                return restore_tiled(self._run, None, x, max(height, width), 0, self.progress, self._placer(x))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            tile = max(max(height, width) // 2 // ALIGN * ALIGN, MIN_TILE)
            warnings.warn(f'out of memory for {width} x {height} pixels at once: trying tiles of {tile}.', stacklevel=2)
        return self._restore_tiled(x, tile)

    def _restore_tiled(self, x: Tensor, tile: int) -> Tensor:
        for size, overlap in halvings(tile, self.overlap):
            whole = WholeImage(self.net) if self.conditioning == 'whole' else None
            try:
                with whole or nullcontext():
                    return restore_tiled(self._run, whole, x, size, overlap, self.progress, self._placer(x))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            warnings.warn(f'out of memory for tiles of {size} pixels: trying smaller ones.', stacklevel=3)
        raise UserError(f'out of memory even for tiles of {size} pixels; choose another device.')

    def _placer(self, x: Tensor) -> Callable[[Span, Span], None]:
        size = tuple(x.shape[-2:])
        return lambda rows, columns: self.maps.place(rows, columns, size) if self.maps else None

    def _run(self, x: Tensor) -> Tensor:
        """The network's output for ``x``, both on the CPU, float32."""
        restored = self._forward(x.to(self.device))
        if restored.shape != x.shape:
            raise UserError(
                f'the network makes {tuple(restored.shape)} of {tuple(x.shape)}: not one that restores at equal size.'
            )
        if self.dtype != torch.float32 and not restored.isfinite().all():
            warnings.warn('this precision gave numbers that are not finite: going on in fp32.', stacklevel=4)
            self.dtype = torch.float32
            restored = self._forward(x.to(self.device))
        return restored.cpu()

    def _forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.net(x).float()


def restore(image: np.ndarray, model: str | Path | nn.Module | Restorer, **options: object) -> np.ndarray:
    """Restore one image.

    Args:
        image: ``(H, W)`` grey, ``(H, W, 2)`` grey and alpha, ``(H, W, 3)`` RGB or ``(H, W, 4)`` RGB and alpha; uint8,
            uint16, or float in [0, 1].
        model: File of weights, network, or a :class:`Restorer` made before, which saves loading for every image.
        options: Of :class:`Restorer`.

    Returns:
        An array of the shape and dtype of ``image``; alpha is untouched.

    Raises:
        UserError: An image of another shape or dtype, or as :class:`Restorer`.
    """
    channels = image.shape[2] if image.ndim == 3 else 1
    known = image.dtype in (np.uint8, np.uint16) or np.issubdtype(image.dtype, np.floating)
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape or not known:
        raise UserError(
            f'expected an image (H, W) or (H, W, 1 to 4) of uint8, uint16 or float, got {image.shape} of {image.dtype}.'
        )
    restorer = model if isinstance(model, Restorer) else Restorer(model, **options)
    colours = 3 if channels > 2 else 1
    peak = np.iinfo(image.dtype).max if image.dtype.kind == 'u' else 1
    scaled = image.reshape(*image.shape[:2], channels)[..., :colours].astype(np.float32) / np.float32(peak)
    x = torch.from_numpy(scaled).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
    restored = restorer(x.contiguous())[0]
    del x, scaled
    if colours == 1:  # grey is restored as three equal channels
        restored = restored.mean(0, keepdim=True)
    restored = restored * peak
    values = (restored.round_() if image.dtype.kind == 'u' else restored).permute(1, 2, 0).numpy()
    out = image.copy().reshape(*image.shape[:2], channels)
    out[..., :colours] = values  # numpy casts whole numbers exactly
    return out.reshape(image.shape)
