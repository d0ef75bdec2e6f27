"""Run a network over an image in overlapping tiles: the image stays where it is, only tiles move to the device."""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.errors import UserError
from cea_arch.layers.whole_image import WholeImage

ALIGN = 16  # pixels; tiles and overlaps are multiples, so that cells of all levels and windows agree with the image's
SWEEPS = 3  # over the tiles for statistics before the last pass; each brings tiles some 20 dB closer to untiled
MIN_TILE = 64  # pixels; smaller ones are not tried when memory runs out
CPU_BUDGET = 3 * 2**27  # bytes of activations; picture, result, torch and what malloc keeps come on top
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in pixels of the image: ``[start, stop)``, and within it the core that is its own."""

    start: int
    stop: int
    core_start: int
    core_stop: int

    @property
    def all(self) -> slice:
        """All of the tile within the image."""
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        """The core within the tile."""
        return slice(self.core_start - self.start, self.core_stop - self.start)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Cut an axis of ``length`` pixels into tiles of at most ``tile`` that reach ``overlap`` beyond their cores."""
    if length <= tile:
        return [Span(0, length, 0, length)]
    cells = math.ceil(length / ALIGN)
    parts = math.ceil(cells / ((tile - 2 * overlap) // ALIGN))
    bounds = [round(number * cells / parts) * ALIGN for number in range(parts)] + [length]
    return [Span(max(a - overlap, 0), min(b + overlap, length), a, b) for a, b in pairwise(bounds)]


def check_tiles(tile: int, overlap: int) -> None:
    """Raise UserError unless tiles of ``tile`` pixels have room for an ``overlap`` on both sides."""
    for name, value in (('tile', tile), ('overlap', overlap)):
        if value < 0 or value % ALIGN:
            raise UserError(f'{name} must be a multiple of {ALIGN} pixels, got {value}.')
    if tile and tile < max(4 * overlap, MIN_TILE):
        raise UserError(f'tile must be at least {MIN_TILE} and four times the overlap of {overlap}, got {tile}.')


def blend(span: Span, length: int, overlap: int) -> Tensor:
    """Weights of a tile's pixels along one axis: 1 in its core, a raised cosine across each inner border.

    The ramp reaches a quarter of the overlap to both sides, so that what lies near a tile's edge, where convolutions
    miss pixels, does not count. Weights of neighbours add up to 1.
    """
    weights = torch.zeros(span.stop - span.start)
    reach = overlap // 4
    weights[span.core] = 1
    ramp = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(2 * reach) + 0.5) / (2 * reach)) if reach else torch.ones(0)
    for inner, border, values in (
        (span.core_start > 0, span.core.start, ramp),
        (span.core_stop < length, span.core.stop, 1 - ramp),
    ):
        if inner:
            part = weights[border - reach : border + reach]  # a short last tile may end within the ramp
            part[:] = values[: len(part)]
    return weights


@dataclass(frozen=True)
class Canvas:
    """An image that is read in tiles and its result that is written in rows, wherever and however both are kept.

    Attributes:
        size: Height and width of the image.
        read: Gives rows and columns of it, ``(1, 3, h, w)``, float32.
        write: Takes the number of a row and restored rows ``(1, 3, n, width)`` from there on, in order.
        scale: The result is so many times as high and as wide.
    """

    size: tuple[int, int]
    read: Callable[[slice, slice], Tensor]
    write: Callable[[int, Tensor], None]
    scale: int = 1


