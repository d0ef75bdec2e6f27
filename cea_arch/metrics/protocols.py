"""Named protocols of scoring: on which pixels the literature takes PSNR and SSIM, and with which window."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cea_arch.compat import registry
from cea_arch.errors import UserError, suggest
from cea_arch.metrics.psnr_ssim_metric import uint8_bgr


@dataclass(frozen=True)
class Protocol:
    """One way to score restored images.

    Attributes:
        text: What it does and who reports by it.
        crop_base: Images are centre-cropped to multiples of it, in pixels, before the network sees them.
        metrics: As in an option file's ``val.metrics``.
    """

    text: str
    crop_base: int
    metrics: dict[str, dict[str, Any]]


def _float_metrics(ssim: str, **options: bool) -> dict[str, dict[str, Any]]:
    return {'psnr': {'type': 'calculate_cea_psnr', **options}, 'ssim': {'type': ssim, **options}}


PROTOCOLS = {
    'aio': Protocol(
        'float RGB clipped to [0, 1], centre crop to multiples of 16, SSIM 7x7 (AirNet, PromptIR, AdaIR, DFPIR)',
        16,
        _float_metrics('calculate_cea_ssim_uniform'),
    ),
    'moce-ir': Protocol(
        'float RGB clipped to [0, 1], centre crop to multiples of 16, SSIM 11x11 Gaussian (MoCE-IR)',
        16,
        _float_metrics('calculate_cea_ssim_gaussian'),
    ),
    'onerestore': Protocol(
        'RGB rounded to 8 bits, as in saved files, whole images, SSIM 7x7 (OneRestore, BioIR on CDD-11)',
        1,
        _float_metrics('calculate_cea_ssim_uniform', eight_bit=True),
    ),
    'basicsr': Protocol(
        "8-bit images, whole, BasicSR's own PSNR and SSIM (11x11 Gaussian, population covariance)",
        1,
        {name: {'type': f'calculate_{name}', 'crop_border': 0} for name in ('psnr', 'ssim')},
    ),
}


def find_protocol(name: str, label: str) -> Protocol:
    """One of ``PROTOCOLS`` by its name; any other is an error that names ``label`` and the nearest."""
    if name not in PROTOCOLS:
        hint = suggest(name, PROTOCOLS)
        raise UserError(f'{label} must be one of {", ".join(PROTOCOLS)}, got {name!r}.{hint}', label)
    return PROTOCOLS[name]


def score(images: dict[str, np.ndarray], metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Score a restored image against the clean one, and the degraded one beside it.

    Args:
        images: ``restored``, ``clean`` and possibly ``degraded``: RGB float32 ``(H, W, 3)`` in [0, 1].
        metrics: Registered metrics with their options, by name. Those of this package get float RGB images, BasicSR's
            8-bit BGR ones.

    Returns:
        ``<metric>`` and, where the degraded image has the clean one's size, ``<metric>_input``, by metric.
    """
    scores = {}
    for name, options in metrics.items():
        options = {key: value for key, value in options.items() if key != 'better'}
        metric = registry('METRIC').get(options.pop('type'))
        float_rgb = getattr(metric, 'float_rgb', False)
        converted = {key: img if float_rgb else uint8_bgr(img) for key, img in images.items()}
        try:
            if 'degraded' in images and images['degraded'].shape == images['clean'].shape:
                scores[f'{name}_input'] = float(metric(img=converted['degraded'], img2=converted['clean'], **options))
            scores[name] = float(metric(img=converted['restored'], img2=converted['clean'], **options))
        except Exception as error:
            height, width = images['clean'].shape[:2]
            raise UserError(f'metric {name} of {width} x {height} pixels: {type(error).__name__}: {error}') from error
    return scores
