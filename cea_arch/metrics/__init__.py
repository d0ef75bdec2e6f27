"""Metrics in BasicSR's METRIC_REGISTRY: importing a ``*_metric.py`` registers what it holds."""

import basicsr  # noqa: F401  first: once it is imported, it has all of ours registered

from cea_arch.metrics import psnr_ssim_metric

__all__ = ['psnr_ssim_metric']
