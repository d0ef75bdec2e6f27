"""L1 in the frequency domain, as the paper and others weigh it beside the pixel loss."""

from typing import Literal

import torch
from torch import Tensor, nn


class CEAFFTLoss(nn.Module):
    """Mean absolute difference of two spectra: of their amplitudes (eq. 11 of arXiv 2605.06127), or of both parts.

    With the unnormalised transform of the literature (``norm: backward``) the term grows with the patch: on 128 x 128
    patches with white errors ``complex`` is about 90 times the L1 loss, ``amplitude`` about 70 times.

    Args:
        loss_weight: Factor of the result.
        target: ``amplitude``, as in the paper; ``complex``, real and imaginary parts, as in MoCE-IR's and BioIR's code.
        norm: Normalisation of the transform, see ``torch.fft.rfft2``.

    Raises:
        ValueError: An unknown word.
    """

    def __init__(
        self,
        loss_weight: float = 0.1,
        target: Literal['amplitude', 'complex'] = 'amplitude',
        norm: Literal['forward', 'backward', 'ortho'] = 'backward',
    ) -> None:
        super().__init__()
        if target not in ('amplitude', 'complex'):
            raise ValueError(f'target must be amplitude or complex, got {target!r}.')
        self.loss_weight = loss_weight
        self.target = target
        self.norm = norm

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare images ``(B, C, H, W)``; a scalar, computed in float32 or wider."""
        pred, target = (t.float() if t.dtype.itemsize < 4 else t for t in (pred, target))
        if self.target == 'complex':
            error = torch.view_as_real(torch.fft.rfft2(pred - target, norm=self.norm))
        else:  # abs() of a complex number has a gradient at zero, the root of its squares has none
            error = torch.fft.rfft2(pred, norm=self.norm).abs() - torch.fft.rfft2(target, norm=self.norm).abs()
        return self.loss_weight * error.abs().mean()
