"""What an option file may hold: the rules of every section, from the registries, signatures and the tables below."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)
from torch import optim

from cea_arch.data.cea_dataset import DATASET_RULES
from cea_arch.errors import PLUGINS
from cea_arch.metrics.protocols import PROTOCOLS
from cea_arch.models.cea_model import CEAModel
from cea_arch.models.training_step import AMP, OPTIMIZERS
from cea_arch.networks.with_cea import WithCEA
from cea_arch.rules import (
    ANY,
    FLAG,
    NULL,
    TEXT,
    Rule,
    arguments,
    changes,
    either,
    is_foreign,
    list_of,
    number,
    one_of,
    section,
    typed,
    whole,
)

MOST_PROCESSES = 2**16  # BasicSR adds the process to the seed, and NumPy takes 32 bits
PHASES = {'train': '^train$', 'evaluation': '^(val|test)(_[A-Za-z0-9_]+)?$'}
_PART = number(minimum=0, exclusiveMaximum=1)
_POSITIVE = number(exclusiveMinimum=0)
_NOT_NEGATIVE = number(minimum=0)
_WORD = either(TEXT, NULL)
_NETWORK, _LOSS, _DATASET = ({'$ref': f'#/$defs/{name}'} for name in ('network', 'loss', 'dataset'))

TOP = {
    'inherits': either(TEXT, list_of(TEXT)),
    'plugins': list_of(TEXT, 0),
    'name': TEXT,
    'model_type': TEXT,
    'scale': whole(),
    'num_gpu': either(whole(0), one_of('auto')),
    'device': TEXT,
    'manual_seed': either(whole(0, 2**32 - 1 - MOST_PROCESSES), NULL),
    'network_g': _NETWORK,
    'study': section({'width': TEXT, 'variants': {'type': 'object', 'additionalProperties': _NETWORK}}),
    'find_unused_parameters': FLAG,
    'dist_params': section({'backend': one_of('nccl', 'gloo'), 'port': either(whole(), NULL), 'timeout': _POSITIVE}),
}
TRAIN = {
    'total_iter': whole(),
    'warmup_iter': whole(-1),  # BasicSR's way to say that there is none
    'ema_decay': _PART,
    'scheduler': {'$ref': '#/$defs/scheduler'},
    'pixel_opt': either(_LOSS, NULL),
    'perceptual_opt': either(_LOSS, NULL),
}
CEA_TRAIN = TRAIN | {
    'optim_g': {'$ref': '#/$defs/optimizer'},
    'fft_opt': either(_LOSS, NULL),
    'amp': one_of(*AMP),
    'total_batch_size': either(whole(), NULL),
    'accumulate': whole(),
    'grad_clip': either(_POSITIVE, NULL),
    'max_skipped': whole(),
    'compile': FLAG,
    'channels_last': FLAG,
    'checkpoint_activations': either(FLAG, list_of(TEXT)),
}
VAL = {
    'val_freq': whole(),
    'save_img': FLAG,
    'suffix': _WORD,
    'pbar': FLAG,
    'metrics': either({'type': 'object', 'additionalProperties': {'$ref': '#/$defs/metric'}}, NULL),
}
CEA_VAL = VAL | {'protocol': either(one_of(*PROTOCOLS), NULL), 'maps': either(FLAG, list_of(TEXT))}
LOGGER = {
    'print_freq': whole(),
    'save_checkpoint_freq': whole(),
    'use_tb_logger': FLAG,
    'wandb': either(section({'project': _WORD, 'resume_id': _WORD}), NULL),
}
CEA_LOGGER = LOGGER | {'keep_last': whole()}
PATH = {
    'pretrain_network_g': _WORD,
    'param_key_g': _WORD,
    'strict_load_g': FLAG,
    'resume_state': _WORD,
    'ignore_resume_networks': either(list_of(TEXT), NULL),
}
LOADER = {
    'name': TEXT,
    'type': TEXT,
    'scale': whole(),
    'gt_size': whole(),
    'use_hflip': FLAG,
    'use_rot': FLAG,
    'batch_size_per_gpu': whole(),
    'num_worker_per_gpu': whole(0),
    'dataset_enlarge_ratio': _POSITIVE,
    'pin_memory': FLAG,
    'persistent_workers': FLAG,
    'prefetch_mode': either(one_of('cpu', 'cuda'), NULL),
    'num_prefetch_queue': whole(),
    'on_bad_image': one_of('stop', 'replace'),
    'benchmark': TEXT,
    'group': TEXT,
}
OPTIMIZER = {'lr': _POSITIVE, 'betas': list_of(_PART, 2, 2), 'weight_decay': _NOT_NEGATIVE, 'eps': _NOT_NEGATIVE}
OPTIMIZER |= {'momentum': _NOT_NEGATIVE}
SCHEDULER = {
    'periods': list_of(whole()),
    'restart_weights': list_of(_NOT_NEGATIVE),
    'eta_min': _NOT_NEGATIVE,
    'milestones': list_of(whole(), 0),
    'gamma': _POSITIVE,
    'restarts': list_of(whole(0)),
}
LOSS = {'loss_weight': _NOT_NEGATIVE, 'reduction': one_of('none', 'mean', 'sum'), 'layer_weights': {'type': 'object'}}
METRIC = {'crop_border': whole(0), 'input_order': one_of('HWC', 'CHW'), 'test_y_channel': FLAG}
UNREAD = {  # what option files of BasicSR and of packages for it say beside what is read
    '': {'suffix', 'save_img', 'crop_border', 'network_d', 'task', 'print_network'},
    'datasets': {'use_shuffle', 'padding', 'interval_list', 'dataroot_flow', 'task'},
    'train': {'net_d_iters', 'net_d_init_iters', 'gan_opt', 'optim_d'},
}
SCHEDULERS = {
    'MultiStepLR': 'MultiStepRestartLR',
    'MultiStepRestartLR': 'MultiStepRestartLR',
    'CosineAnnealingRestartLR': 'CosineAnnealingRestartLR',
}


def editors_schema() -> Rule:
    """JSON schema (draft 2020-12) of option files, whole or inheriting, for what is registered now."""
    schema = options_schema()
    definitions, whole = schema['$defs'], {key: value for key, value in schema.items() if key != '$defs'}
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'option file of cea_arch',
        'properties': {'inherits': TOP['inherits']},
        'if': {'required': ['inherits']},
        'then': changes(whole, 'inherited_'),
        'else': whole,
        '$defs': definitions | {f'inherited_{key}': changes(rule, 'inherited_') for key, rule in definitions.items()},
    }


def options_schema() -> Rule:
    """The rules of a whole option file, for what is registered now."""
    models = {name: _model(model) for name, model in _registered(MODEL_REGISTRY).items()}
    return {
        **typed(models, 'model_type', PLUGINS),
        'required': ['name', 'model_type', 'network_g', 'datasets'],
        '$defs': {
            'network': _of_registry(ARCH_REGISTRY, _network),
            'dataset': _of_registry(DATASET_REGISTRY, _dataset),
            'loss': _of_registry(LOSS_REGISTRY, lambda loss: arguments(loss, LOSS)),
            'metric': _of_registry(METRIC_REGISTRY, _metric),
            'optimizer': typed({name: _optimizer(name) for name in OPTIMIZERS}),
            'basicsr_optimizer': typed({'Adam': _optimizer('Adam')}),
            'scheduler': typed({name: _scheduler(name) for name in SCHEDULERS}),
        },
    }


def homes() -> dict[str, str]:
    """The section of each key that belongs to one alone."""
    sections = {'train': CEA_TRAIN, 'val': CEA_VAL, 'logger': CEA_LOGGER, 'path': PATH, 'a data set': LOADER}
    sections['the top level'] = TOP
    found = {}
    for name, keys in sections.items():
        for key in keys:
            found.setdefault(key, []).append(name)
    return {key: names[0] for key, names in found.items() if len(names) == 1 and key not in ('name', 'type')}


def _registered(registry: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What is registered, BasicSR's own also without the suffix that its registry finds them by."""
    exact = dict(iter(registry))
    return {name.removesuffix('_basicsr'): value for name, value in exact.items()} | exact


