"""Option files: read safely, filled with defaults, and checked before anything is built or written."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from torch import nn
from torch.utils.data import Dataset

from cea_arch import distributed
from cea_arch.checkpoints import check_fit, read_checkpoint, weights_of
from cea_arch.errors import Notice, UserError, lookup, raise_all, told
from cea_arch.metrics.protocols import find_protocol
from cea_arch.networks.with_cea import NetworkOptions, WithCEA, holds_layers_alone
from cea_arch.rules import Checker, section
from cea_arch.training.option_files import Options, apply_setting, import_plugins, load_options
from cea_arch.training.option_rules import UNREAD, homes, needed_of_network, options_schema
from cea_arch.training.rehearsal import rehearse

LONGEST_NAME = 150  # bytes; what BasicSR and we put around it, such as train_*_20260101_000000.log, must fit as well
DEFAULTS = {
    'num_gpu': 'auto',
    'manual_seed': 0,
    'path': {},
    'logger': {'print_freq': 100, 'save_checkpoint_freq': 5000, 'use_tb_logger': True},
    'val': {'val_freq': 5000, 'save_img': False},
}


@dataclass
class Parts:
    """What :func:`check_options` has built, and found missing.

    Attributes:
        network: ``network_g``, on the CPU.
        datasets: By phase, those whose files are there.
        missing: Files, folders and GPUs that are not there, by the option that names them.
    """

    network: nn.Module
    datasets: dict[str, Dataset] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def read_options(path: str, settings: list[str] | None = None, force_yml: list[str] | None = None) -> Options:
    """Read an option file, change it, fill in what it may leave out, and check every key and value by the rules.

    Args:
        path: The option file.
        settings: Changes such as ``train.optim_g.lr=1e-4``; the value is YAML.
        force_yml: The same in BasicSR's way, ``train:optim_g:lr=1e-4``.

    Returns:
        The options with ``DEFAULTS``, and the metrics and crops that ``val.protocol`` stands for.

    Raises:
        UserError: Names each line, key or setting at fault, what was expected and what was found.
    """
    opt = load_options(path)
    _fill(opt)
    for separator, entries in (('.', settings), (':', force_yml)):
        for entry in entries or ():
            apply_setting(opt, entry, separator)
    _fill(opt)
    if isinstance(opt.get('train'), dict) and opt['train'].get('amp') is False:
        opt['train']['amp'] = 'off'  # which YAML takes for false
    with opt.placing():
        import_plugins(opt)
        schema = options_schema()
        checker = Checker(schema['$defs'], homes(), UNREAD)
        checker.check(opt, schema, '')
        _check_names(opt)
        _check_loaders(opt['datasets'])
        _apply_protocol(opt)
    _say_unread(opt, checker.passed_over)
    return opt


def _say_unread(opt: Options, labels: list[str]) -> None:
    """Say once for each key that it is read by nothing, however many sections have it."""
    keys: dict[str, list[str]] = {}
    for label in labels:
        keys.setdefault(label.rpartition('.')[2], []).append(label)
    for first, *more in keys.values():
        others = f', and {len(more)} like it,' if more else ''
        warnings.warn(f'{opt.place(first)}: {first}{others} is read by nothing.', Notice, stacklevel=3)


def read_network(path: str, base: bool = False) -> nn.Module:
    """Build the network of an option file or, on request, of :class:`WithCEA` its base alone.

    Raises:
        UserError: As :func:`check_options`.
    """
    opt = load_options(path)
    with opt.placing():
        import_plugins(opt)
        definitions = options_schema()['$defs']
        Checker(definitions).check(opt, section({'network_g': definitions['network']}, ['network_g'], closed=False), '')
        options = opt['network_g']
        if base and 'base' in options:
            return build_network(options['base'], 'network_g.base')
        return build_network(options, 'network_g')


def check_options(opt: dict[str, Any], may_miss: bool = False) -> Parts:
    """Check options, completed by BasicSR's parser, by building what they name.

    Args:
        opt: From :func:`read_options`.
        may_miss: Go on without files, folders and GPUs that are not there.

    Raises:
        UserError: Names the first key or file at fault, what was expected and what was found.
    """
    missing, gpus = dict(_missing(opt)), torch.cuda.device_count()
    if opt['num_gpu'] > gpus:
        if not may_miss:
            raise UserError(f'num_gpu is {opt["num_gpu"]}, but {gpus} are here; num_gpu: 0 runs on the CPU.', 'num_gpu')
        missing['num_gpu'] = f'{opt["num_gpu"]}, of which {gpus} are here'
    if not may_miss:
        raise_all(_absences(missing))
    if not opt['path'].get('pretrain_network_g') and not opt['is_train']:
        raise UserError('path.pretrain_network_g is missing: without it, untrained weights would be tested.', 'path')
    if opt['is_train']:
        _check_training(opt)
    _check_model(opt)
    networks = {key: build_network(opt[key], key, missing) for key in opt if key.startswith('network_')}
    parts = Parts(networks['network_g'], missing=missing)
    if 'path.pretrain_network_g' not in missing:
        _check_weights(opt['path'], parts.network)
    for phase, options in opt['datasets'].items():
        if not any(label.startswith(f'datasets.{phase}.') for label in missing):
            parts.datasets[phase] = _build_dataset(phase, options, opt)
    rehearse(opt, networks['network_g'])
    return parts


def _fill(opt: dict[str, Any]) -> None:
    for key, default in DEFAULTS.items():
        if opt.get(key) is None:
            opt[key] = deepcopy(default)
        elif isinstance(default, dict) and isinstance(opt[key], dict):
            opt[key] = {**default, **opt[key]}


def _check_names(opt: dict[str, Any]) -> None:
    """Raise UserError for names that would not become the names of one file or folder each."""
    named = {'name': opt['name'], 'val.suffix': opt['val'].get('suffix')}
    named |= {f'datasets.{phase}.name': dataset.get('name') for phase, dataset in opt['datasets'].items()}
    for label, name in named.items():
        if name is None:
            continue
        if not name.strip() or name in ('.', '..') or any(letter in name for letter in '/\\\0\n'):
            raise UserError(f'{label}: {name!r} becomes a file or folder: no slash, not empty, not . or ..', label)
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f'{label}: {name!r} becomes part of names of files: at most {LONGEST_NAME} bytes, got '
                f'{len(name.encode())}.',
                label,
            )


def _check_loaders(datasets: dict[str, Any]) -> None:
    """Raise UserError for settings of loaders that torch or BasicSR would refuse, or wait for, later."""
    for phase, options in datasets.items():
        label, workers = f'datasets.{phase}', options.get('num_worker_per_gpu', 0) if phase == 'train' else 0
        if options.get('persistent_workers') and not workers:
            own = 'num_worker_per_gpu is 0' if phase == 'train' else 'validation and tests have none'
            raise UserError(f'{label}.persistent_workers: there are no workers, {own}.', f'{label}.persistent_workers')
        if options.get('prefetch_mode') != 'cuda' or phase != 'train':
            continue
        if not torch.cuda.is_available():
            raise UserError(f'{label}.prefetch_mode: cuda needs a GPU, and there is none.', f'{label}.prefetch_mode')
        if not options.get('pin_memory'):
            raise UserError(f'{label}.prefetch_mode: cuda needs pin_memory: true.', f'{label}.prefetch_mode')


def complete(opt: dict[str, Any]) -> dict[str, Any]:
    """What BasicSR's parser made of an option file, with what our options stand for: protocol, batch of all devices."""
    opt = deepcopy(opt)
    import_plugins(opt)
    opt |= {key: NetworkOptions(opt[key]) for key in opt if key.startswith('network_')}
    _apply_protocol(opt)
    return distributed.spread_batch(opt)


