"""Option files: read safely, filled with defaults, and checked before anything is built or written."""

import importlib
import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)
from torch import nn

from cea_arch.archs.with_cea_arch import WithCEA
from cea_arch.data.all_in_one_dataset import DATASET_KEYS, positive_int
from cea_arch.errors import UserError, check_keys, lookup, suggest
from cea_arch.metrics.protocols import find_protocol
from cea_arch.models.cea_model import optimizer_class
from cea_arch.models.training_step import AMP

LOADER_KEYS = {
    'batch_size_per_gpu',
    'num_worker_per_gpu',
    'dataset_enlarge_ratio',
    'pin_memory',
    'persistent_workers',
    'prefetch_mode',
    'num_prefetch_queue',
    'benchmark',
    'group',
}
KNOWN_KEYS = {
    '': {
        'name',
        'model_type',
        'scale',
        'num_gpu',
        'device',
        'manual_seed',
        'datasets',
        'network_g',
        'path',
        'train',
        'val',
    }
    | {'logger', 'dist_params', 'find_unused_parameters', 'auto_resume', 'is_train', 'dist', 'rank', 'world_size'},
    'train': {
        'accumulate',
        'amp',
        'grad_clip',
        'max_skipped',
        'ema_decay',
        'optim_g',
        'scheduler',
        'total_iter',
        'warmup_iter',
        'pixel_opt',
        'fft_opt',
        'perceptual_opt',
    },
    'val': {'val_freq', 'save_img', 'suffix', 'protocol', 'metrics', 'pbar'},
    'logger': {'print_freq', 'save_checkpoint_freq', 'keep_last', 'use_tb_logger', 'wandb'},
    'path': {'pretrain_network_g', 'param_key_g', 'strict_load_g', 'resume_state', 'experiments_root', 'models', 'log'}
    | {'training_states', 'visualization', 'results_root'},
}
DEFAULTS = {
    'num_gpu': 'auto',
    'manual_seed': 0,
    'path': {},
    'logger': {'print_freq': 100, 'save_checkpoint_freq': 5000, 'use_tb_logger': True},
    'val': {'val_freq': 5000, 'save_img': False},
}
_NUMBER = re.compile(r'[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+')


class OptionLoader(yaml.SafeLoader):
    """Safe YAML (no Python tags), where ``1e-3`` is the number that everybody means, as in YAML 1.2."""


OptionLoader.add_implicit_resolver('tag:yaml.org,2002:float', re.compile(f'^{_NUMBER.pattern}$'), list('-+.0123456789'))


