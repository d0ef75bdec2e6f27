"""Restore pictures: arrays in, arrays of the same kind out. Needs no basicsr."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cea_arch.errors import Notice, UserError
from cea_arch.files import PACKAGED_WEIGHTS
from cea_arch.layers.whole_image import WholeImage
from cea_arch.networks.from_file import load_network
from cea_arch.restoring.adapting import adapted
from cea_arch.restoring.blending import blended
from cea_arch.restoring.fitting import Fit, find_fit
from cea_arch.restoring.maps import RoutingMaps
from cea_arch.restoring.tiling import (
    ALIGN,
    MIN_TILE,
    Canvas,
    Span,
    bytes_per_pixel,
    check_tiles,
    choose_tile,
    halvings,
    is_out_of_memory,
    memory_budget,
    restore_tiled,
)
from cea_arch.threads import ThreadChooser

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
CONDITIONINGS = ('whole', 'tile')
OVERSHOOT = 0.5  # of floats beyond [0, 1], as other programs' filters leave it


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
            ``(1, 3, H, W)`` in [0, 1] to the same shape, or one that is an integer ``scale`` larger. One that takes
            multiples of some size alone gets images continued by reflection. By default CEA-IR-T as it comes with the
            package; ``cea_arch/weights/README.md`` says on what it was trained.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: ``fp32``, or ``bf16`` or ``fp16`` under autocast; where that gives no finite numbers, fp32 is used
            and a warning says so.
        tile: Side in pixels of the square that is restored at once, overlaps included; 0: never tiled; ``auto``:
            whole if memory allows. Where memory runs out it is halved, and a warning says so.
        overlap: Pixels that a tile reaches beyond its own.
        conditioning: ``whole``: all tiles share the global statistics of the whole image, found in sweeps over the
            tiles; ``tile``: each has its own, which is faster and shows.
        progress: Called after each tile with the number of tiles done and the number of all.
        strength: What comes out is so much of the result and else the input: 0 is the input, 1 the result.
        network_g: Options of the network in the file ``model``, where it does not say them.
        adapt: Steps in which the probes' queries follow each picture first, see :mod:`cea_arch.restoring.adapting`.
        keep_tones: Whether light, contrast and colours stay as the picture has them and details alone are restored, see
            :func:`cea_arch.restoring.blending.with_tones_of`: for pictures that neither haze nor low light has spoilt.

    Attributes:
        maps: A :class:`cea_arch.restoring.maps.RoutingMaps` of the network, to be filled by each call; none by default.
        threads: Chooses their number on a CPU by timing tiles, for the whole process; none by default.

    Raises:
        UserError: A word or size that is not possible, or a file that is no model.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = PACKAGED_WEIGHTS,
        device: str = 'auto',
        precision: str = 'fp32',
        tile: int | str = 'auto',
        overlap: int = 32,
        conditioning: str = 'whole',
        progress: Callable[[int, int], None] = lambda done, total: None,
        strength: float = 1.0,
        network_g: Mapping[str, Any] | None = None,
        adapt: int = 0,
        keep_tones: bool = False,
    ) -> None:
        for name, value, known in (
            ('precision', precision, PRECISIONS),
            ('conditioning', conditioning, CONDITIONINGS),
        ):
            if value not in known:
                raise UserError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
        if tile != 'auto' and not isinstance(tile, int):
            raise UserError(f'tile must be auto or a number of pixels, got {tile!r}.')
        if not 0 <= strength <= 1:
            raise UserError(f'strength must be from 0, the input, to 1, the result; got {strength!r}.')
        if adapt < 0:
            raise UserError(f'adapt must be a number of steps, 0 for none; got {adapt}.')
        check_tiles(0 if tile == 'auto' else tile, overlap)
        self.device = choose_device(device)
        net = model if isinstance(model, nn.Module) else load_network(model, network_g)
        self.net = net.to(self.device).eval()
        self.dtype = PRECISIONS[precision]
        self.tile = tile
        self.overlap = overlap
        self.conditioning = conditioning
        self.progress = progress
        self.strength = strength
        self.adapt = adapt
        self.keep_tones = keep_tones
        self.maps: RoutingMaps | None = None
        self.threads: ThreadChooser | None = None

    @cached_property
    def fit(self) -> Fit:
        """Which sizes the network takes, and its scale; of CEAIR, which takes any, those it was trained on."""
        fit = find_fit(self.net, self.device)
        return replace(fit, multiple=math.lcm(fit.multiple, getattr(self.net, 'trained_multiple', 1)))

    @cached_property
    def bytes_per_pixel(self) -> int:
        """What the network needs for each pixel that it restores at once."""
        return bytes_per_pixel(self.net, self.device, self.fit.multiple)

    def __call__(self, x: Tensor) -> Tensor:
        """Restore an RGB image ``(1, 3, H, W)`` in [0, 1], float32 on the CPU; the result, clipped.

        Raises:
            UserError: Memory does not suffice even for the smallest tile, the network restores no RGB pictures, or
                ``x`` holds no numbers or some far from [0, 1].
        """
        _check_values(float(x.min()), float(x.max()))
        height, width = x.shape[-2:]
        out = x.new_empty(1, 3, height * self.fit.scale, width * self.fit.scale)

        def write(top: int, rows: Tensor) -> None:
            out[..., top : top + rows.shape[-2], :] = rows.clamp(0, 1)

        self.paint(
            Canvas((height, width), lambda rows, columns: x[..., rows, columns].clamp(0, 1), write, self.fit.scale)
        )
        return out

    @torch.no_grad()
    def paint(self, canvas: Canvas) -> None:
        """Restore an image wherever it is kept; what is written is not clipped. Errors as for a call."""
        if self.adapt and self.fit.scale > 1:
            raise UserError('adapt: the network enlarges, so a picture cannot tell it what was hidden.')
        following = adapted(self.net, partial(self.fit.run, self.net), canvas.read, canvas.size, self.adapt)
        with following, self.maps.recording() if self.maps else nullcontext():
            height, width = canvas.size
            tile = self._tile_for(height, width)
            if not tile or max(height, width) <= tile:
                try:
                    self._run_tiles(canvas, None, max(height, width), 0)
                    return
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                tile = max(max(height, width) // 2 // ALIGN * ALIGN, MIN_TILE)
                warnings.warn(
                    f'out of memory for {width} x {height} pixels at once: trying tiles of {tile}.',
                    Notice,
                    stacklevel=3,
                )
            self._paint_tiles(canvas, tile)

    def _tile_for(self, height: int, width: int) -> int:
        """Side of the tiles for an image; 0: none. What was asked for is made smaller where memory cannot suffice."""
        try:
            self.bytes_per_pixel  # noqa: B018  found by a dry run
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return MIN_TILE if self.tile == 'auto' else self.tile
        if self.tile == 'auto':
            return choose_tile(height, width, memory_budget(self.device), self.bytes_per_pixel)
        high, wide = (min(side, self.tile or side) for side in (height, width))
        free = memory_budget(self.device, all_of_it=True)
        tile = choose_tile(high, wide, free, self.bytes_per_pixel)
        if not tile:
            return self.tile
        warnings.warn(
            f'{wide} x {high} pixels at once want some {high * wide * self.bytes_per_pixel / 1e9:.1f} GB, and '
            f'{free / 1e9:.1f} GB are free: tiles of {tile} are taken instead of {self.tile or "the whole picture"}.',
            Notice,
            stacklevel=4,
        )
        return tile

    def _paint_tiles(self, canvas: Canvas, tile: int) -> None:
        for size, overlap in halvings(tile, self.overlap):
            whole = WholeImage(self.net) if self.conditioning == 'whole' else None
            try:
                with whole or nullcontext():
                    self._run_tiles(canvas, whole, size, overlap)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            warnings.warn(f'out of memory for tiles of {size} pixels: trying smaller ones.', Notice, stacklevel=4)
        raise UserError(f'out of memory even for tiles of {size} pixels; choose another device.')

    def _run_tiles(self, canvas: Canvas, whole: WholeImage | None, tile: int, overlap: int) -> None:
        def place(rows: Span, columns: Span) -> None:
            if self.maps:
                self.maps.place(rows, columns, canvas.size)

        restore_tiled(self._run, whole, canvas, tile, overlap, self.progress, place)

    def _run(self, x: Tensor) -> Tensor:
        """The network's output for ``x``, both on the CPU, float32."""
        restored = self._forward(x.to(self.device))
        if self.dtype != torch.float32 and not restored.isfinite().all():
            warnings.warn('this precision gave numbers that are not finite: going on in fp32.', Notice, stacklevel=4)
            self.dtype = torch.float32
            restored = self._forward(x.to(self.device))
        return blended(x, restored.cpu(), self.strength, self.keep_tones)

    def _forward(self, x: Tensor) -> Tensor:
        timed = self.threads.piece(x.numel()) if self.threads else nullcontext()
        with timed, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.fit.run(self.net, x).float()


