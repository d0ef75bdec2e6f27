"""Data sets for BasicSR's DATASET_REGISTRY; degradations, pairing and writers work without it."""
