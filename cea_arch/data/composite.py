"""More data in the manner of CDD-11: the eleven classes of composite degradation on any clean images."""

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from cea_arch.data.benchmarks import CDD11_CLASSES
from cea_arch.data.check import in_order
from cea_arch.data.degradations import LUMA, haze, low_light, quantize, rain, rain_streaks, snow, snow_flakes
from cea_arch.data.image_store import ImageStore
from cea_arch.data.pairing import describe, match_keys
from cea_arch.errors import UserError

Array = np.ndarray


@dataclass
class Inputs:
    """What the classes are made of.

    Attributes:
        clear: Clean images.
        depth: Inverse depth maps, 1 (white) is near, under the names of the clean images. Without them the bottom row
            of an image is taken to be near, the top row far, and the rows between in proportion.
        rain_masks, snow_masks: Banks of masks, any names; one is drawn for each result and resized to it. Without them
            streaks and flakes are drawn by :mod:`cea_arch.data.degradations`.
        seed: With the name of the image and of the class it decides every draw.
    """

    clear: ImageStore
    depth: ImageStore | None = None
    rain_masks: ImageStore | None = None
    snow_masks: ImageStore | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        keys = list(self.clear.sizes)
        self.depth_keys = dict.fromkeys(keys)
        if self.depth:
            matching = match_keys(keys, self.depth.sizes)
            if matching.lonely:
                raise UserError(
                    f'{self.depth.label}: {len(matching.lonely)} of {len(keys)} images have no depth map: '
                    f'{describe(matching.lonely, self.depth.sizes)}.'
                )
            self.depth_keys = dict(matching.pairs)


def composite(clear: Array, name: str, depth: Array, streaks: Array, flakes: Array, rng: Generator) -> Array:
    """Degrade an image as a class of CDD-11 says: low light, then rain, then snow, then haze, whichever it names.

    Args:
        clear: RGB float64 ``(H, W, 3)`` in [0, 1].
        name: One of ``CDD11_CLASSES``.
        depth, streaks, flakes: Inverse depth, rain and snow, ``(H, W)`` in [0, 1].
        rng: Draws gamma in 2 to 3, sigma in 0.03 to 0.08, beta in 1 to 2 and airlight in 0.6 to 0.9, as in CDD-11.

    Returns:
        8-bit levels, rounded.
    """
    parts, img = name.split('_'), clear
    if 'low' in parts:
        img = low_light(img, rng.uniform(2, 3), rng.uniform(0.03, 0.08), rng)
    if 'rain' in parts:
        img = rain(img, streaks)
    if 'snow' in parts:
        img = snow(img, flakes)
    if 'haze' in parts:
        img = haze(img, depth, rng.uniform(1, 2), rng.uniform(0.6, 0.9))
    return quantize(img)


def degrade(inputs: Inputs, key: str, name: str) -> Array:
    """The version of class ``name`` of one clean image, RGB uint8."""
    clear = _unit(inputs.clear.read(key))
    shape = clear.shape[:2]
    rng = np.random.default_rng([inputs.seed, zlib.crc32(key.encode()), zlib.crc32(name.encode())])
    depth = np.tile(np.linspace(0, 1, shape[0])[:, None], (1, shape[1]))
    if inputs.depth:
        depth = _map(inputs.depth, inputs.depth_keys[key], shape)
    streaks = _draw(inputs.rain_masks, shape, rng) if inputs.rain_masks else rain_streaks(shape, rng)
    flakes = _draw(inputs.snow_masks, shape, rng) if inputs.snow_masks else snow_flakes(shape, rng)
    return composite(clear, name, depth, streaks, flakes, rng)


def write_composites(inputs: Inputs, output: Path, workers: int = 1) -> int:
    """Write ``clear/`` and a folder for each class, as PNGs of the same name in each; returns the number of images.

    The folder is written aside and renamed when complete.

    Raises:
        UserError: ``output`` exists.
    """
    if output.exists():
        raise UserError(f'{output} exists; remove it first or choose another name.')
    aside = output.with_name(output.name + '.tmp')
    shutil.rmtree(aside, ignore_errors=True)
    jobs = [(key, name) for key in inputs.clear.sizes for name in ('clear', *CDD11_CLASSES)]

    def write(job: tuple[str, str]) -> None:
        key, name = job
        img = quantize(_unit(inputs.clear.read(key))) if name == 'clear' else degrade(inputs, key, name)
        path = aside / name / f'{key}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', img[..., ::-1])[1].tobytes())

    for _ in tqdm(in_order(write, jobs, workers), total=len(jobs), desc='composites', unit='image', disable=None):
        pass
    aside.rename(output)
    return len(jobs)


def _unit(img: Array) -> Array:
    return img / float(np.iinfo(img.dtype).max)


def _map(store: ImageStore, key: str, shape: Sequence[int]) -> Array:
    """A grey map in [0, 1], resized to ``shape``."""
    return cv2.resize(_unit(store.read(key)) @ LUMA, shape[1::-1], interpolation=cv2.INTER_LINEAR)


def _draw(masks: ImageStore, shape: Sequence[int], rng: Generator) -> Array:
    keys = list(masks.sizes)
    return _map(masks, keys[rng.integers(len(keys))], shape)
