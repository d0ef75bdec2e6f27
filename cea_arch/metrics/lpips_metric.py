"""LPIPS (Zhang et al., CVPR 2018) by the package of its authors: how far apart two pictures look."""

from functools import lru_cache

import numpy as np
import torch
from torch import nn

from cea_arch.checkpoints import read_checkpoint, weights_of
from cea_arch.errors import UserError, need
from cea_arch.metrics.psnr_ssim_metric import of_float_rgb

BACKBONES = ('alex', 'vgg', 'squeeze')


@of_float_rgb
def calculate_cea_lpips(
    img: np.ndarray, img2: np.ndarray, net: str = 'alex', backbone: str | None = None, eight_bit: bool = False
) -> float:
    """LPIPS 0.1, lower is better; the literature reports it with AlexNet.

    Args:
        img, img2: RGB ``(H, W, 3)`` in [0, 1].
        net: ``alex``, ``vgg`` or ``squeeze``.
        backbone: torchvision's file of its ImageNet weights (``alexnet-owt-7be5be79.pth``); by default it is
            downloaded, once, by torch.
        eight_bit: Round both images to 8-bit levels first, as saving them would.

    Raises:
        UserError: The extra ``lpips`` is absent, the network is unknown, or its weights cannot be had or do not fit.
    """
    images = [np.rint(image * 255) / 255 if eight_bit else image for image in (img, img2)]
    tensors = [torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) * 2 - 1 for image in images]
    with torch.no_grad():
        return float(_network(net, backbone)(*tensors))


@lru_cache(maxsize=2)
def _network(net: str, backbone: str | None) -> nn.Module:
    lpips = need('lpips', 'lpips', 'LPIPS')
    if net not in BACKBONES:
        raise UserError(f'net must be one of {", ".join(BACKBONES)}, got {net!r}.')
    try:
        network = lpips.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
    except OSError as error:
        raise UserError(
            f"LPIPS: the weights of {net}'s backbone cannot be downloaded ({error}). Give torchvision's file of them "
            'as backbone.'
        ) from error
    if backbone is not None:
        _load_backbone(network.net, backbone)
    return network.eval()


def _load_backbone(network: nn.Module, path: str) -> None:
    """Load a classifier's weights, ``features.0.weight``, into the slices that LPIPS has cut it into."""
    weights = weights_of(read_checkpoint(path), path)
    found = {name: weights.get(f'features.{name.partition(".")[2]}') for name in network.state_dict()}
    if wrong := [n for n, value in network.state_dict().items() if found[n] is None or found[n].shape != value.shape]:
        name = f'features.{wrong[0].partition(".")[2]}'
        raise UserError(f'{path} are not the weights of this backbone: {name} is absent or of another shape.')
    network.load_state_dict(found)
