"""Check the raw downloads of CDD-11 and write them as LMDBs, under the names that options/cea_cdd11.yml reads.

python datasets_prep/prepare_cdd11.py --raw downloads --check
python datasets_prep/prepare_cdd11.py --raw downloads
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cea_arch.data import prepare


def main(argv: list[str] | None = None) -> int:
    return prepare.main('CDD-11', argv)


if __name__ == '__main__':
    sys.exit(main())
