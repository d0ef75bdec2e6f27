"""What options name is tried on a few numbers before a run writes anything: whatever would fail later fails here."""

import importlib
import inspect
import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY
from torch import nn

from cea_arch.errors import UserError, lookup, told
from cea_arch.metrics.protocols import score
from cea_arch.models.training_step import build_optimizer, checkpoint_activations
from cea_arch.restoring.maps import RoutingMaps
from cea_arch.rules import is_foreign

IMAGE, PATCH = 192, 32  # pixels; NIQE looks at blocks of 96
OFFLINE = ('offline', 'disabled', 'dryrun')  # of WANDB_MODE


def rehearse(opt: dict[str, Any], network: nn.Module) -> None:
    """Try device and optimizers; of :class:`CEAModel` metrics, maps, losses, checkpoints of activations, wandb too.

    Args:
        opt: Options, as BasicSR parsed them.
        network: A network of ``network_g`` that will not be used; changed.

    Raises:
        UserError: What cannot be used, by its option.
    """
    device = opt.get('device', 'cpu') if opt['num_gpu'] == 0 else 'cpu'
    _try('device', lambda: torch.zeros(1, device=device))
    if opt['model_type'] != 'CEAModel':
        if opt['is_train']:
            _rehearse_optimizers(opt)
        return
    images = dict(zip(('restored', 'clean'), np.random.default_rng(0).random((2, IMAGE, IMAGE, 3), np.float32)))
    for name, options in (opt['val'].get('metrics') or {}).items():
        _try(f'val.metrics.{name}', score, images, {name: options})
    for name in [opt['val']['maps']] if opt['val'].get('maps') is True else opt['val'].get('maps') or []:
        _try('val.maps', RoutingMaps, network, None if name is True else name)
    if opt['is_train']:
        _rehearse_training(opt['train'], network)
        _rehearse_patch(opt, network)
        _check_wandb(opt)


@torch.no_grad()
def _rehearse_patch(opt: dict[str, Any], network: nn.Module) -> None:
    """See that the network takes degraded patches of the training's size, and makes clean ones of them."""
    options = opt['datasets']['train']
    scales = [source.get('scale', 1) for source in options.get('sources', {}).values()] or [opt.get('scale', 1)]
    size = options.get('gt_size')
    if not size:
        return
    for scale in sorted(set(scales)):
        small = size // scale
        doing = f'of patches of {small} x {small} pixels'
        found = _try('network_g', network.eval(), torch.zeros(1, 3, small, small), doing=doing)
        if isinstance(found, torch.Tensor) and found.shape[-2:] != (size, size):
            high, wide = found.shape[-2:]
            raise UserError(
                f'network_g makes {wide} x {high} pixels {doing}, but clean ones have {size} x {size} '
                '(datasets.train.gt_size).',
                'network_g',
            )


def _rehearse_training(train: dict[str, Any], network: nn.Module) -> None:
    for key in ('pixel_opt', 'fft_opt', 'perceptual_opt'):
        if train.get(key):
            _try(f'train.{key}', _backward, train[key], key == 'perceptual_opt')
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    _try('train.optim_g', lambda: build_optimizer(train['optim_g'], [parameter], 'cpu').step())
    checkpoint_activations(network, train.get('checkpoint_activations', False))


def _rehearse_optimizers(opt: dict[str, Any]) -> None:
    """Of a model that leaves them to BasicSR, which builds them from ``optim_g``, ``optim_d`` and the like."""
    model = lookup(MODEL_REGISTRY, opt['model_type'], 'model_type')
    if model.get_optimizer is not BaseModel.get_optimizer or is_foreign(model.setup_optimizers):
        return

    def build(options: dict[str, Any]) -> None:
        options = dict(options)
        model.get_optimizer(None, options.pop('type'), [nn.Parameter(torch.ones(2))], **options)

    for key in [key for key in opt['train'] if key.startswith('optim_')]:
        _try(f'train.{key}', build, opt['train'][key])


def _backward(options: dict[str, Any], of_two: bool) -> None:
    """Take the gradient of a loss, which gives a number, or of content and style two."""
    restored, clean = torch.rand(2, 1, 3, PATCH, PATCH)
    options = deepcopy(options)
    loss = LOSS_REGISTRY.get(options.pop('type'))(**options)  # BasicSR's builder would set up the log before its time
    found = loss(restored.requires_grad_(), clean)
    parts = [part for part in found if part is not None] if of_two else [found]
    sum(parts).backward()


def _check_wandb(opt: dict[str, Any]) -> None:
    options = opt['logger'].get('wandb') or {}
    if not options.get('project') or 'debug' in opt['name']:
        return
    if not opt['logger'].get('use_tb_logger'):
        raise UserError('logger.wandb: wandb shows what TensorBoard is told; set use_tb_logger: true.', 'logger.wandb')
    try:
        wandb = importlib.import_module('wandb')
    except ImportError as error:
        raise UserError(
            'logger.wandb is set, but wandb is not installed: pip install wandb.', 'logger.wandb'
        ) from error
    asks = 'prompt' in inspect.signature(wandb.login).parameters  # since 2026
    if os.environ.get('WANDB_MODE') in OFFLINE or (wandb.login(prompt=False) if asks else wandb.api.api_key):
        return
    raise UserError('logger.wandb: no one is logged in. Run `wandb login`, or set WANDB_MODE=offline.', 'logger.wandb')


def _try(label: str, call: Callable, *arguments: Any, doing: str = '') -> Any:
    try:
        return call(*arguments)
    except UserError:
        raise
    except Exception as error:  # of any library
        raise UserError(f'{label} cannot be used{" " * bool(doing)}{doing}: {told(error)}', label) from error
