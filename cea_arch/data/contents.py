"""What a picture shows, in a few numbers: enough to see that two are the same, belong together, or share a part."""

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

SIDE = 24  # pixels of the small picture
# pairs of all degradations at their strongest have a likeness of 0.41 or more, those of two scenes one of 0.28 or less
UNLIKE = 0.33
_STRIDE = 1024  # one place of so many, chosen by what is there, is remembered
_WINDOW = 8  # pixels, whose hash a place is known by
_FACTORS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


@dataclass(frozen=True, eq=False)
class Contents:
    """Of one file.

    Attributes:
        size: Height and width in pixels.
        digest: A hash of its pixels, whatever format they are stored in.
        small: Logarithm of its luminance, ``(SIDE, SIDE)`` float16.
        grey: Whether all its channels are equal.
        brightness: Mean luminance, in [0, 1].
        sharpness: Mean difference of neighbouring pixels' luminance, in [0, 1].
        places: Hashes of small windows at places that what is there decides, so that a cut of a picture has the same;
            none where they were not asked for.
    """

    size: tuple[int, int]
    digest: bytes
    small: np.ndarray
    grey: bool
    brightness: float
    sharpness: float
    places: np.ndarray

    @property
    def contrast(self) -> float:
        """Standard deviation of the small picture's luminance."""
        return float(np.expm1(self.small.astype(np.float32)).std())


def look_at(img: np.ndarray, with_places: bool) -> Contents:
    """The contents of a picture, RGB ``(H, W, 3)``, uint8 or uint16."""
    img = np.ascontiguousarray(img)
    digest = hashlib.blake2b(img, digest_size=16).digest()
    if img.dtype == np.uint16:
        img = (img >> 8).astype(np.uint8)
    light = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(light.astype(np.float32) / 255, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return Contents(
        size=img.shape[:2],
        digest=digest,
        small=np.log1p(small * 255).astype(np.float16),
        grey=bool((img[..., 0] == img[..., 1]).all() and (img[..., 1] == img[..., 2]).all()),
        brightness=float(small.mean()),
        sharpness=float(cv2.absdiff(light[:, 1:], light[:, :-1]).mean() / 255) if light.shape[1] > 1 else 0.0,
        places=_places(img) if with_places else np.empty(0, np.uint64),
    )


def likeness(one: Contents, other: Contents) -> float:
    """Correlation of both pictures' slopes, in [-1, 1]: high for a scene and its degraded version."""
    a, b = (_slopes(contents.small) for contents in (one, other))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-9))


def _slopes(small: np.ndarray) -> np.ndarray:
    small = small.astype(np.float32)
    return np.stack([np.diff(small, axis=1)[:-1], np.diff(small, axis=0)[:, :-1]])


def _places(img: np.ndarray) -> np.ndarray:
    if min(img.shape[:2]) < 2 * _WINDOW:
        return np.empty(0, np.uint64)
    values = img.astype(np.uint64) @ np.array([1, 1 << 8, 1 << 16], np.uint64)
    hashes = values
    for factor in _FACTORS:  # down, and then across
        count = len(hashes) - _WINDOW + 1
        total = hashes[:count]
        for k in range(1, _WINDOW):
            total = total * factor + hashes[k : k + count]  # wraps, as it should
        hashes = total.T
    corner = values[: hashes.shape[0], : hashes.shape[1]]
    flat = (corner == values[_WINDOW - 1 :, : hashes.shape[1]]) & (corner == values[: hashes.shape[0], _WINDOW - 1 :])
    chosen = (hashes * _FACTORS[0] >> np.uint64(40)) % np.uint64(_STRIDE) == 0
    return np.unique(hashes[chosen & ~flat])


def tones(img: np.ndarray) -> dict[str, float]:
    """How light a picture is and how black its blacks, which is what low light and haze change.

    Args:
        img: RGB ``(H, W, 3)``, uint8 or uint16.

    Returns:
        ``brightness``, the mean of all values, and ``dark_channel``: each half-size pixel's darkest channel among its
        25 neighbours, and of these the level that a tenth lie below. Both in [0, 1]; pale scenes have 0.13 and more.
    """
    half = cv2.resize(np.ascontiguousarray(img), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    half = half / np.iinfo(img.dtype).max
    dark = cv2.erode(half.min(2), np.ones((5, 5)))
    return {'brightness': float(half.mean()), 'dark_channel': float(np.quantile(dark, 0.1))}
