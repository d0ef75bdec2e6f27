"""Make composite degradations of clean images by the formulas of CDD-11: its eleven classes, in its folders.

For more training data and demonstrations; the benchmark itself can only be downloaded. Inverse depth maps (white is
near) have the names of the clean images; without them the bottom of an image counts as near and its top as far. Rain
and snow masks are drawn from the folders given, or made. Seed, image and class decide every draw.

python datasets_prep/synthesize_composite.py --clear photos --output datasets/composite
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cea_arch.data.composite import Inputs, write_composites
from cea_arch.data.image_store import ImageStore
from cea_arch.errors import UserError
from cea_arch.files import as_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clear', required=True, help='folder or .lmdb of clean images')
    parser.add_argument('--output', type=as_path, required=True, help='folder to make')
    parser.add_argument('--depth', help='folder or .lmdb of inverse depth maps, named as the clean images')
    parser.add_argument('--rain-masks', help='folder or .lmdb of rain streaks, white on black')
    parser.add_argument('--snow-masks', help='folder or .lmdb of snow, white on black')
    parser.add_argument('--seed', type=int, default=0, help='(0)')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='threads (one a CPU core)')
    args = parser.parse_args(argv)
    try:
        roots = {'clear': args.clear, 'depth': args.depth, 'rain_masks': args.rain_masks, 'snow_masks': args.snow_masks}
        stores = {name: ImageStore(root, label=name) for name, root in roots.items() if root}
        count = write_composites(Inputs(**stores, seed=args.seed), args.output, args.workers)
    except (UserError, OSError) as error:
        print(f'synthesize_composite: {error}', file=sys.stderr)
        return 2
    print(f'{args.output}: {count} images')
    return 0


if __name__ == '__main__':
    sys.exit(main())
