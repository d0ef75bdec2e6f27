"""How fast CEADataset reads, from loose files and from an LMDB, and where the time goes.

python -m cea_arch.data.read_speed --images photos
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from cea_arch.data.cea_dataset import CEADataset
from cea_arch.data.image_store import ImageStore
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.errors import UserError

COLUMNS = ('store', 'patches/s/core', 'bare patches/s/core', 'overhead', 'share of decoding', 'share of reading')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, help='folder of images; they serve as both sides of the pairs')
    parser.add_argument('--gt-size', type=int, default=128, help='side of a patch in pixels (128)')
    parser.add_argument('--count', type=int, default=200, help='images taken (200)')
    parser.add_argument('--rounds', type=int, default=5, help='rounds, each timing everything once (5)')
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = [COLUMNS, *measure(args.images, Path(folder, 'images.lmdb'), args.gt_size, args.count, args.rounds)]
    except (UserError, OSError) as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 2
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def measure(images: str, lmdb: Path, gt_size: int, count: int, rounds: int) -> list[tuple[str, ...]]:
    """One row a store, see ``COLUMNS``.

    A patch is a pair: two images are read and decoded for it. Bare means to read both, decode them with OpenCV and cut
    the patch out; the overhead is what the dataset takes beyond that, as a share of it. One process, one thread.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    files = ImageStore(images)
    write_lmdb(((key, files.read_bytes(key)) for key in files.sizes), lmdb)
    rows = []
    for name, store in (('files', files), ('LMDB', ImageStore(lmdb))):
        source = {'degradation': 'paired', 'dataroot_gt': str(store.root), 'dataroot_lq': str(store.root)}
        options = {'name': name, 'phase': 'train', 'gt_size': gt_size, 'sources': {'all': source}}
        dataset = CEADataset(options)
        keys = list(store.sizes)[:count]
        data = [store.read_bytes(key) for key in keys]
        works = {
            'dataset': lambda number, dataset=dataset: dataset[number],
            'bare': lambda number, store=store, keys=keys: _bare(store.read_bytes, keys[number], gt_size),
            'decode': lambda number, data=data: (_decode(data[number]), _decode(data[number])),
            'read': lambda number, store=store, keys=keys: (
                store.read_bytes(keys[number]),
                store.read_bytes(keys[number]),
            ),
        }
        seconds = _time(works, len(keys), rounds)
        shares = (
            seconds['dataset'] / seconds['bare'] - 1,
            *(seconds[work] / seconds['dataset'] for work in ('decode', 'read')),
        )
        rows.append(
            (name, *(f'{1 / seconds[work]:.0f}' for work in ('dataset', 'bare')), *(f'{share:.1%}' for share in shares))
        )
    return rows


def _time(works: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Mean CPU seconds a call.

    Works take turns every 20 images, and of each turn the fastest round counts: other processes can only slow it down.
    """
    turns = -(-count // 20)
    seconds = {work: np.full((turns, rounds), np.inf) for work in works}
    for round_ in range(rounds):
        for turn, first in enumerate(range(0, count, 20)):
            for position in range(len(works)):
                work = list(works)[(position + turn + round_) % len(works)]
                start = time.process_time()
                for number in range(first, min(first + 20, count)):
                    works[work](number)
                seconds[work][turn, round_] = time.process_time() - start
    return {work: float(values.min(1).sum()) / count for work, values in seconds.items()}


def _decode(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def _bare(read: Callable[[str], bytes], key: str, size: int) -> list[np.ndarray]:
    images = [_decode(read(key)), _decode(read(key))]
    return [img[:size, :size].copy() for img in images]


if __name__ == '__main__':
    sys.exit(main())
