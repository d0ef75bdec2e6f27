"""Write the demo's data: LMDBs of the colour photographs that scikit-image carries. Nothing is downloaded.

python datasets_prep/prepare_demo.py
"""

import argparse
import sys
from importlib import resources
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.errors import UserError
from cea_arch.files import as_path

SPLITS = {
    'train': ['astronaut.png', 'motorcycle_left.png', 'motorcycle_right.png', 'rocket.jpg'],
    'val': ['chelsea.png', 'coffee.png'],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--output', type=as_path, default=Path('datasets/demo'), help='folder to write to (datasets/demo)'
    )
    args = parser.parse_args(argv)
    photographs = resources.files('skimage') / 'data'
    try:
        for split, names in SPLITS.items():
            images = ((name.partition('.')[0], (photographs / name).read_bytes()) for name in names)
            destination = args.output / f'{split}.lmdb'
            count = write_lmdb(images, destination, overwrite=True).images
            print(f'{destination}: {count} photographs ({", ".join(names)})')
    except (UserError, OSError) as error:
        print(f'prepare_demo: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