def restore_tiled(
    net: Callable[[Tensor], Tensor],
    whole: WholeImage | None,
    canvas: Canvas,
    tile: int,
    overlap: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    placed: Callable[[Span, Span], None] = lambda rows, columns: None,
) -> None:
    """Run ``net`` over the tiles of an image, blend what it gives, and write it row of tiles by row of tiles.

    Args:
        net: Maps a tile ``(1, 3, h, w)`` to one of ``canvas.scale`` times its size, on the same device.
        whole: Statistics of the whole image, entered; ``None`` leaves each tile to its own.
        canvas: The image and its result.
        tile, overlap: In pixels, see :func:`check_tiles`.
        progress: Called after each tile with the number of tiles done and the number of all, passes included.
        placed: Called after each tile of the last pass with its rows and columns.
    """
    height, width = canvas.size
    down, across = spans(height, tile, overlap), spans(width, tile, overlap)
    sweeps = SWEEPS if whole else 0
    steps = count(1)
    total = len(down) * len(across) * (sweeps + 1)
    for _ in range(sweeps):
        for rows, columns in product(down, across):
            part = canvas.read(rows.all, columns.all)
            with whole.collecting((rows.core, columns.core), tuple(part.shape[-2:]), overlap):
                net(part)
            progress(next(steps), total)
        whole.merge()
    scale = canvas.scale
    rest = torch.zeros(1, 3, 0, width * scale)  # of the row of tiles above, where it reaches into the next one
    for number, rows in enumerate(down, 1):
        band = F.pad(rest, (0, 0, 0, (rows.stop - rows.start) * scale - rest.shape[-2]))
        for columns in across:
            weights = blend(rows, height, overlap)[:, None] * blend(columns, width, overlap)
            place = slice(columns.start * scale, columns.stop * scale)
            restored = net(canvas.read(rows.all, columns.all))
            band[..., place] += restored * weights.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            placed(rows, columns)
            progress(next(steps), total)
        finished = ((down[number].start if number < len(down) else height) - rows.start) * scale
        canvas.write(rows.start * scale, band[..., :finished, :])
        rest = band[..., finished:, :]


def choose_tile(height: int, width: int, budget: int, bytes_per_pixel: int) -> int:
    """The largest square tile, in pixels, for which ``budget`` bytes suffice; 0 where the whole image fits."""
    pixels = budget // bytes_per_pixel
    if height * width <= pixels:
        return 0
    return max(math.isqrt(pixels) // ALIGN * ALIGN, 2 * MIN_TILE)


def memory_budget(device: torch.device, all_of_it: bool = False) -> int:
    """Bytes that a network may take for its activations; or all that there are."""
    if device.type == 'cuda':
        return int(torch.cuda.mem_get_info(device)[0] * (1 if all_of_it else 0.8))
    return _free_memory() if all_of_it else min(CPU_BUDGET, _free_memory() // 2)


def bytes_per_pixel(net: nn.Module, device: torch.device, multiple: int = 1) -> int:
    """Twice what the largest single step of ``net`` reads and writes for each pixel of the image, found by a dry run.

    Twice, because skips and intermediate results live beside it: our guess of what is enough.
    """
    largest = 0
    side = math.ceil(MIN_TILE / multiple) * multiple

    def record(_: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal largest
        largest = max(largest, sum(t.nbytes for t in (*args, out) if isinstance(t, Tensor)))

    handles = [m.register_forward_hook(record) for m in net.modules() if not any(m.children())]
    try:
        with torch.no_grad():
            net(torch.full((1, 3, side, side), 0.5, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return max(2 * largest // side**2, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or on the CPU."""
    words = ("can't allocate memory", 'out of memory', 'not enough memory')
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def halvings(tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Ever smaller tiles with their overlaps, from ``tile`` down."""
    while True:
        yield tile, min(overlap, tile // 4 // ALIGN * ALIGN)
        if tile <= MIN_TILE:
            return
        tile = max(tile // 2 // ALIGN * ALIGN, MIN_TILE)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, instead of returning it to the system and asking again.

    Measured on a CPU: half the time of restoring, two thirds of that of a training step, also with tensors of more than
    1 GiB. It holds for the whole process, which stays as large as it has once been, so it is for commands alone.
    """
    with suppress(OSError, AttributeError):  # not on other systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)  # the most it takes
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def _free_memory() -> int:
    """Bytes that can be had without swapping; where the system does not say, as if there were 4 GiB."""
    try:
        with open('/proc/meminfo', encoding='ascii') as lines:  # noqa: PTH123  not a user's file
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return 2 * CPU_BUDGET
