"""What of the network's output is taken, and what of the picture that went in. All tensors RGB, float32, on the CPU."""

import cv2
import numpy as np
from torch import Tensor
from torch.nn import functional as F

RADIUS = 16  # pixels of a box; two boxes reach 32 pixels, which is what tiles overlap by default
FLAT = 1e-4  # variance, of values in [0, 1], below which a neighbourhood is taken for flat


def blended(x: Tensor, restored: Tensor, strength: float, keep_tones: bool) -> Tensor:
    """The result for an input ``x`` ``(1, 3, H, W)`` in [0, 1], and a network's output of this size or a larger one.

    Args:
        strength: 0 is the input, enlarged where the output is; 1 the output.
        keep_tones: Whether to give the output the input's tones first (:func:`with_tones_of`).
    """
    if strength == 1 and not keep_tones:
        return restored
    if restored.shape != x.shape:
        x = F.interpolate(x, size=restored.shape[-2:], mode='bicubic', align_corners=False).clamp(0, 1)
    restored = restored.clamp(0, 1)
    if keep_tones:
        restored = with_tones_of(x, restored)
    return x.lerp(restored, strength)


def with_tones_of(x: Tensor, restored: Tensor) -> Tensor:
    """``restored`` with the light and contrast of ``x``, as smooth in both as a neighbourhood of 33 pixels.

    Each channel becomes ``a restored + b``, of all straight lines the one that comes nearest to ``x`` around a pixel: a
    guided filter, after He et al., "Guided image filtering" (2010), with ``restored`` as its guide. Where that is flat
    ``a`` tends to 1 instead of 0, our choice: an output that is its input stays as it is.
    """
    mean, mean_x = _box(restored), _box(x)
    covariance = _box(x * restored) - mean_x * mean
    a = (covariance + FLAT) / (_box(restored * restored) - mean * mean + FLAT)
    return _box(a) * restored + _box(mean_x - a * mean)


def tones_moved(picture: np.ndarray, restored: np.ndarray) -> float:
    """By how many levels the light of a restored picture differs from the picture's, of 255, on average over places.

    Args:
        picture, restored: RGB uint8 ``(H, W, 3)``; seen on a grid of at most 48 places along a side.
    """
    high, wide = picture.shape[:2]
    places = tuple(max(round(48 * side / max(high, wide)), 1) for side in (wide, high))
    before, after = (cv2.resize(img, places, interpolation=cv2.INTER_AREA) for img in (picture, restored))
    return float(cv2.absdiff(before, after).mean())


def _box(x: Tensor) -> Tensor:
    """Means over squares, of what lies within the image alone."""
    for kernel, padding in (((2 * RADIUS + 1, 1), (RADIUS, 0)), ((1, 2 * RADIUS + 1), (0, RADIUS))):
        x = F.avg_pool2d(x, kernel, 1, padding, count_include_pad=False)
    return x
