"""Option files: read safely, filled with defaults, and checked before anything is built or written."""

import os
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY
from torch import nn
from torch.utils.data import Dataset

from cea_arch import distributed
from cea_arch.errors import UserError, lookup, suggest
from cea_arch.files import written_beside
from cea_arch.metrics.protocols import find_protocol
from cea_arch.networks.with_cea import WithCEA
from cea_arch.rules import Checker, section
from cea_arch.training.option_rules import homes, options_schema

DEFAULTS = {
    'num_gpu': 'auto',
    'manual_seed': 0,
    'path': {},
    'logger': {'print_freq': 100, 'save_checkpoint_freq': 5000, 'use_tb_logger': True},
    'val': {'val_freq': 5000, 'save_img': False},
}
_EXPONENT = re.compile(r'^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$')
_HINTS = {  # to what PyYAML says
    "expected ':'": 'a colon wants a space after it',
    'mapping values are not allowed': 'the colon of the line before may want a space after it',
    'expected <block end>': 'its indentation fits none of the lines above',
    'could not determine a constructor': 'plain YAML alone is read',
}
_FLOAT = 'tag:yaml.org,2002:float'


class OptionLoader(yaml.SafeLoader):
    """Safe YAML (no Python tags), no key twice; ``1e-3`` is the number that everybody means, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f'the key {key.value!r} stands in line {lines[key.value]} already'
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A float; of whole numbers with an exponent, such as ``5e3`` iterations, an int."""
        value = super().construct_yaml_float(node)
        return int(value) if 'e' in node.value.lower() and value.is_integer() else value