def _of_registry(registry: Iterable[tuple[str, Any]], rule: Callable[[Any], Rule]) -> Rule:
    return typed({name: rule(item) for name, item in _registered(registry).items()}, hint=PLUGINS)


def _model(model: type) -> Rule:
    """The rule of a whole file for one model.

    BasicSR's models read mappings by literal keys, so their source says which there are. Other packages' models may
    read anything.
    """
    ours, foreign = issubclass(model, CEAModel), is_foreign(model)
    train = CEA_TRAIN if ours else TRAIN | _guess(_keys_read(model, r"(?:train_opt|opt\['train'\])"), TRAIN)
    if foreign:
        train = train | {'optim_g': section({'lr': _POSITIVE}, ['lr'], closed=False), 'scheduler': {'type': 'object'}}
    val = CEA_VAL if ours else VAL | _guess(_keys_read(model, r"opt\['val'\]"), VAL)
    top = TOP if ours else TOP | _guess(_keys_read(model, r'(?<!\w)opt'), TOP)
    networks = [key.removeprefix('network_') for key in top if key.startswith('network_')]
    path = PATH | {f'pretrain_network_{name}': _WORD for name in networks}
    path |= {f'param_key_{name}': _WORD for name in networks} | {f'strict_load_{name}': FLAG for name in networks}
    trained = _DATASET | {'required': ['name', 'type', 'batch_size_per_gpu', 'num_worker_per_gpu']}
    sections = {
        'train': section(train, ['total_iter', 'optim_g', 'scheduler'], not foreign),
        'val': section(val, closed=not foreign),
        'logger': section(CEA_LOGGER if ours else LOGGER, closed=not foreign),
        'path': section(path, closed=not foreign),
        'datasets': {
            'type': 'object',
            'patternProperties': {PHASES['train']: trained, PHASES['evaluation']: _DATASET},
            'additionalProperties': False,
            'description': 'a data set is called train, val, val_1, test_1, and so on',
        },
    }
    return section(top | sections, closed=not foreign)


