"""Synthetic degradations: pure functions of an image, explicit parameters and, where they draw, a NumPy generator.

Images are RGB float64 ``(H, W, 3)`` in [0, 1], maps float64 ``(H, W)`` in [0, 1]; results are neither clipped nor
quantised unless said so, see :func:`quantize`. Float64 keeps the 8-bit results the same on every platform.

Low light, rain, snow and haze follow the formulas with which the CDD-11 benchmark was made; so does their order. Blur,
noise and compression come after them, as optics, sensor and file do (our choice). Streaks, flakes and depth are drawn
by plain generators of our own, since the benchmark's masks and depth maps are not public.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.random import Generator

Array = np.ndarray
TASKS = ('low_light', 'rain', 'snow', 'haze', 'blur', 'noise')  # what synthesize draws from by default; ORDER has all
PERIOD = 160.0  # pixels
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601, RGB


def quantize(img: Array, mode: str = 'round') -> Array:
    """Clip to [0, 1] and turn into 8-bit levels: ``round``, or ``trunc`` as the literature does for Gaussian noise."""
    levels = np.clip(img, 0, 1) * 255
    return (np.rint(levels) if mode == 'round' else np.floor(levels + 1e-9)).astype(np.uint8)


def gaussian_noise(img: Array, sigma: float, rng: Generator) -> Array:
    """Add independent noise of standard deviation ``sigma``, in 8-bit levels, to every pixel and channel."""
    return img + sigma / 255 * rng.standard_normal(img.shape)


def shot_noise(img: Array, sigma: float | Array, rng: Generator) -> Array:
    """Add noise as of counted photons: its variance grows with brightness, to ``sigma`` (8-bit levels) at white."""
    return img + sigma / 255 * np.sqrt(np.clip(img, 0, 1)) * rng.standard_normal(img.shape)


def chroma_noise(img: Array, sigma: float | Array, rng: Generator) -> Array:
    """Add coloured blotches a few pixels wide, of no luminance and standard deviation ``sigma`` in 8-bit levels."""
    noise = cv2.GaussianBlur(rng.standard_normal(img.shape), (7, 7), 1.2)
    noise -= (noise @ LUMA)[..., None]
    return img + sigma / 255 * noise / noise.std()


def camera_noise(img: Array, sigma: float | Array, width: float, rng: Generator) -> Array:
    """Add noise as files of cameras have it: of photons, most of it of luminance, its grains smeared by demosaicking.

    Args:
        img: The clear image.
        sigma: Standard deviation at white, in 8-bit levels; at black 0.45 times that.
        width: Of a grain, the standard deviation of a Gaussian in pixels.
        rng: Source of all randomness.
    """
    noise = rng.standard_normal((*img.shape[:2], 1)) + 0.6 * rng.standard_normal(img.shape)
    noise = cv2.GaussianBlur(noise, (9, 9), width)
    return img + sigma / 255 * np.sqrt(0.2 + 0.8 * np.clip(img, 0, 1)) * noise / noise.std()


def low_light(img: Array, gamma: float | Array, sigma: float | Array, rng: Generator) -> Array:
    """``clip(J * light^(gamma - 1) + N(0, sigma^2))`` with ``light`` the luminance, box-blurred 3x3 twice.

    ``gamma`` (2 to 3 in CDD-11) and ``sigma`` (0.03 to 0.08, in [0, 1] units) may be maps ``(H, W, 1)``.
    """
    light = cv2.blur(cv2.blur(img @ LUMA, (3, 3)), (3, 3))[..., None] + 1e-7
    return np.clip(img * light ** (gamma - 1) + sigma * rng.standard_normal(img.shape), 0, 1)


def rain(img: Array, streaks: Array) -> Array:
    """Add bright streaks ``(H, W)`` to all channels."""
    return img + streaks[..., None]


def snow(img: Array, flakes: Array) -> Array:
    """Cover the image with white flakes of opacity ``flakes`` ``(H, W)``."""
    opacity = flakes[..., None]
    return img * (1 - opacity) + opacity


def haze(img: Array, depth: Array, beta: float, airlight: float) -> Array:
    """``clip(J t + A (1 - t))``, ``t = exp(-beta min(1 - blur(depth), 0.7))``.

    Args:
        img: The clear image J.
        depth: Inverse depth, 1 is near; box-blurred over 22 pixels as in CDD-11.
        beta: Scattering, 1 to 2 in CDD-11.
        airlight: Grey level A of the haze, 0.6 to 0.9 in CDD-11.
    """
    transmission = np.exp(-beta * np.minimum(1 - cv2.blur(depth, (22, 22)), 0.7))[..., None]
    return np.clip(img * transmission + airlight * (1 - transmission), 0, 1)


def blur(img: Array, kernel: Array, strength: float | Array = 1.0) -> Array:
    """Blend towards the image filtered by ``kernel``, by ``strength`` (a number or a map ``(H, W, 1)``)."""
    return img + strength * (cv2.filter2D(img, -1, kernel, borderType=cv2.BORDER_REFLECT_101) - img)


def defocus(img: Array, radius: float) -> Array:
    """Filter by an anti-aliased disk of ``radius`` pixels: a lens out of focus."""
    kernel = disk(radius)
    return blur(img, kernel / kernel.sum())


def jpeg(img: Array, quality: float) -> Array:
    """Store as JPEG at ``quality`` (1 to 100), chroma at half the resolution, and read again."""
    _, encoded = cv2.imencode('.jpg', quantize(img)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1] / 255


def smooth_field(shape: Sequence[int], rng: Generator, period: float = PERIOD) -> Array:
    """A smooth random map: values drawn every ``period`` pixels at a random phase, interpolated with zero end slopes.

    The period is in pixels, so a crop's map looks like a crop of an image's map.
    """
    weights = []
    for size in shape[:2]:
        place = (np.arange(size) / period) + rng.random()
        cell = np.floor(place).astype(int)
        share = place - cell
        share = share * share * (3 - 2 * share)
        weight = np.zeros((size, cell[-1] + 2))
        weight[np.arange(size), cell] = 1 - share
        weight[np.arange(size), cell + 1] = share
        weights.append(weight)
    rows, columns = weights
    return rows @ rng.random((rows.shape[1], columns.shape[1])) @ columns.T


def line_kernel(length: float, angle: float) -> Array:
    """An anti-aliased line through the centre of an odd square, summing to one.

    Args:
        length: In pixels, at least 1.
        angle: In degrees; 0 is vertical, positive leans to the right at the top.
    """
    radius = int(np.ceil(length / 2))
    kernel = np.zeros((2 * radius + 3, 2 * radius + 3))
    steps = np.linspace(-length / 2, length / 2, 4 * radius + 1)
    ys = radius + 1 - steps * np.cos(np.deg2rad(angle))
    xs = radius + 1 + steps * np.sin(np.deg2rad(angle))
    y0, x0 = np.floor(ys).astype(int), np.floor(xs).astype(int)
    for dy in (0, 1):
        for dx in (0, 1):
            np.add.at(kernel, (y0 + dy, x0 + dx), (1 - abs(ys - y0 - dy)) * (1 - abs(xs - x0 - dx)))
    return kernel / kernel.sum()


def disk(radius: float) -> Array:
    """An anti-aliased disk in the centre of an odd square, 1 inside."""
    reach = int(np.ceil(radius)) + 1
    ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.clip(radius + 0.5 - np.hypot(ys, xs), 0, 1)


def log_uniform(least: float, most: float, rng: Generator) -> float:
    """A number as likely in ``least`` to ``2 least`` as in ``most / 2`` to ``most``."""
    return float(np.exp(rng.uniform(np.log(least), np.log(most))))


def rain_streaks(shape: Sequence[int], rng: Generator) -> Array:
    """Streaks in [0, 1]: drops drawn out along one direction, fading to their ends, most of them faint.

    There are three layers, the nearer ones longer, wider and fewer. From a drizzle to a downpour, from crisp to soft:
    how much of the picture a layer covers is log-uniform over a factor of ten (our choice; Rain100L lies within).
    """
    angle = rng.uniform(-35, 35)
    cover = 0.2 * 10 ** -rng.random()
    stretch, softness = 2 ** rng.random(), rng.random()
    streaks = np.zeros(shape[:2])
    for length, width in ((rng.uniform(9, 17), 0.3), (rng.uniform(17, 31), 0.6), (rng.uniform(31, 57), 0.9)):
        half = line_kernel(stretch * length / 2, angle + rng.uniform(-3, 3))
        pad = half.shape[0] // 2 + 3  # room for the other half and for the width
        kernel = cv2.copyMakeBorder(half, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        kernel = cv2.GaussianBlur(cv2.filter2D(kernel, -1, half), (7, 7), width * max(softness, 0.1))
        density = cover / (stretch * length * (1 + 2 * width * softness))
        drops = rng.random(shape[:2]) ** 2 * (rng.random(shape[:2]) < density)
        streaks += cv2.filter2D(drops, -1, kernel / kernel.max(), borderType=cv2.BORDER_REFLECT_101)
    return np.clip(streaks * rng.uniform(0.3, 1.0), 0, 1)


def broad_streaks(shape: Sequence[int], rng: Generator) -> Array:
    """Streaks in [0, 1] of near, bright drops: broad, of even brightness along their length, few.

    Three layers of one direction, each of a length of 8 to 64 and a width of 1 to 5 pixels; together they cover 3 to
    20 % of the picture (our choice; they look like those of Rain100L that :func:`rain_streaks` has too faint and thin).
    """
    angle, cover, light = rng.uniform(-40, 40), 0.2 * 7 ** -rng.random(), rng.uniform(0.4, 1.0)
    streaks = np.zeros(shape[:2])
    for _ in range(3):
        length, width = 8 * 8 ** rng.random(), rng.uniform(1, 5)
        kernel = cv2.copyMakeBorder(line_kernel(length, angle + rng.uniform(-3, 3)), *[6] * 4, cv2.BORDER_CONSTANT)
        kernel = cv2.GaussianBlur(cv2.filter2D(kernel, -1, disk(width / 2)), (5, 5), rng.uniform(0.3, 0.9))
        drops = rng.uniform(0.2, 1, shape[:2]) * (rng.random(shape[:2]) < cover / 3 / ((length + width) * width))
        layer = cv2.filter2D(drops, -1, kernel / kernel.max(), borderType=cv2.BORDER_REFLECT_101)
        streaks = np.maximum(streaks, light * layer)
    return np.clip(streaks, 0, 1)


def snow_flakes(shape: Sequence[int], rng: Generator) -> Array:
    """Opacities in [0, 1]: soft round flakes of three sizes, the large ones rare."""
    flakes = np.zeros(shape[:2])
    for radius, density in ((0.8, 0.006), (1.6, 0.0015), (3.0, 0.0003)):
        spots = (rng.random(shape[:2]) < density * rng.uniform(0.5, 1.5)) * rng.uniform(0.7, 1.0, shape[:2])
        profile = cv2.getGaussianKernel(int(6 * radius) | 1, radius)
        kernel = profile @ profile.T
        flakes += cv2.filter2D(spots, -1, kernel / kernel.max(), borderType=cv2.BORDER_REFLECT_101)
    return np.clip(flakes, 0, 1)


def blur_kernel(rng: Generator) -> Array:
    """Motion along a line of 5 to 15 pixels, or defocus by a Gaussian of 0.8 to 2.4 pixels."""
    if rng.random() < 0.5:
        return line_kernel(rng.uniform(5, 15), rng.uniform(-90, 90))
    profile = cv2.getGaussianKernel(13, rng.uniform(0.8, 2.4))
    return profile @ profile.T


def _draw_low_light(img: Array, strength: Array, rng: Generator) -> Array:
    return low_light(img, 1 + strength * rng.uniform(1, 2), strength * rng.uniform(0.03, 0.08), rng)


def _draw_rain(img: Array, strength: Array, rng: Generator) -> Array:
    return rain(img, strength[..., 0] * rain_streaks(img.shape, rng))


def _draw_downpour(img: Array, strength: Array, rng: Generator) -> Array:
    return rain(img, strength[..., 0] * broad_streaks(img.shape, rng))


def _draw_snow(img: Array, strength: Array, rng: Generator) -> Array:
    return snow(img, strength[..., 0] * snow_flakes(img.shape, rng))


def _draw_haze(img: Array, strength: Array, rng: Generator) -> Array:
    return haze(img, 1 - strength[..., 0], rng.uniform(1, 2), rng.uniform(0.6, 0.9))


def _draw_blur(img: Array, strength: Array, rng: Generator) -> Array:
    return blur(img, blur_kernel(rng), strength)


def _draw_noise(img: Array, strength: Array, rng: Generator) -> Array:
    return gaussian_noise(img, strength * rng.uniform(5, 50), rng)


def _draw_defocus(img: Array, strength: Array, rng: Generator) -> Array:
    return img + strength * (defocus(img, rng.uniform(0.5, 3)) - img)


def _draw_shot_noise(img: Array, strength: Array, rng: Generator) -> Array:
    return shot_noise(img, strength * rng.uniform(5, 60), rng)


def _draw_chroma_noise(img: Array, strength: Array, rng: Generator) -> Array:
    return chroma_noise(img, strength * rng.uniform(3, 20), rng)


def _draw_camera_noise(img: Array, strength: Array, rng: Generator) -> Array:
    return camera_noise(img, strength * log_uniform(2, 16, rng), rng.uniform(0.3, 1.3), rng)


def _draw_jpeg(img: Array, strength: Array, rng: Generator) -> Array:
    return jpeg(img, rng.uniform(10, 95))


_DRAW: dict[str, Callable[[Array, Array, Generator], Array]] = {
    'low_light': _draw_low_light,
    'rain': _draw_rain,
    'downpour': _draw_downpour,
    'snow': _draw_snow,
    'haze': _draw_haze,
    'blur': _draw_blur,
    'defocus': _draw_defocus,
    'jpeg_before': _draw_jpeg,
    'shot_noise': _draw_shot_noise,
    'chroma_noise': _draw_chroma_noise,
    'camera_noise': _draw_camera_noise,
    'noise': _draw_noise,
    'jpeg': _draw_jpeg,
}
ORDER = tuple(_DRAW)


def synthesize(img: Array, tasks: Sequence[str], rng: Generator, vary: bool = True, period: float = PERIOD) -> Array:
    """Degrade an image by each of ``tasks``, with parameters drawn from the ranges of CDD-11 or our own.

    Args:
        img: Clear image.
        tasks: Any of ``ORDER``; they act in that order, whatever theirs.
        rng: Source of all randomness.
        vary: Whether each task's strength varies over the image, between 0.4 and 1, by a smooth map of its own.
        period: Pixels over which strengths vary, and the depth of haze.

    Returns:
        The degraded image, clipped to [0, 1], not quantised.
    """
    for task in sorted(tasks, key=ORDER.index):
        strength = 0.4 + 0.6 * (smooth_field(img.shape, rng, period) if vary else np.ones(img.shape[:2]))
        if task == 'haze':
            strength = strength * smooth_field(img.shape, rng, period)  # nearness
        img = _DRAW[task](img, strength[..., None], rng)
    return np.clip(img, 0, 1)
