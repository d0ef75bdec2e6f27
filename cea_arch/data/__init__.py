"""Data sets in BasicSR's DATASET_REGISTRY: importing a ``*_dataset.py`` registers what it holds."""

from cea_arch.data import all_in_one_dataset

__all__ = ['all_in_one_dataset']
