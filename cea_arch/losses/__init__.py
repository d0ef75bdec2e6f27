"""Losses in BasicSR's LOSS_REGISTRY: importing a ``*_loss.py`` registers what it holds."""

from cea_arch.losses import fft_loss

__all__ = ['fft_loss']
