"""PSNR and SSIM as the all-in-one literature computes them: on float RGB images, not on 8-bit files.

The functions take images ``(H, W, 3)``, RGB, in [0, 1], clipped. :class:`cea_arch.models.cea_model.CEAModel` sees by
their attribute ``float_rgb`` to give them such images, and BasicSR's own metrics 8-bit BGR.
"""

from collections.abc import Callable

import numpy as np
from basicsr.utils.registry import METRIC_REGISTRY
from skimage.metrics import structural_similarity


def _register(metric: Callable[..., float]) -> Callable[..., float]:
    metric.float_rgb = True
    METRIC_REGISTRY.register(metric)
    return metric


@_register
def calculate_psnr_float(img: np.ndarray, img2: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels and channels; infinite for equal images."""
    mse = np.mean(np.square(img.astype(np.float64) - img2))
    return float(-10 * np.log10(mse)) if mse else float('inf')


@_register
def calculate_ssim_uniform(img: np.ndarray, img2: np.ndarray) -> float:
    """SSIM with a uniform 7 x 7 window and sample covariance (AirNet, PromptIR, AdaIR, DFPIR, OneRestore)."""
    return _ssim(img, img2, 7)


@_register
def calculate_ssim_gaussian(img: np.ndarray, img2: np.ndarray) -> float:
    """SSIM with an 11 x 11 Gaussian window, sigma 1.5, and sample covariance (MoCE-IR)."""
    return _ssim(img, img2, 11, gaussian_weights=True)


def _ssim(img: np.ndarray, img2: np.ndarray, window: int, **options: bool) -> float:
    if min(img.shape[:2]) < window:
        raise ValueError(
            f'SSIM with a window of {window} pixels needs larger images than {img.shape[0]} x {img.shape[1]}.'
        )
    return float(
        structural_similarity(img.astype(np.float64), img2.astype(np.float64), channel_axis=-1, data_range=1, **options)
    )
