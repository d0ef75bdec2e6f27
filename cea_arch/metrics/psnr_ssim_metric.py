"""PSNR and SSIM as the all-in-one literature computes them: on float RGB images, or on 8-bit ones.

The functions take images ``(H, W, 3)``, RGB, in [0, 1], clipped. By their attribute ``float_rgb``
:func:`cea_arch.metrics.protocols.score` sees to give them such images, and BasicSR's own metrics 8-bit BGR.
"""

from collections.abc import Callable

import numpy as np
from skimage.metrics import structural_similarity


def of_float_rgb(metric: Callable[..., float]) -> Callable[..., float]:
    """Say of a metric that it wants float RGB images."""
    metric.float_rgb = True
    return metric


@of_float_rgb
def calculate_cea_psnr(img: np.ndarray, img2: np.ndarray, eight_bit: bool = False) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels and channels; infinite for equal images.

    With ``eight_bit`` both images are rounded to 8-bit levels first, as saving them would.
    """
    img, img2 = (_prepare(image, eight_bit) for image in (img, img2))
    mse = np.mean(np.square(img - img2))
    return float(-10 * np.log10(mse)) if mse else float('inf')


@of_float_rgb
def calculate_cea_ssim_uniform(img: np.ndarray, img2: np.ndarray, eight_bit: bool = False) -> float:
    """SSIM with a uniform 7 x 7 window and sample covariance (AirNet, PromptIR, AdaIR, DFPIR, OneRestore)."""
    return _ssim(img, img2, 7, eight_bit)


@of_float_rgb
def calculate_cea_ssim_gaussian(img: np.ndarray, img2: np.ndarray, eight_bit: bool = False) -> float:
    """SSIM with an 11 x 11 Gaussian window, sigma 1.5, and sample covariance (MoCE-IR)."""
    return _ssim(img, img2, 11, eight_bit, gaussian_weights=True)


def uint8_bgr(img: np.ndarray) -> np.ndarray:
    """Round RGB ``(H, W, 3)`` in [0, 1] to 8-bit levels, BGR: what image files and BasicSR's metrics hold."""
    return np.ascontiguousarray(np.rint(img[..., ::-1] * 255).astype(np.uint8))


def _ssim(img: np.ndarray, img2: np.ndarray, window: int, eight_bit: bool, **options: bool) -> float:
    if min(img.shape[:2]) < window:
        raise ValueError(
            f'SSIM with a window of {window} pixels needs larger images than {img.shape[0]} x {img.shape[1]}.'
        )
    img, img2 = (_prepare(image, eight_bit) for image in (img, img2))
    return float(structural_similarity(img, img2, channel_axis=-1, data_range=1, **options))


def _prepare(img: np.ndarray, eight_bit: bool) -> np.ndarray:
    return np.rint(img * 255).astype(np.float64) / 255 if eight_bit else img.astype(np.float64)
