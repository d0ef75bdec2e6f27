"""One optimizer step: precision, a batch in parts, clipping, and a guard against numbers that are not finite."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cea_arch.errors import UserError, suggest
from cea_arch.layers.inject import match_names

OPTIMIZERS = ('Adam', 'AdamW', 'NAdam', 'RAdam', 'SGD', 'RMSprop')
AMP = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class TrainingStopped(UserError):
    """The guard gave up; the model has saved a checkpoint."""


class TrainingStep:
    """Compute the gradients of a batch and step.

    Args:
        options: ``train`` of an option file, of which it reads
            amp: ``off``, ``bf16`` or ``fp16`` (with loss scaling): the network runs under autocast, losses in float32.
            accumulate: In how many parts, one after the other, a batch is computed; ``train.total_batch_size`` sets
                it, see :func:`cea_arch.distributed.spread_batch`.
            grad_clip: Largest norm of the gradient; longer ones are scaled down to it.
            max_skipped: After so many steps in a row whose gradient is not finite, :class:`TrainingStopped` is raised.
            compile: Compile the network with ``torch.compile``, for training; validation runs it as it is.
            channels_last: Keep images, features and convolutions' weights with their channels last in memory.
        device: Where the network is.
    """

    def __init__(self, options: dict[str, Any], device: torch.device) -> None:
        self.device_type = device.type
        self.dtype = AMP[options.get('amp', 'off')]
        self.accumulate = options.get('accumulate', 1)
        self.grad_clip = options.get('grad_clip') or float('inf')
        self.max_skipped = options.get('max_skipped', 10)
        self.compile = options.get('compile', False)
        self.memory_format = memory_format(options)
        self.compiled: Callable[[Tensor], Tensor] | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.skipped = 0  # in a row

    def run(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor, Tensor],
        losses_of: Callable[[Tensor, Tensor], dict[str, Tensor]],
    ) -> tuple[dict[str, Tensor], bool]:
        """Step on ``batch``, degraded and clean images.

        Returns:
            The loss terms and ``grad_norm``; and whether a step was made, which needs a finite gradient.
        """
        if self.compiled is None:
            self.compiled = torch.compile(net) if self.compile else net
        optimizer.zero_grad()
        parts = list(zip(*(images.chunk(self.accumulate) for images in batch), strict=True))
        logged = Counter()
        for number, (lq, gt) in enumerate(parts, 1):
            share = len(lq) / len(batch[0])
            with nullcontext() if number == len(parts) else _no_sync(net):
                with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
                    output = self.compiled(lq.contiguous(memory_format=self.memory_format))
                losses = losses_of(output.float() if self.dtype else output, gt)
                self.scaler.scale(share * sum(losses.values())).backward()
            logged.update({name: share * value.detach() for name, value in losses.items()})
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        norm = nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        finite = bool(norm.isfinite())
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped = 0 if finite else self.skipped + 1
        return {**logged, 'grad_norm': norm}, finite

    def complain(self, losses: dict[str, Tensor], iteration: int, files: list[str]) -> None:
        """Say that a step was skipped, and on which files."""
        values = ', '.join(f'{name} {float(value):.3g}' for name, value in losses.items())
        get_root_logger().warning(
            f'Iteration {iteration}: the gradient is not finite ({values}); step skipped, {self.skipped} in a row. '
            f'Batch: {", ".join(files)}'
        )

    def check(self, files: list[str]) -> None:
        """Raise TrainingStopped after ``max_skipped`` skipped steps in a row."""
        if self.skipped >= self.max_skipped:
            raise TrainingStopped(
                f'{self.skipped} steps in a row had a gradient that is not finite. Saved; look at the images of the '
                f'last batch ({", ".join(files)}), lower the learning rate, set train.grad_clip, or use bf16 or off '
                'instead of fp16.'
            )


def memory_format(options: dict[str, Any]) -> torch.memory_format:
    """That of images and weights in training, by ``train.channels_last``."""
    return torch.channels_last if options.get('channels_last') else torch.contiguous_format


def checkpoint_activations(net: nn.Module, chosen: bool | Sequence[str]) -> None:
    """Have modules keep their input alone for the backward pass, and compute what is inside of them a second time.

    Args:
        net: Network, changed in place; its weights and their names stay.
        chosen: Patterns over names of modules, as for :func:`cea_arch.layers.inject_cea`; or true for what the network
            itself names as its ``blocks``.

    Raises:
        UserError: A pattern matches nothing, or the network names no blocks.
    """
    if not chosen:
        return
    patterns = getattr(net, 'blocks', None) if chosen is True else chosen
    if patterns is None:
        raise UserError(
            f'train.checkpoint_activations: {type(net).__name__} does not say what its blocks are. Give a list of '
            'patterns, such as [body.*]; cea modules -opt lists the modules.'
        )
    modules = dict(net.named_modules())
    try:
        names = match_names(patterns, [name for name in modules if name])
    except ValueError as error:
        raise UserError(f'train.checkpoint_activations: {error}') from error
    for name in names:
        modules[name].forward = partial(checkpoint, modules[name].forward, use_reentrant=False)


def _no_sync(net: nn.Module) -> AbstractContextManager:
    """Keep DDP from averaging gradients that are not complete yet."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def build_optimizer(
    options: dict[str, Any], parameters: Sequence[nn.Parameter], device_type: str
) -> torch.optim.Optimizer:
    """One of ``OPTIMIZERS`` by the options of ``train.optim_g``, fused where torch has it so and they let it.

    Raises:
        UserError: Another type; names the nearest.
    """
    name, options = options['type'], {key: value for key, value in options.items() if key != 'type'}
    if name not in OPTIMIZERS:
        raise UserError(f'train.optim_g.type {name!r} is not known.{suggest(name, OPTIMIZERS)}')
    optimizer = getattr(torch.optim, name)
    others = options.get('foreach') or options.get('differentiable')
    if 'fused' in inspect.signature(optimizer).parameters and device_type in ('cpu', 'cuda') and not others:
        options.setdefault('fused', True)
    return optimizer(parameters, **options)
