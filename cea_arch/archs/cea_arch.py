"""All that BasicSR's registries get from us: one table, entered when basicsr is first imported."""

import inspect
from collections.abc import Callable

from cea_arch.compat import registry
from cea_arch.data.cea_dataset import CEADataset
from cea_arch.errors import UserError
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.losses.fft_loss import CEAFFTLoss
from cea_arch.metrics.lpips_metric import calculate_cea_lpips
from cea_arch.metrics.psnr_ssim_metric import (
    calculate_cea_psnr,
    calculate_cea_ssim_gaussian,
    calculate_cea_ssim_uniform,
)
from cea_arch.models.cea_model import CEAModel
from cea_arch.networks import CEAIR, WithCEA

REGISTERED = {
    'ARCH': (CEAIR, WithCEA, CEABlock, CEALayer),
    'DATASET': (CEADataset,),
    'LOSS': (CEAFFTLoss,),
    'METRIC': (calculate_cea_psnr, calculate_cea_ssim_gaussian, calculate_cea_ssim_uniform, calculate_cea_lpips),
    'MODEL': (CEAModel,),
}


def register(table: dict[str, tuple[Callable, ...]]) -> None:
    """Enter classes and functions, by the kind of registry.

    Raises:
        UserError: Somebody else has entered one of the names; nothing is entered then.
    """
    for kind, items in table.items():
        for item in items:
            if other := dict(iter(registry(kind))).get(item.__name__):
                raise UserError(
                    f'two files register {item.__name__!r} in {kind}_REGISTRY of basicsr: {inspect.getfile(other)} and '
                    f'{inspect.getfile(item)}. Leave one of them out.'
                )
    for kind, items in table.items():
        for item in items:
            registry(kind).register(item)


register(REGISTERED)
