"""What sizes a network takes and how large its result is, found by running it; images fitted to that."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cea_arch.errors import UserError
from cea_arch.restoring.tiling import is_out_of_memory

POWERS = (1, 2, 4, 8, 16, 32, 64)
PROBE_SIDES = (37, 53)  # pixels, about: odd, unequal, and enough for most networks' smallest
LARGEST_MULTIPLE = 256


@dataclass(frozen=True)
class Fit:
    """Which images suit a network.

    Attributes:
        multiple: Heights and widths must be multiples of it, in pixels.
        scale: The result is so many times as high and as wide.
    """

    multiple: int = 1
    scale: int = 1

    def run(self, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What ``net`` makes of images ``(B, C, H, W)`` of any size: continued by reflection, the result cropped."""
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            rows, columns = (_reflected(length, self.multiple).to(x.device) for length in (height, width))
            x = x[..., rows[:, None], columns]
        return net(x)[..., : height * self.scale, : width * self.scale]


@torch.no_grad()
def find_fit(net: nn.Module, device: torch.device) -> Fit:
    """The smallest multiple that ``net`` takes, and its scale.

    Tried are powers of two and multiples of what its modules call ``window_size``: the attribute alone would not say
    whether a network pads by itself.

    Raises:
        UserError: It takes RGB images of none of them, or what it gives is no RGB image of an integer scale.
        RuntimeError: Memory does not suffice.
    """
    windows = {size for m in net.modules() if isinstance(size := getattr(m, 'window_size', None), int)}
    multiples = set(POWERS) | {size * power for size in windows for power in POWERS}
    problem = ''
    for multiple in sorted(m for m in multiples if 0 < m <= LARGEST_MULTIPLE):
        # odd numbers of times, so that no larger power of two divides them
        height, width = (multiple * (math.ceil(side / multiple) | 1) for side in PROBE_SIDES)
        try:
            out = net(torch.full((1, 3, height, width), 0.5, device=device))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            problem = problem or f'{type(error).__name__} {error}'.splitlines()[0]
            continue
        scale = out.shape[-1] // width if isinstance(out, Tensor) and out.ndim == 4 else 0
        if scale and out.shape == (1, 3, height * scale, width * scale):
            return Fit(multiple, scale)
        problem = (
            problem or f'of (1, 3, {height}, {width}) it makes {tuple(getattr(out, "shape", ())) or type(out).__name__}'
        )
    raise UserError(f'not a network that restores RGB pictures, at their size or a multiple of it: {problem}.')


def _reflected(length: int, multiple: int) -> Tensor:
    """Places of an axis of ``length``, continued to and fro up to the next multiple."""
    places = torch.arange(math.ceil(length / multiple) * multiple)
    period = max(2 * (length - 1), 1)
    return torch.minimum(places % period, period - places % period)
