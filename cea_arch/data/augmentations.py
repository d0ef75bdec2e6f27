"""Changes of clean pictures before they are cropped and degraded, so that no colour, tone or size is the usual one.

A network that has seen nothing but well exposed, muted photographs takes dark, pale and strong ones for degraded. The
functions are pure; images are RGB float64 ``(H, W, 3)`` in [0, 1] unless said otherwise. All of it is our choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from cea_arch.data.degradations import LUMA, Array, log_uniform, quantize, smooth_field
from cea_arch.rules import Rule, list_of, number, section

_SHARE = number(minimum=0, maximum=1)
_RANGE = list_of(number(exclusiveMinimum=0), 2, 2)
AUGMENT_RULE: Rule = section(
    dict.fromkeys(('drawn', 'channels', 'grey', 'tone', 'fade', 'soft', 'crush'), _SHARE)
    | dict.fromkeys(('saturation', 'brightness', 'gamma'), _RANGE)
)
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'


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


def fade(img: Array, white: float, share: float | Array) -> Array:
    """Blend towards the grey level ``white`` by ``share``, a number or a map ``(H, W, 1)``.

    As fog, glare, distance and old prints do, but meant so.
    """
    return img + share * (white - img)


def crush(img: Array, share: float) -> Array:
    """Make the darkest ``share`` of the pixels black and keep white: a lit subject before black, as in a studio."""
    black = min(np.quantile(img @ LUMA, share), 0.7)
    return np.clip((img - black) / (1 - black), 0, 1)


def soft(img: Array, width: float) -> Array:
    """Blur by a Gaussian of standard deviation ``width`` in pixels: as soft as cameras' pixels are at full size."""
    return cv2.GaussianBlur(img, (9, 9), width)


def drawing(shape: Sequence[int], rng: Generator) -> Array:
    """What no photograph shows: an even area or a gradient, on half of them shapes, lines of text, or both; uint8.

    Args:
        shape: Height and width.
        rng: Source of all randomness.

    Returns:
        RGB ``(H, W, 3)``.
    """
    height, width = shape[:2]
    first, second = rng.uniform(0, 1, (2, 3)) if rng.random() < 0.5 else rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], (2, 1))
    angle = rng.uniform(0, 2 * np.pi)
    along = np.add.outer(np.sin(angle) * np.arange(height), np.cos(angle) * np.arange(width))
    along = (along - along.min()) / max(np.ptp(along), 1)
    share = (along if rng.random() < 0.5 else np.zeros_like(along))[..., None]
    img = np.ascontiguousarray(quantize(np.broadcast_to(first + share * (second - first), (height, width, 3))))
    if rng.random() < 0.5:
        return img
    ink = [int(value) for value in rng.integers(0, 256, 3)]
    for _ in range(rng.integers(0, 8)):
        color = [int(value) for value in rng.integers(0, 256, 3)]
        points = (rng.uniform(-0.2, 1.2, (rng.integers(2, 5), 2)) * (width, height)).astype(np.int32)
        if rng.random() < 0.5:
            cv2.fillPoly(img, [points], color, cv2.LINE_AA)
        else:
            radii = rng.integers(1, max(height // 2, 2), 2).tolist()
            cv2.ellipse(img, points[0].tolist(), radii, float(rng.uniform(0, 180)), 0, 360, color, -1, cv2.LINE_AA)
    size, top = rng.uniform(0.3, 1.2), 0
    while (top := top + int(rng.uniform(22, 40) * size)) < height and rng.random() < 0.8:
        words = ''.join(rng.choice(list(LETTERS + 12 * ' '), 60))
        start = (int(rng.uniform(-10, 20)), top)
        cv2.putText(img, words, start, int(rng.integers(0, 5)), size, ink, 1 + int(size > 0.8), cv2.LINE_AA)
    return img


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
            ``brightness`` and ``gamma`` (no range, no change); ``fade`` are faded by 0.2 to 0.7 towards 0.6 to 1, half
            of them from nothing to that over 100 to 600 pixels; ``crush`` get 20 to 70 % of their pixels black;
            ``soft`` are blurred by 0.4 to 1.2 pixels; ``drawn`` give way to a :func:`drawing`.
        rng: Source of all randomness.
    """
    if rng.random() < options.get('drawn', 0):
        return drawing(img.shape, rng)
    reordered, greyed, toned, faded, softened, crushed = (
        rng.random() < options.get(name, 0) for name in ('channels', 'grey', 'tone', 'fade', 'soft', 'crush')
    )
    order = rng.permutation(3)
    factors = {
        name: log_uniform(*options[name], rng) if name in options else 1.0
        for name in ('saturation', 'brightness', 'gamma')
    }
    if reordered:
        img = img[..., order]
    if not (greyed or toned or faded or softened or crushed):
        return img
    values = img / float(np.iinfo(img.dtype).max)
    if toned:
        values = tone(saturate(values, factors['saturation']), factors['brightness'], factors['gamma'])
    if crushed:
        values = crush(values, rng.uniform(0.2, 0.7))
    if faded:
        white, share = rng.uniform(0.6, 1), rng.uniform(0.2, 0.7)
        if rng.random() < 0.5:  # as distance does
            share = share * smooth_field(img.shape, rng, log_uniform(100, 600, rng))[..., None]
        values = fade(values, white, share)
    if softened:
        values = soft(values, rng.uniform(0.4, 1.2))
    return quantize(grey(values) if greyed else values)
