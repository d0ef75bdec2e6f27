"""What is read from a whole image: the one protocol by which tiles of an image share it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Statistics = tuple[Tensor, ...]
Core = tuple[slice, slice]  # rows and columns


class ImageWide(nn.Module):
    """A module that acts by a statistic of all tokens of an image.

    Its ``forward`` takes the statistic from :meth:`read`. That is the image's own, unless somebody has set
    ``exchange``, a function of the module and its features: see :class:`cea_arch.layers.whole_image.WholeImage`.

    Attributes:
        has_plan: Whether features have rows and columns, so that a core can be cut out.
        align: A core starts at multiples of so many rows and columns.
        reach: For the statistic of a core to be exact, features must go on for so many rows and columns beyond it.
    """

    has_plan = True
    align = 1
    reach = 0
    exchange: Callable[['ImageWide', Tensor], Statistics] | None = None

    def statistics(self, x: Tensor, core: Core | None = None) -> Statistics:
        """The statistic of features ``x``; or of what of them lies in ``core``, counted in their rows and columns.

        That of a part comes with what :meth:`merge` needs beside it.
        """
        raise NotImplementedError

    @staticmethod
    def merge(one: Statistics, other: Statistics) -> Statistics:
        """The statistic of two parts of an image together, exactly, from those of each."""
        raise NotImplementedError

    def read(self, x: Tensor) -> Statistics:
        """The statistic to act by."""
        return self.statistics(x) if self.exchange is None else self.exchange(self, x)


def merge_means(one: Statistics, other: Statistics) -> Statistics:
    """Merge weighted means of two sets of tokens, each a mean and the logarithm of its weight, into that of both.

    Exact: a softmax over tokens is a sum of exponentials, so the weights of its parts are their log-sum-exps.
    """
    log_weight = torch.logaddexp(one[1], other[1])
    shares = [(part[1] - log_weight).exp() for part in (one, other)]
    return one[0] * shares[0] + other[0] * shares[1], log_weight


def mean_of(x: Tensor) -> Statistics:
    """The mean over the pixels of ``(B, C, H, W)``, ``(B, C)``, and the logarithm of their number, ``(B, 1)``."""
    pixels = x.flatten(2)
    mean = pixels.mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.full_like(mean[:, :1], pixels.shape[-1]).log()
