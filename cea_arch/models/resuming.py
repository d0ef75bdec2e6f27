"""Going on with a training: from what its state holds, as the options say now."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cea_arch.errors import UserError

RUNTIME = ('optimizer', 'last_epoch', 'verbose')  # of a schedule, beside names that begin with _
KEPT = ('network_g', 'train', 'manual_seed', 'world_size', 'num_gpu')  # of the options, in a training state


def made_with(opt: dict[str, Any]) -> dict[str, Any]:
    """The options that decide how a training goes, to be stored with its state."""
    options = {key: deepcopy(opt[key]) for key in KEPT if key in opt}
    options['network_g'] = dict(options['network_g'])
    options['datasets'] = {'train': deepcopy(opt['datasets'].get('train'))}
    return options


def take_up(optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], state: dict[str, Any]) -> list[str]:
    """Give optimizers and schedules, built as the options say now, the state of a training.

    Where a schedule is another one than it was, by its kind, numbers or the learning rate that it starts from, the new
    one holds from the next iteration on, as if it had held from the first. Other numbers of an optimizer are the
    options' too.

    Returns:
        What is not as it was, in sentences.

    Raises:
        UserError: Another number of optimizers, or of parameters that train.
    """
    if len(state['optimizers']) != len(optimizers) or len(state['schedulers']) != len(schedulers):
        raise UserError(f'the training state has {len(state["optimizers"])} optimizers, not {len(optimizers)}.')
    said = []
    for optimizer, stored in zip(optimizers, state['optimizers'], strict=True):
        said += _load_optimizer(optimizer, stored)
    for scheduler, stored in zip(schedulers, state['schedulers'], strict=True):
        said += _load_schedule(scheduler, stored)
    return said


def _load_optimizer(optimizer: Optimizer, stored: dict[str, Any]) -> list[str]:
    options = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(stored)
    except ValueError as error:
        raise UserError(f'the training state is not of these parameters: {error}.') from error
    said = []
    for group, fresh in zip(optimizer.param_groups, options, strict=True):
        for key in fresh.keys() - {'lr'}:
            if _plain(group.get(key)) != _plain(fresh[key]):
                if key != 'initial_lr':  # which the schedule speaks of
                    said.append(f'{key} is {fresh[key]} (was {group.get(key)}).')
                group[key] = fresh[key]
    return said


def _load_schedule(scheduler: LRScheduler, stored: dict[str, Any]) -> list[str]:
    numbers = {key: value for key, value in vars(scheduler).items() if key not in RUNTIME and not key.startswith('_')}
    if all(_plain(stored.get(key)) == _plain(value) for key, value in numbers.items()):
        scheduler.load_state_dict(stored)
        return []
    groups = scheduler.optimizer.param_groups
    before, last = groups[0]['lr'], stored['last_epoch']
    for scheduler.last_epoch in range(last + 1):  # a schedule of steps goes on from the rate before
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group['lr'] = rate
    scheduler._last_lr = [group['lr'] for group in groups]
    scheduler._step_count = last + 1
    return [
        f'The schedule is another one: its learning rate after {last + 1} iterations is {groups[0]["lr"]:.3e} '
        f'(was {before:.3e}), and it goes on from there.'
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
