"""Changes of clean pictures before they are cropped and degraded, so that no colour, tone or size is the usual one.

A network that has seen nothing but well exposed, muted photographs takes dark, pale and strong ones for degraded. The
functions are pure; images are RGB float64 ``(H, W, 3)`` in [0, 1] unless said otherwise. All of it is our choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from cea_arch.data.degradations import LUMA, Array, quantize
from cea_arch.rules import Rule, list_of, number, section

_SHARE = number(minimum=0, maximum=1)
_RANGE = list_of(number(exclusiveMinimum=0), 2, 2)
AUGMENT_RULE: Rule = section(
    {'channels': _SHARE, 'grey': _SHARE, 'tone': _SHARE, 'saturation': _RANGE, 'brightness': _RANGE, 'gamma': _RANGE}
)


def grey(img: Array) -> Array:
    """Its luminance (Rec. 601) in all three channels."""
    return np.repeat((img @ LUMA)[..., None], 3, 2)


def saturate(img: Array, factor: float) -> Array:
    """Move colours away from grey (``factor`` above 1) or towards it, and clip."""
    luminance = (img @ LUMA)[..., None]
    return np.clip(luminance + factor * (img - luminance), 0, 1)


def tone(img: Array, brightness: float, gamma: float) -> Array:
    """``(brightness * img) ^ gamma``, clipped before; ``gamma`` above 1 darkens the middle."""
    return np.clip(brightness * img, 0, 1) ** gamma


def shrink(images: Sequence[Array], rng: Generator, least: int) -> list[Array]:
    """Reduce images, uint8 or uint16, all alike by area averaging, so that a patch shows more of the scene.

    The factor is log-uniform, up to that with which the shorter side has ``least`` pixels.
    """
    height, width = images[0].shape[:2]
    factor = (min(height, width) / least) ** rng.random()
    size = tuple(max(round(side / factor), least) for side in (width, height))
    return [cv2.resize(img, size, interpolation=cv2.INTER_AREA) for img in images]


def augment(img: Array, options: Mapping[str, Any], rng: Generator) -> Array:
    """Change colours and tones of a clean image, uint8 or uint16; what changes is rounded to uint8.

    Args:
        img: RGB ``(H, W, 3)``.
        options: By name, shares of samples: ``channels`` get their channels in another order, ``grey`` become grey,
            ``tone`` get another saturation, brightness and gamma, log-uniform in the ranges ``saturation``,
            ``brightness`` and ``gamma`` (no range, no change).
        rng: Source of all randomness.
    """
    reordered, greyed, toned = (rng.random() < options.get(name, 0) for name in ('channels', 'grey', 'tone'))
    order = rng.permutation(3)
    factors = {
        name: float(np.exp(rng.uniform(*np.log(options[name])))) if name in options else 1.0
        for name in ('saturation', 'brightness', 'gamma')
    }
    if reordered:
        img = img[..., order]
    if not (greyed or toned):
        return img
    values = img / float(np.iinfo(img.dtype).max)
    if toned:
        values = tone(saturate(values, factors['saturation']), factors['brightness'], factors['gamma'])
    return quantize(grey(values) if greyed else values)