@cache
def _keys_read(cls: type, name: str) -> set[str]:
    """The literal keys by which a class of BasicSR, or a parent, reads the mappings that the pattern ``name`` names."""
    parts = [inspect.getsource(part) for part in cls.__mro__ if part.__module__.startswith('basicsr.')]
    patterns = rf"{name}(?:\.get\(|\.pop\(|\[)'(\w+)'", rf"'(\w+)' in (?:self\.)?{name}\b"
    return {key for pattern in patterns for key in re.findall(pattern, '\n'.join(parts))}


def needed_of_network(model: type) -> set[str]:
    """The options of ``network_g`` that the source of a model reads and cannot do without."""
    parts = [inspect.getsource(part) for part in model.__mro__ if issubclass(part, BaseModel)]
    return set(re.findall(r"opt\['network_g'\]\['(\w+)'\]", '\n'.join(parts)))


def _guess(keys: set[str], known: dict[str, Rule]) -> dict[str, Rule]:
    """Rules of keys by BasicSR's way to name them."""
    runtime = {'is_train', 'dist', 'rank', 'world_size', 'phase', 'train', 'val', 'path', 'datasets', 'logger'}
    rules = {}
    for key in sorted(keys - runtime - known.keys()):
        optimizer = {'$ref': '#/$defs/basicsr_optimizer'} if key.startswith('optim_') else ANY
        network = _NETWORK if key.startswith('network_') else optimizer
        rules[key] = either(_LOSS, NULL) if key.endswith('_opt') else network
    return rules


def _network(network: type) -> Rule:
    return arguments(network, {'base': _NETWORK} if network is WithCEA else {})


def _dataset(dataset: type) -> Rule:
    if dataset.__module__.startswith('cea_arch.'):
        return section(LOADER | DATASET_RULES)
    keys = dict.fromkeys(_keys_read(dataset, r'(?<!\w)opt') - {'phase'}, ANY)
    return section(keys | LOADER, ['name'], not is_foreign(dataset))


def _metric(metric: Any) -> Rule:
    rule = arguments(metric, METRIC, ('img', 'img2'))
    rule['properties']['better'] = one_of('higher', 'lower')
    return rule


def _optimizer(name: str) -> Rule:
    rule = arguments(getattr(optim, name), OPTIMIZER, ('params',))
    return rule | {'required': ['lr']}


def _scheduler(name: str) -> Rule:
    schedulers = importlib.import_module('basicsr.models.lr_scheduler')
    return arguments(getattr(schedulers, SCHEDULERS[name]), SCHEDULER, ('optimizer', 'last_epoch'))
