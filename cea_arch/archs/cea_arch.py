"""All that BasicSR's registries get from us: one table, entered when basicsr is first imported."""

from cea_arch.compat import registry
from cea_arch.data.all_in_one_dataset import AllInOneDataset
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.losses.fft_loss import CEAFFTLoss
from cea_arch.metrics.lpips_metric import calculate_cea_lpips
from cea_arch.metrics.psnr_ssim_metric import (
    calculate_psnr_float,
    calculate_ssim_gaussian,
    calculate_ssim_uniform,
)
from cea_arch.models.cea_model import CEAModel
from cea_arch.networks import CEAIR, WithCEA

REGISTERED = {
    'ARCH': (CEAIR, WithCEA, CEABlock, CEALayer),
    'DATASET': (AllInOneDataset,),
    'LOSS': (CEAFFTLoss,),
    'METRIC': (calculate_psnr_float, calculate_ssim_gaussian, calculate_ssim_uniform, calculate_cea_lpips),
    'MODEL': (CEAModel,),
}
for kind, known in REGISTERED.items():
    for item in known:
        registry(kind).register(item)
