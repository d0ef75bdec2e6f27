"""One dataset of several sources, each with its own degradation and share: what all-in-one training draws from."""

import bisect
import importlib
import itertools
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cea_arch.data.augmentations import AUGMENT_RULE, augment, shrink
from cea_arch.data.contents import tones
from cea_arch.data.degradations import (
    ORDER,
    PERIOD,
    TASKS,
    defocus,
    gaussian_noise,
    jpeg,
    log_uniform,
    quantize,
    synthesize,
)
from cea_arch.data.image_store import ImageStore
from cea_arch.data.pairing import pair_keys
from cea_arch.errors import UserError
from cea_arch.rules import FLAG, TEXT, Checker, Rule, either, list_of, number, one_of, section, typed, whole

_LEVELS = list_of(number(minimum=0, maximum=1), 2, 2)
_COMMON = {
    'degradation': TEXT,
    'dataroot_gt': TEXT,
    'io_backend': section({'type': one_of('disk', 'lmdb')}, ['type']),
    'repeat': whole(),
    'only': section({'brightness': _LEVELS, 'dark_channel': _LEVELS}),
}
_READ = _COMMON | {'augment': AUGMENT_RULE}  # of sources that are degraded as they are read
_PIXELS = number(exclusiveMinimum=0)
_STRENGTHS = {  # degradations of one strength, drawn from a list: the option, its default, the rule for each value
    'gaussian_noise': ('sigmas', [15, 25, 50], number(minimum=0)),
    'defocus': ('radii', [2], number(minimum=0)),
    'jpeg': ('qualities', [20], number(minimum=1, maximum=100)),
}


def _one_or_several(degradation: str) -> dict[str, Rule]:
    name, _, rule = _STRENGTHS[degradation]
    return {name: either(rule, list_of(rule))}


SOURCE_RULES = {
    'paired': section(_COMMON | {'dataroot_lq': TEXT}, ['dataroot_gt', 'dataroot_lq']),
    'synthetic': section(
        _READ
        | {'tasks': list_of(one_of(*ORDER)), 'num_tasks': either(whole(), list_of(whole(), 2, 2)), 'vary': FLAG}
        | {'period': either(_PIXELS, list_of(_PIXELS, 2, 2))},
        ['dataroot_gt'],
    ),
    'gaussian_noise': section(
        _READ | _one_or_several('gaussian_noise') | {'quantize': one_of('trunc', 'round')}, ['dataroot_gt']
    ),
    'defocus': section(_READ | _one_or_several('defocus'), ['dataroot_gt']),
    'jpeg': section(_READ | _one_or_several('jpeg'), ['dataroot_gt']),
    'downscale': section(_READ | {'scale': whole()}, ['dataroot_gt', 'scale']),
}
DATASET_RULES = {
    'sources': {'type': 'object', 'minProperties': 1, 'additionalProperties': typed(SOURCE_RULES, 'degradation')},
    'gt_size': whole(),
    'use_hflip': FLAG,
    'use_rot': FLAG,
    'shrink': number(minimum=0, maximum=1),
    'seed': whole(0),
    'crop_base': whole(),
}