def read_options(path: str) -> dict[str, Any]:
    """Read an option file and fill in what it may leave out (``DEFAULTS``).

    Raises:
        UserError: No such file, not YAML, or without ``name``, ``model_type``, ``network_g`` or ``datasets``.
    """
    file = Path(path)
    if not file.is_file():
        options = [str(p) for p in file.parent.glob('*.yml')] if file.parent.is_dir() else []
        raise UserError(f'option file {path!r} does not exist.{suggest(path, options)}')
    try:
        opt = yaml.load(file.read_text('utf-8'), Loader=OptionLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not a valid option file: {error}') from error
    for key in ('name', 'model_type', 'network_g', 'datasets'):
        if not isinstance(opt, dict) or not opt.get(key):
            raise UserError(f'{path}: {key} is missing.')
    for key, default in DEFAULTS.items():
        given = opt.get(key)
        opt[key] = {**default, **(given or {})} if isinstance(default, dict) else default if given is None else given
    mps = getattr(torch.backends, 'mps', None)
    if opt['num_gpu'] == 'auto' and not torch.cuda.is_available() and mps is not None and mps.is_available():
        opt['device'] = 'mps'
    return opt


def read_base_network(path: str) -> nn.Module:
    """Build the network of an option file or, of :class:`WithCEA`, its base alone; UserError as for check_options."""
    options = read_options(path)['network_g']
    return _check_network(options.get('base', options))


def check_options(opt: dict[str, Any]) -> None:
    """Check parsed options, in place where ``1e-3`` came as a string: names, keys, files, and that everything builds.

    Raises:
        UserError: Names the first key or file at fault, what was expected and what was found.
    """
    for section in ('train', 'val', 'logger'):
        if section in opt:
            opt[section] = _numbers(opt[section])
    if opt['num_gpu'] > torch.cuda.device_count():
        raise UserError(
            f'num_gpu is {opt["num_gpu"]}, but {torch.cuda.device_count()} are here; num_gpu: 0 runs on the CPU.'
        )
    lookup(MODEL_REGISTRY, opt['model_type'], 'model_type')
    if opt['model_type'] == 'CEAModel':
        for section, known in KNOWN_KEYS.items():
            check_keys(opt.get(section) or {} if section else opt, known, section or 'options')
    _check_network(opt['network_g'])
    _apply_protocol(opt)
    for phase, dataset in opt['datasets'].items():
        _check_dataset(phase, dataset, opt)
    for name, metric in (opt['val'].get('metrics') or {}).items():
        lookup(METRIC_REGISTRY, metric.get('type'), f'val.metrics.{name}.type')
    _check_weights(opt)
    if opt['is_train']:
        _check_training(opt)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _check_arguments(target: Callable, options: dict[str, Any], label: str, skip: tuple[str, ...] = ('self',)) -> None:
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_keys(options, set(parameters) - set(skip), label)


def _check_network(options: dict[str, Any], label: str = 'network_g') -> nn.Module:
    options = deepcopy(options)
    network = lookup(ARCH_REGISTRY, options.pop('type', None), f'{label}.type')
    _check_arguments(network, options, label)
    if network is WithCEA and isinstance(options.get('base'), dict):
        _check_network(options['base'], f'{label}.base')
    try:
        return network(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f'{label}: {error}') from error


def _apply_protocol(opt: dict[str, Any]) -> None:
    """``val.protocol`` sets the metrics, and the centre crop of evaluation sets that do not set their own."""
    name = opt['val'].get('protocol')
    if name is None:
        return
    protocol = find_protocol(name, 'val.protocol')
    given = opt['val'].get('metrics') or {}
    for metric in given:
        if metric in protocol.metrics:
            raise UserError(f'val.metrics.{metric}: protocol {name} defines this metric; give yours another name.')
    opt['val']['metrics'] = protocol.metrics | given
    for phase, dataset in opt['datasets'].items():
        if phase != 'train' and dataset.get('type') == 'AllInOneDataset':
            dataset.setdefault('crop_base', protocol.crop_base)


def _check_dataset(phase: str, options: dict[str, Any], opt: dict[str, Any]) -> None:
    label = f'datasets.{phase}'
    if phase != 'train' and phase.split('_')[0] not in ('val', 'test'):
        raise UserError(f'{label}: a data set is called train, val, val_1, test_1, and so on.')
    if not options.get('name'):
        raise UserError(f'{label}.name is missing.')
    dataset_type = lookup(DATASET_REGISTRY, options.get('type'), f'{label}.type')
    if options['type'] == 'AllInOneDataset':
        check_keys(options, DATASET_KEYS | LOADER_KEYS, label)
    try:
        dataset = dataset_type(deepcopy(options))
    except (UserError, KeyError, OSError, AssertionError, ValueError) as error:
        raise UserError(f'{label}: {error!r}' if isinstance(error, KeyError) else f'{label}: {error}') from error
    if phase == 'train':
        batch = positive_int(options.get('batch_size_per_gpu'), f'{label}.batch_size_per_gpu')
        parts = positive_int((opt.get('train') or {}).get('accumulate', 1), 'train.accumulate')
        if parts > batch:
            raise UserError(f'train.accumulate: a batch of {batch} on each device cannot be computed in {parts} parts.')
        batch *= opt['world_size'] if opt['dist'] else max(opt['num_gpu'], 1)
        samples = len(dataset) * options.get('dataset_enlarge_ratio', 1)
        if batch > samples:
            raise UserError(
                f'{label}: a batch of {batch} is more than the {samples} samples of an epoch; raise repeat.'
            )
        if not isinstance(options.get('num_worker_per_gpu'), int):
            raise UserError(
                f'{label}.num_worker_per_gpu must be a whole number, got {options.get("num_worker_per_gpu")!r}.'
            )


def _check_weights(opt: dict[str, Any]) -> None:
    weights = opt['path'].get('pretrain_network_g')
    if weights and not Path(weights).is_file():
        raise UserError(f'path.pretrain_network_g: file {weights!r} does not exist.')
    if not weights and not opt['is_train']:
        raise UserError('path.pretrain_network_g is missing: without it, untrained weights would be tested.')


def _check_training(opt: dict[str, Any]) -> None:
    train = opt.get('train') or {}
    for key in ('total_iter', 'optim_g', 'scheduler'):
        if not train.get(key):
            raise UserError(f'train.{key} is missing.')
    if 'train' not in opt['datasets']:
        raise UserError('datasets.train is missing.')
    train['amp'] = train.get('amp') or 'off'  # YAML takes off for false
    if train['amp'] not in AMP:
        raise UserError(f'train.amp must be one of {", ".join(AMP)}, got {train["amp"]!r}.')
    for label, value in (
        ('train.max_skipped', train.get('max_skipped')),
        ('logger.keep_last', opt['logger'].get('keep_last')),
    ):
        if value is not None:
            positive_int(value, label)
    clip = train.get('grad_clip')
    if clip is not None and (not isinstance(clip, (int, float)) or clip <= 0):
        raise UserError(f'train.grad_clip must be a number above 0, got {clip!r}.')
    total = int(train['total_iter'])
    if not isinstance(train['optim_g'].get('lr'), (int, float)):
        raise UserError(f'train.optim_g.lr must be a number, got {train["optim_g"].get("lr")!r}.')
    options = dict(train['optim_g'])
    _check_arguments(optimizer_class(options.pop('type', None)), options, 'train.optim_g', ('self', 'params'))
    for key in ('pixel_opt', 'fft_opt', 'perceptual_opt'):
        if train.get(key):
            options = dict(train[key])
            loss = lookup(LOSS_REGISTRY, options.pop('type', None), f'train.{key}.type')
            _check_arguments(loss, options, f'train.{key}')
    scheduler = dict(train['scheduler'])
    scheduler_type = scheduler.pop('type', None)
    known = {'MultiStepLR': 'MultiStepRestartLR', 'MultiStepRestartLR': 'MultiStepRestartLR'}
    known['CosineAnnealingRestartLR'] = 'CosineAnnealingRestartLR'
    if scheduler_type not in known:
        raise UserError(f'train.scheduler.type {scheduler_type!r} is not known.{suggest(scheduler_type or "", known)}')
    schedulers = importlib.import_module('basicsr.models.lr_scheduler')
    _check_arguments(getattr(schedulers, known[scheduler_type]), scheduler, 'train.scheduler', ('self', 'optimizer'))
    if scheduler_type == 'CosineAnnealingRestartLR' and sum(scheduler.get('periods', [])) < total:
        raise UserError(f'train.scheduler.periods {scheduler.get("periods")} end before total_iter, {total}.')
