"""``python cea_arch/test.py -opt options/….yml``: the same as ``cea test`` and ``python -m cea_arch.test``."""

import sys
from pathlib import Path

if not __package__:  # run as a file: import the package from here, and none of its modules as top-level ones
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cea_arch.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
