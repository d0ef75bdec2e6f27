"""Scores of images that any network has written to a folder."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cea_arch.data.cea_dataset import centre_crop
from cea_arch.data.image_store import ImageStore
from cea_arch.data.pairing import pair_keys
from cea_arch.errors import UserError
from cea_arch.metrics.protocols import find_protocol, score
from cea_arch.metrics.report import Report, SetResult, compare


def score_saved_images(
    sets: Iterable[tuple[str, str, str]], protocol: str, output: str | Path, lpips: str | None = None
) -> Report:
    """Score folders of restored images against ground truths, paired by name, and write the files of a report.

    Args:
        sets: For each set its name, the folder of restored images and the folder or LMDB of ground truths.
        protocol: Name of one of the ``PROTOCOLS``. Its centre crop is applied to both images; files of 8 bits stay
            so, whatever the protocol would do with a network's own output.
        output: Folder to write to; its name is the report's title.
        lpips: Score by LPIPS, too: with the backbone's weights from this file, or where it is empty from the network.

    Raises:
        UserError: Two sets of one name, a folder that does not exist, images without a partner, or of another size than
            theirs; or LPIPS cannot be had.
    """
    names = [name for name, *_ in sets]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f'{len(repeated)} sets are called {repeated[0]!r}: each needs a name of its own.')
    rules = find_protocol(protocol, 'protocol')
    metrics = rules.metrics
    if lpips is not None:
        metrics = metrics | {'lpips': {'type': 'calculate_cea_lpips', 'backbone': lpips or None, 'better': 'lower'}}
    report = Report(output, Path(output).resolve().name, metrics, protocol)
    for name, restored_root, clean_root in sets:
        restored, clean = (
            ImageStore(root, label=f'{name}, {side}')
            for root, side in ((restored_root, 'restored'), (clean_root, 'ground truth'))
        )
        result = SetResult(report.title)
        pairs = pair_keys(restored.sizes, clean.sizes, name)
        for pair in tqdm(pairs, desc=f'scoring {name}', unit='image', leave=False, disable=None):
            images = _read(restored, clean, pair, rules.crop_base)
            result.rows.append({'image': pair[1], **score(images, metrics)})
            if result.picture is None:
                result.picture = compare(images, result.rows[0])
        report.add(name, None, result)
        report.write()
    return report


def _read(restored: ImageStore, clean: ImageStore, pair: tuple[str, str], crop_base: int) -> dict[str, np.ndarray]:
    images = {}
    for side, store, key in (('restored', restored, pair[0]), ('clean', clean, pair[1])):
        img = store.read(key)
        images[side] = centre_crop(img, crop_base).astype(np.float32) / np.iinfo(img.dtype).max
    if images['restored'].shape != images['clean'].shape:
        raise UserError(
            f'{restored.path(pair[0])} is {restored.sizes[pair[0]]} (height, width), but its ground truth '
            f'{clean.path(pair[1])} is {clean.sizes[pair[1]]}; each was cropped to multiples of {crop_base}.'
        )
    return images