class OptionDumper(yaml.SafeDumper):
    """Writes what :class:`OptionLoader` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


OptionLoader.add_constructor(_FLOAT, OptionLoader.construct_yaml_float)
for _class in (OptionLoader, OptionDumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list('-+.0123456789'))


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


def read_options(path: str, settings: list[str] | None = None, force_yml: list[str] | None = None) -> dict[str, Any]:
    """Read an option file, change it, fill in what it may leave out, and check every key and value by the rules.

    Args:
        path: The option file.
        settings: Changes such as ``train.optim_g.lr=1e-4``; the value is YAML.
        force_yml: The same in BasicSR's way, ``train:optim_g:lr=1e-4``.

    Returns:
        The options with ``DEFAULTS``, and the metrics and crops that ``val.protocol`` stands for.

    Raises:
        UserError: Names the first line, key or setting at fault, what was expected and what was found.
    """
    opt = _load(path)
    if not isinstance(opt, dict):
        raise UserError(f'{path}: name is missing.' if opt is None else f'{path} must hold a mapping, got {opt!r}.')
    _fill(opt)
    for separator, entries in (('.', settings), (':', force_yml)):
        for entry in entries or ():
            _apply(opt, entry, separator)
    _fill(opt)
    if isinstance(opt.get('train'), dict) and opt['train'].get('amp') is False:
        opt['train']['amp'] = 'off'  # which YAML takes for false
    schema = options_schema()
    Checker(schema['$defs'], homes()).check(opt, schema, '')
    _apply_protocol(opt)
    return opt


def write_options(opt: dict[str, Any], path: str | os.PathLike, header: str) -> None:
    """Write options so that :func:`read_options` gives the same again, below ``header`` as a comment."""
    comment = ''.join(f'# {line}\n' for line in header.splitlines())
    text = yaml.dump(opt, Dumper=OptionDumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    with written_beside(path) as aside:
        aside.write_text(comment + text, 'utf-8')


def read_network(path: str, base: bool = False) -> nn.Module:
    """Build the network of an option file or, on request, of :class:`WithCEA` its base alone.

    Raises:
        UserError: As :func:`check_options`.
    """
    opt, definitions = _load(path), options_schema()['$defs']
    Checker(definitions).check(opt, section({'network_g': definitions['network']}, ['network_g'], closed=False), '')
    options = opt['network_g']
    if base and 'base' in options:
        return _build_network(options['base'], 'network_g.base')
    return _build_network(options, 'network_g')


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
            raise UserError(f'num_gpu is {opt["num_gpu"]}, but {gpus} are here; num_gpu: 0 runs on the CPU.')
        missing['num_gpu'] = f'{opt["num_gpu"]}, of which {gpus} are here'
    if missing and not may_miss:
        label, name = next(iter(missing.items()))
        kind = 'folder' if label.startswith('datasets.') else 'file'
        raise UserError(f'{label}: {kind} {name!r} does not exist (looked for {Path(name).absolute()}).')
    if not opt['path'].get('pretrain_network_g') and not opt['is_train']:
        raise UserError('path.pretrain_network_g is missing: without it, untrained weights would be tested.')
    if opt['is_train']:
        _check_training(opt)
    networks = {key: _build_network(opt[key], key, missing) for key in opt if key.startswith('network_')}
    parts = Parts(networks['network_g'], missing=missing)
    for phase, options in opt['datasets'].items():
        if not any(label.startswith(f'datasets.{phase}.') for label in missing):
            parts.datasets[phase] = _build_dataset(phase, options, opt)
    return parts


def _load(path: str) -> Any:
    file = Path(path)
    if not file.is_file():
        options = [str(p) for p in file.parent.glob('*.yml')] if file.parent.is_dir() else []
        raise UserError(f'option file {path!r} does not exist.{suggest(path, options)}')
    data = file.read_bytes()
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b'\n') + 1
        raise UserError(
            f'{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8.'
        ) from error
    try:
        return yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError as error:
        raise UserError(f'{path}{_problem(error, text)}') from error


def _problem(error: yaml.YAMLError, text: str) -> str:
    """One sentence for what PyYAML says in several lines."""
    mark = getattr(error, 'problem_mark', None)
    if mark is None:
        return f': {" ".join(str(error).split())}.'
    problem = error.problem
    if "expected ':'" in problem and error.context_mark:
        mark = error.context_mark
    if text[mark.index : mark.index + 1] == '\t':
        problem = 'there is a tab; YAML is indented by spaces alone'
    problem = next((f'{problem}; {hint}' for said, hint in _HINTS.items() if said in problem), problem)
    line = text.splitlines()[mark.line].strip() if mark.line < len(text.splitlines()) else 'the end of the file'
    return f', line {mark.line + 1} ({line}): {problem}.'


def _fill(opt: dict[str, Any]) -> None:
    for key, default in DEFAULTS.items():
        if opt.get(key) is None:
            opt[key] = deepcopy(default)
        elif isinstance(default, dict) and isinstance(opt[key], dict):
            opt[key] = {**default, **opt[key]}


def _apply(opt: dict[str, Any], entry: str, separator: str) -> None:
    """Apply a setting; whether its last key is known is for the rules to say."""
    path, equals, text = entry.partition('=')
    keys = [key.strip() for key in path.split(separator)]
    if not equals or not all(keys):
        raise UserError(f'setting {entry!r} must read like train{separator}total_iter=100.')
    try:
        value = yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError as error:
        raise UserError(f'setting {entry!r}{_problem(error, text)}') from error
    place: Any = opt
    for depth, key in enumerate(keys):
        where = separator.join(keys[:depth]) or 'the option file'
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise UserError(f'setting {entry!r}: {where} has {len(place)} items, counted from 0; got {key!r}.')
            key = int(key)
        if depth == len(keys) - 1:
            place[key] = value
        elif isinstance(place, dict) and not isinstance(place.get(key), (dict, list)):
            hint = suggest(key, place) if key not in place else ''
            raise UserError(f'setting {entry!r}: {where} has no section {key!r}.{hint}')
        else:
            place = place[key]


def complete(opt: dict[str, Any]) -> dict[str, Any]:
    """What BasicSR's parser made of an option file, with what our options stand for: protocol, batch of all devices."""
    opt = deepcopy(opt)
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
            raise UserError(f'val.metrics.{metric}: protocol {name} defines this metric; give yours another name.')
    opt['val']['metrics'] = deepcopy(protocol.metrics) | given
    for phase, dataset in opt['datasets'].items():
        if phase != 'train' and dataset.get('type') == 'AllInOneDataset':
            dataset.setdefault('crop_base', protocol.crop_base)


