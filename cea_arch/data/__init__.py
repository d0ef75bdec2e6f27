"""Data sets in BasicSR's DATASET_REGISTRY: importing a ``*_dataset.py`` registers what it holds."""

from cea_arch.compat import HAS_BASICSR

if HAS_BASICSR:  # degradations and writers work without it
    from cea_arch.data import all_in_one_dataset as all_in_one_dataset
