"""Losses in BasicSR's LOSS_REGISTRY: importing a ``*_loss.py`` registers what it holds."""

import basicsr  # noqa: F401  first: once it is imported, it has all of ours registered

from cea_arch.losses import fft_loss

__all__ = ['fft_loss']