class Source:
    """Images of one origin and how they are degraded; see :class:`CEADataset` for the options."""

    def __init__(self, name: str, opt: dict[str, Any], label: str, seen: dict[str, dict[str, float]]) -> None:
        """``seen`` holds the tones of files that other sources have looked at, and gets those of this one."""
        self.name = name
        self.degradation = opt['degradation']
        self.repeat = opt.get('repeat', 1)
        self.augment = opt.get('augment')
        self.gt = ImageStore(opt['dataroot_gt'], opt.get('io_backend'), f'{label}.dataroot_gt')
        self.lq = None
        self.pairs = [(key, key) for key in self.gt.sizes]
        if self.degradation == 'paired':
            self.lq = ImageStore(opt['dataroot_lq'], opt.get('io_backend'), f'{label}.dataroot_lq')
            self.pairs = pair_keys(self.lq.sizes, self.gt.sizes, label)
            self._check_sizes()
        if opt.get('only'):
            self._select(opt['only'], label, seen)
        self._read_strengths(opt, label)

    def degrade(self, gt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Degrade a clean image, uint8 or uint16 ``(H, W, 3)``; the result is uint8."""
        clean = gt / float(np.iinfo(gt.dtype).max)
        if self.degradation == 'downscale':
            matlab = importlib.import_module('basicsr.utils.matlab_functions')  # BasicSR is not needed for the others
            return quantize(matlab.imresize(clean, 1 / self.scale))
        if self.strengths:
            strength = float(rng.choice(self.strengths))
            if self.degradation == 'gaussian_noise':
                return quantize(gaussian_noise(clean, strength, rng), self.quantize)
            return quantize({'defocus': defocus, 'jpeg': jpeg}[self.degradation](clean, strength))
        count = int(rng.integers(self.num_tasks[0], self.num_tasks[1], endpoint=True))
        tasks = rng.choice(self.tasks, count, replace=False)
        least, most = self.period
        period = least if least == most else log_uniform(least, most, rng)
        return quantize(synthesize(clean, tasks, rng, self.vary, period))

    def identity(self) -> str:
        """What the fixed draws of evaluation depend on, besides seed and image name."""
        if self.strengths:
            return f'{self.degradation} {self.strengths}'
        if self.degradation == 'downscale':
            return f'downscale {self.scale}'
        period = '' if self.period == [PERIOD, PERIOD] else f' {self.period}'
        return f'synthetic {self.tasks} {self.num_tasks} {self.vary}{period}'

    def _select(self, only: dict[str, list[float]], label: str, seen: dict[str, dict[str, float]]) -> None:
        """Keep the pairs whose clean image has tones within the ranges."""
        found = []
        for _, key in self.pairs:
            path = str(self.gt.path(key))
            if path not in seen:
                seen[path] = tones(self.gt.read(key))
            found.append(seen[path])
        fits = [all(least <= have[name] <= most for name, (least, most) in only.items()) for have in found]
        if not any(fits):
            values = {name: [have[name] for have in found] for name in only}
            ranges = ', '.join(f'{name} {min(have):.2f} to {max(have):.2f}' for name, have in values.items())
            raise UserError(f'{label}.only: none of {len(found)} pictures is within {only}; theirs have {ranges}.')
        self.pairs = list(itertools.compress(self.pairs, fits))

    def _check_sizes(self) -> None:
        for lq, gt in self.pairs:
            if self.lq.sizes[lq] != self.gt.sizes[gt]:
                raise UserError(
                    f'a pair of unequal size (height, width): {self.lq.path(lq)} is {self.lq.sizes[lq]}, '
                    f'{self.gt.path(gt)} is {self.gt.sizes[gt]}.'
                )

    def _read_strengths(self, opt: dict[str, Any], label: str) -> None:
        self.scale = opt['scale'] if self.degradation == 'downscale' else 1
        self.strengths = []
        if self.degradation in _STRENGTHS:
            name, default, _ = _STRENGTHS[self.degradation]
            given = opt.get(name, default)
            self.strengths = [float(value) for value in (given if isinstance(given, list) else [given])]
            self.quantize = opt.get('quantize', 'trunc')
        elif self.degradation == 'synthetic':
            self.tasks = list(opt.get('tasks', TASKS))
            number = opt.get('num_tasks', [1, len(self.tasks)])
            self.num_tasks = number if isinstance(number, list) else [number, number]
            if not 1 <= self.num_tasks[0] <= self.num_tasks[-1] <= len(self.tasks):
                raise UserError(
                    f'{label}.num_tasks must lie in 1 to {len(self.tasks)}, the number of tasks; got {number}.'
                )
            self.vary = opt.get('vary', True)
            period = opt.get('period', PERIOD)
            self.period = [float(one) for one in (period if isinstance(period, list) else [period, period])]


class CEADataset(Dataset):
    """Pairs of degraded and clean images from one or several sources.

    In training (``phase: train``) each sample is a random crop, flipped and rotated, degraded anew: all its draws come
    from one generator seeded by torch's own, which the loader seeds anew for every worker and epoch, so that no epoch
    repeats another. In evaluation (``val``, ``test``) images are whole and degraded by a generator that depends on
    ``seed``, degradation and image name alone: order, workers and platform change nothing.

    Options, beside BasicSR's ``name``, ``type`` and loader settings:
        sources: A mapping from source names to their options:
            degradation: ``paired``: ``dataroot_lq`` holds the degraded images, paired by name, see
                :func:`cea_arch.data.pairing.pair_keys`.
                ``gaussian_noise``: ``sigmas`` (8-bit levels, one or a list to draw from), ``quantize``: ``trunc`` (the
                literature's clip and truncate, default) or ``round``.
                ``synthetic``: ``tasks`` (of ``ORDER``, by default ``low_light, rain, snow, haze, blur, noise``),
                ``num_tasks`` (how many of them act at once: a number or ``[least, most]``), ``vary`` (strength varies
                over the image, default), ``period`` (pixels over which it and the depth of haze vary: a number, by
                default 160, or a range, log-uniform).
                ``defocus``: ``radii`` of the disk, in pixels; ``jpeg``: ``qualities`` of 1 to 100; one or a list.
                ``downscale``: ``scale``, the factor by which the degraded image is smaller; bicubic as MATLAB's, the
                literature's way for super-resolution. Crops must be multiples of it, whole images are cropped so.
            dataroot_gt: Folder or ``.lmdb`` of clean images.
            io_backend: ``{type: disk}`` or ``{type: lmdb}``, for both roots.
            augment: In training, changes of clean images that are degraded as they are read, see
                :func:`cea_arch.data.augmentations.augment`.
            only: Take the images alone whose clean one has ``brightness`` and ``dark_channel`` within these ranges,
                see :func:`cea_arch.data.contents.tones`: each is read once at the start.
            repeat: How often each image counts in an epoch (default 1).
        gt_size: Side of the square training crop, in pixels.
        use_hflip, use_rot: Random flips; random rotations by 90 degrees (both default to true).
        shrink: In training, the share of samples that are reduced before they are cropped, by a random factor up to
            that with which the whole image is in the crop (default 0): haze and low light are read from whole scenes.
        seed: For evaluation (default 0).
        crop_base: In evaluation, images are centre-cropped to multiples of it (16 in the AIO literature; default 1).

    Raises:
        UserError: Names the option or file at fault.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__()
        self.opt = opt
        label = f'dataset {opt.get("name")!r}'
        self.train = opt.get('phase', 'train') == 'train'
        required = ['sources', 'gt_size'] if self.train else ['sources']
        Checker().check(opt, section(DATASET_RULES, required, closed=False), label)
        seen: dict[str, dict[str, float]] = {}
        self.sources = [Source(name, one, f'{label}, sources.{name}', seen) for name, one in opt['sources'].items()]
        self.ends = list(itertools.accumulate(len(source.pairs) * source.repeat for source in self.sources))
        if self.train:
            self.gt_size = opt['gt_size']
            self._check_crop()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number ``index``.

        Returns:
            ``lq`` and ``gt``, RGB float32 ``(3, H, W)`` in [0, 1], ``lq`` smaller where it is downscaled; ``lq_path``
            and ``gt_path``; ``task``, the source.
        """
        source, lq_key, gt_key = self._locate(index)
        gt = source.gt.read(gt_key)
        lq = source.lq.read(lq_key) if source.lq else None
        for store, key, img in ((source.gt, gt_key, gt), (source.lq, lq_key, lq)):
            if img is not None and img.shape[:2] != store.sizes[key]:
                raise UserError(f'{store.path(key)} is {img.shape[:2]}, but its list says {store.sizes[key]}.')
        images = [gt] if lq is None else [gt, lq]
        if self.train:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            if self.opt.get('shrink') and rng.random() < self.opt['shrink']:
                images = shrink(images, rng, self.gt_size)
            images = self._crop(images, rng)
            if source.augment:
                images = [augment(images[0], source.augment, rng)]
        else:
            name = gt_key.rpartition('/')[2]
            rng = evaluation_rng(self.opt.get('seed', 0), name, source.identity()) if lq is None else None
            images = [centre_crop(img, math.lcm(self.opt.get('crop_base', 1), source.scale)) for img in images]
        if lq is None:
            images.append(source.degrade(images[0], rng))
        gt, lq = (to_tensor(img) for img in images)
        lq_path = source.lq.path(lq_key) if source.lq else source.gt.path(gt_key)
        return {'lq': lq, 'gt': gt, 'lq_path': lq_path, 'gt_path': source.gt.path(gt_key), 'task': source.name}

    def describe(self) -> str:
        """One line a source: images, repeats and share of an epoch."""
        lines = []
        for source in self.sources:
            count = len(source.pairs) * source.repeat
            lines.append(
                f'{source.name}: {source.degradation}, {len(source.pairs):,} x {source.repeat} = {count:,} samples '
                f'({100 * count / len(self):.1f} %)'
            )
        return '\n'.join(lines)

    def _locate(self, index: int) -> tuple[Source, str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f'sample {index} of {len(self)}')
        position = bisect.bisect_right(self.ends, index)
        source = self.sources[position]
        start = self.ends[position - 1] if position else 0
        return source, *source.pairs[(index - start) % len(source.pairs)]

    def _check_crop(self) -> None:
        for source in self.sources:
            if self.gt_size % source.scale:
                raise UserError(f'gt_size is {self.gt_size}, no multiple of scale, {source.scale}, of {source.name}.')
            for key in dict.fromkeys(gt for _, gt in source.pairs):
                size = source.gt.sizes[key]
                if min(size) < self.gt_size:
                    raise UserError(
                        f'gt_size is {self.gt_size}, but {source.gt.path(key)} has only {size[0]} x {size[1]} pixels '
                        '(height x width). Lower gt_size or remove the image.'
                    )

    def _crop(self, images: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        top, left = (int(rng.integers(size - self.gt_size, endpoint=True)) for size in images[0].shape[:2])
        window = (slice(top, top + self.gt_size), slice(left, left + self.gt_size))
        flip, flop = (self.opt.get('use_hflip', True) and rng.random() < 0.5 for _ in range(2))
        turns = int(rng.integers(4)) if self.opt.get('use_rot', True) else 0
        # np.rot90 does the same, but its checks take as long as all the rest here
        images = [img[window].swapaxes(0, 1)[::-1] if turns % 2 else img[window] for img in images]
        upside_down, mirrored = (done != (turns > 1) for done in (flip, flop))
        return [img[:: -1 if upside_down else 1, :: -1 if mirrored else 1] for img in images]


def evaluation_rng(seed: int, name: str, identity: str) -> np.random.Generator:
    """The generator of one image's fixed degradation."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(identity.encode())])


def centre_crop(img: np.ndarray, base: int) -> np.ndarray:
    """Crop ``(H, W, C)`` to multiples of ``base``; an odd row or column more goes at the bottom or right."""
    height, width = img.shape[:2]
    top, left = height % base // 2, width % base // 2
    return img[top : top + height - height % base, left : left + width - width % base]


def to_tensor(img: np.ndarray) -> torch.Tensor:
    """Turn RGB ``(H, W, 3)``, uint8 or uint16, into float32 ``(3, H, W)`` in [0, 1]."""
    top = np.float32(np.iinfo(img.dtype).max)
    return torch.from_numpy(np.divide(img.transpose(2, 0, 1), top, dtype=np.float32, order='C'))
