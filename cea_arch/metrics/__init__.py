"""Metrics in BasicSR's METRIC_REGISTRY: importing a ``*_metric.py`` registers what it holds."""

from cea_arch.metrics import psnr_ssim_metric

__all__ = ['psnr_ssim_metric']
