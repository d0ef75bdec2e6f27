"""Check the raw downloads of AIO-3 and write them as LMDBs, under the names that options/cea_aio3.yml reads.

python datasets_prep/prepare_aio3.py --raw downloads --check
python datasets_prep/prepare_aio3.py --raw downloads
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cea_arch.data import prepare


def main(argv: list[str] | None = None) -> int:
    return prepare.main('AIO-3', argv)


if __name__ == '__main__':
    sys.exit(main())