def _apply_protocol(opt: dict[str, Any]) -> None:
    """``val.protocol`` sets the metrics, and the centre crop of evaluation sets that do not set their own."""
    name = (opt.get('val') or {}).get('protocol')
    if name is None:
        return
    protocol = find_protocol(name, 'val.protocol')
    given = opt['val'].get('metrics') or {}
    for metric in given:
        if given[metric] != protocol.metrics.get(metric, given[metric]):
            raise UserError(
                f'val.metrics.{metric}: protocol {name} defines this metric; give yours another name.',
                f'val.metrics.{metric}',
            )
    opt['val']['metrics'] = deepcopy(protocol.metrics) | given
    for phase, dataset in opt['datasets'].items():
        if phase != 'train' and dataset.get('type') == 'CEADataset':
            dataset.setdefault('crop_base', protocol.crop_base)


def _missing(opt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Options that name a file or folder that does not exist."""

    def walk(value: Any, label: str) -> Iterator[tuple[str, str]]:
        for key, item in value.items():
            named = key.startswith(('dataroot', 'pretrain', 'resume_state'))
            named = named or (label.startswith('network_') and key.endswith('_path'))  # as of a SpyNet inside
            if isinstance(item, dict):
                yield from walk(item, f'{label}.{key}')
            elif named and item and not Path(item).expanduser().exists():
                yield f'{label}.{key}', item

    for name in ('datasets', 'path', *(key for key in opt if key.startswith('network_'))):
        yield from walk(opt[name], name)


def _absences(missing: dict[str, str]) -> list[UserError]:
    """One for each file or folder, by the first option that names it."""
    found: dict[str, UserError] = {}
    for label, name in missing.items():
        kind = 'folder' if label.startswith('datasets.') else 'file'
        said = f'{label}: {kind} {name!r} does not exist (looked for {Path(name).absolute()}).'
        found.setdefault(name, UserError(said, label))
    return list(found.values())


def build_network(options: dict[str, Any], label: str, missing: dict[str, str] | None = None) -> nn.Module:
    """The network of a section of the options, without files that are ``missing``; errors name the key."""
    options = _without(deepcopy(options), label, missing or {})
    network = lookup(ARCH_REGISTRY, options.pop('type', None), f'{label}.type')
    if network is WithCEA:
        build_network(options['base'], f'{label}.base')
    try:
        return network(**options)
    except (TypeError, ValueError, AssertionError) as error:
        key = str(error).partition(' ')[0]  # what ours begin with
        raise UserError(f'{label}: {error}', f'{label}.{key}' if key in options else label) from error
    except Exception as error:  # of whoever wrote it
        raise UserError(f'{label} cannot be built: {told(error)}', label) from error


def _without(options: dict[str, Any], label: str, missing: dict[str, str]) -> dict[str, Any]:
    """Options, and those inside of them, but for what is missing."""
    kept = {key: value for key, value in options.items() if f'{label}.{key}' not in missing}
    return {k: _without(v, f'{label}.{k}', missing) if isinstance(v, dict) else v for k, v in kept.items()}


def _build_dataset(phase: str, options: dict[str, Any], opt: dict[str, Any]) -> Dataset:
    label = f'datasets.{phase}'
    try:
        dataset = lookup(DATASET_REGISTRY, options['type'], f'{label}.type')(deepcopy(options))
    except (UserError, KeyError, OSError, AssertionError, ValueError) as error:
        said = f'the key {error} is missing.' if isinstance(error, KeyError) else error
        raise UserError(f'{label}: {said}', label) from error
    if phase == 'train':
        batch = options['batch_size_per_gpu'] * distributed.devices(opt)
        samples = len(dataset) * options.get('dataset_enlarge_ratio', 1)
        if batch > samples:
            raise UserError(
                f'{label}: a batch of {batch} is more than the {samples} samples of an epoch; raise repeat.',
                label,
            )
    return dataset


def _check_weights(path: dict[str, Any], network: nn.Module) -> None:
    """Raise UserError unless the weights to start from fit, or may be others."""
    file = path.get('pretrain_network_g')
    if not file or path.get('strict_load_g') is False:
        return
    weights = weights_of(read_checkpoint(file), file)
    if not holds_layers_alone(weights):
        check_fit(network.state_dict(), weights, f'path.pretrain_network_g: {file} does not fit network_g')


def _check_model(opt: dict[str, Any]) -> None:
    """Raise UserError if the model's source reads an option of ``network_g``, maybe late, that is not there."""
    model = lookup(MODEL_REGISTRY, opt['model_type'], 'model_type')
    for key in sorted(needed_of_network(model)):
        if key not in opt['network_g']:
            raise UserError(f'network_g.{key} is missing: model_type {opt["model_type"]} reads it.', f'network_g.{key}')


def _check_training(opt: dict[str, Any]) -> None:
    for name, value in (('train', opt.get('train')), ('datasets.train', opt['datasets'].get('train'))):
        if not value:
            raise UserError(f'{name} is missing.', name)
    train, batch = opt['train'], opt['datasets']['train']['batch_size_per_gpu']
    parts = train.get('accumulate', 1)
    if parts > batch:
        raise UserError(
            f'train.accumulate: a batch of {batch} on each device cannot be computed in {parts} parts.',
            'train.accumulate',
        )
    if not any(key.endswith('_opt') and value for key, value in train.items()):
        raise UserError('train has no loss: pixel_opt is missing.', 'train')
    _check_schedule(train)


def _check_schedule(train: dict[str, Any]) -> None:
    scheduler, lr, total = train['scheduler'], train['optim_g']['lr'], train['total_iter']
    if train.get('warmup_iter', -1) >= total:
        raise UserError(
            f'train.warmup_iter must be below total_iter, {total}; got {train["warmup_iter"]}.', 'train.warmup_iter'
        )
    steps = 'periods' if 'periods' in scheduler else 'restarts'
    count, weights = len(scheduler.get(steps, [0])), scheduler.get('restart_weights', [1])
    if len(weights) != count:
        raise UserError(
            f'train.scheduler.restart_weights must have as many numbers as {steps}, {count}; got {weights}.',
            'train.scheduler.restart_weights',
        )
    if sum(scheduler.get('periods', [train['total_iter']])) < train['total_iter']:
        raise UserError(
            f'train.scheduler.periods {scheduler["periods"]} end before total_iter, {train["total_iter"]}.',
            'train.scheduler.periods',
        )
    if scheduler.get('eta_min', 0) > lr:
        raise UserError(
            f'train.scheduler.eta_min must be at most optim_g.lr, {lr}; got {scheduler["eta_min"]}.',
            'train.scheduler.eta_min',
        )