def restore(
    image: np.ndarray, model: str | Path | nn.Module | Restorer = PACKAGED_WEIGHTS, **options: object
) -> np.ndarray:
    """Restore one image.

    Args:
        image: ``(H, W)`` grey, ``(H, W, 2)`` grey and alpha, ``(H, W, 3)`` RGB or ``(H, W, 4)`` RGB and alpha; uint8,
            uint16, or float in [0, 1].
        model: File of weights, network, or a :class:`Restorer` made before, which saves loading for every image.
        options: Of :class:`Restorer`.

    Returns:
        An array of the dtype of ``image`` and, unless the network enlarges, of its shape; alpha is untouched.

    Raises:
        UserError: An image of another shape or dtype, floats that are no numbers or far from [0, 1], or as
            :class:`Restorer`.
    """
    channels = image.shape[2] if image.ndim == 3 else 1
    known = image.dtype in (np.uint8, np.uint16) or np.issubdtype(image.dtype, np.floating)
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape or not known:
        raise UserError(
            f'expected an image (H, W) or (H, W, 1 to 4) of uint8, uint16 or float, got {image.shape} of {image.dtype}.'
        )
    if image.dtype.kind == 'f':
        _check_values(float(image.min()), float(image.max()))
    restorer = model if isinstance(model, Restorer) else Restorer(model, **options)
    pixels = image.reshape(*image.shape[:2], channels)
    out = enlarged(pixels, restorer.fit.scale)
    colours = 3 if channels > 2 else 1
    peak = np.iinfo(image.dtype).max if image.dtype.kind == 'u' else 1

    def read(rows: slice, columns: slice) -> Tensor:
        part = pixels[rows, columns, :colours].astype(np.float32) / np.float32(peak)
        if image.dtype.kind == 'f':
            part = part.clip(0, 1)
        return torch.from_numpy(part).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).contiguous()

    def write(top: int, rows: Tensor) -> None:
        rows = rows.clamp(0, 1)
        if colours == 1:  # grey is restored as three equal channels
            rows = rows.mean(1, keepdim=True)
        rows = rows * peak
        values = (rows.round_() if image.dtype.kind == 'u' else rows)[0].permute(1, 2, 0).numpy()
        out[top : top + len(values), :, :colours] = values  # numpy casts whole numbers exactly

    restorer.paint(Canvas(image.shape[:2], read, write, restorer.fit.scale))
    return out.reshape(*out.shape[:2], *image.shape[2:])


def _check_values(lowest: float, highest: float) -> None:
    """Raise UserError unless an image's floats lie in [0, 1]; a little beyond is clipped, with a warning."""
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise UserError('expected floats in [0, 1], found some that are not finite (NaN or infinite).')
    if lowest < -OVERSHOOT or highest > 1 + OVERSHOOT:
        hint = f' Divide by {255 if highest <= 255 else 65535} first.' if lowest >= 0 and highest <= 65535 else ''
        raise UserError(f'expected floats in [0, 1], found {lowest:g} to {highest:g}.{hint}')
    if lowest < 0 or highest > 1:
        warnings.warn(f'values of {lowest:g} to {highest:g} are clipped to [0, 1].', Notice, stacklevel=3)


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """A copy of pixels ``(H, W, channels)``, so many times as high and as wide, by cubic interpolation."""
    if scale == 1:
        return pixels.copy()
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    large = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC).reshape(*size[::-1], -1)
    return large if pixels.dtype.kind == 'u' else large.clip(0, 1)
