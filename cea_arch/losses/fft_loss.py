"""L1 in the frequency domain, as MoCE-IR and BioIR weigh it beside the pixel loss."""

from typing import Literal

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn


@LOSS_REGISTRY.register()
class FFTLoss(nn.Module):
    """Mean absolute difference of the real and imaginary parts of ``rfft2``.

    With the unnormalised transform of the literature (``norm: backward``) the term grows with the patch: on 128 x 128
    patches with white errors it is about 90 times the L1 loss, so that a weight of 0.1 makes it about 9 times as large.

    Args:
        loss_weight: Factor of the result.
        norm: Normalisation of the transform, see ``torch.fft.rfft2``.
    """

    def __init__(self, loss_weight: float = 0.1, norm: Literal['forward', 'backward', 'ortho'] = 'backward') -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.norm = norm

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare images ``(B, C, H, W)``; a scalar, computed in float32 or wider."""
        error = pred.float() - target.float() if pred.dtype.itemsize < 4 else pred - target
        spectrum = torch.view_as_real(torch.fft.rfft2(error, norm=self.norm))
        return self.loss_weight * spectrum.abs().mean()