def _missing(opt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Options that name a file or folder that does not exist."""

    def walk(value: Any, label: str) -> Iterator[tuple[str, str]]:
        for key, item in value.items():
            if isinstance(item, dict):
                yield from walk(item, f'{label}.{key}')
            elif key.startswith(('dataroot', 'pretrain')) and item and not Path(item).expanduser().exists():
                yield f'{label}.{key}', item

    for name in ('datasets', 'path', *(key for key in opt if key.startswith('network_'))):
        yield from walk(opt[name], name)


def _build_network(options: dict[str, Any], label: str, missing: dict[str, str] | None = None) -> nn.Module:
    options = {key: value for key, value in deepcopy(options).items() if f'{label}.{key}' not in (missing or {})}
    network = lookup(ARCH_REGISTRY, options.pop('type', None), f'{label}.type')
    if network is WithCEA:
        _build_network(options['base'], f'{label}.base')
    try:
        return network(**options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f'{label}: {error}') from error


def _build_dataset(phase: str, options: dict[str, Any], opt: dict[str, Any]) -> Dataset:
    label = f'datasets.{phase}'
    try:
        dataset = lookup(DATASET_REGISTRY, options['type'], f'{label}.type')(deepcopy(options))
    except (UserError, KeyError, OSError, AssertionError, ValueError) as error:
        said = f'the key {error} is missing.' if isinstance(error, KeyError) else error
        raise UserError(f'{label}: {said}') from error
    if phase == 'train':
        batch = options['batch_size_per_gpu'] * distributed.devices(opt)
        samples = len(dataset) * options.get('dataset_enlarge_ratio', 1)
        if batch > samples:
            raise UserError(
                f'{label}: a batch of {batch} is more than the {samples} samples of an epoch; raise repeat.'
            )
    return dataset


def _check_training(opt: dict[str, Any]) -> None:
    for name, value in (('train', opt.get('train')), ('datasets.train', opt['datasets'].get('train'))):
        if not value:
            raise UserError(f'{name} is missing.')
    train, batch = opt['train'], opt['datasets']['train']['batch_size_per_gpu']
    parts = train.get('accumulate', 1)
    if parts > batch:
        raise UserError(f'train.accumulate: a batch of {batch} on each device cannot be computed in {parts} parts.')
    if not any(key.endswith('_opt') and value for key, value in train.items()):
        raise UserError('train has no loss: pixel_opt is missing.')
    _check_schedule(train)


def _check_schedule(train: dict[str, Any]) -> None:
    scheduler, lr, total = train['scheduler'], train['optim_g']['lr'], train['total_iter']
    if train.get('warmup_iter', -1) >= total:
        raise UserError(f'train.warmup_iter must be below total_iter, {total}; got {train["warmup_iter"]}.')
    steps = 'periods' if 'periods' in scheduler else 'restarts'
    count, weights = len(scheduler.get(steps, [0])), scheduler.get('restart_weights', [1])
    if len(weights) != count:
        raise UserError(
            f'train.scheduler.restart_weights must have as many numbers as {steps}, {count}; got {weights}.'
        )
    if sum(scheduler.get('periods', [train['total_iter']])) < train['total_iter']:
        raise UserError(f'train.scheduler.periods {scheduler["periods"]} end before total_iter, {train["total_iter"]}.')
    if scheduler.get('eta_min', 0) > lr:
        raise UserError(f'train.scheduler.eta_min must be at most optim_g.lr, {lr}; got {scheduler["eta_min"]}.')
