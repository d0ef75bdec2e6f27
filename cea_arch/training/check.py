"""``cea check``: what an option file would train or test, and two real steps of it; nothing is written."""

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from tempfile import TemporaryDirectory
from typing import Any

import torch
from basicsr.models import build_model

from cea_arch import distributed
from cea_arch.data.benchmarks import stored_in
from cea_arch.errors import UserError, told
from cea_arch.metrics.protocols import PROTOCOLS
from cea_arch.models.cea_model import CEAModel
from cea_arch.networks.with_cea import WithCEA
from cea_arch.training.loaders import let_go, training_loader
from cea_arch.training.options import Parts, check_options, read_options
from cea_arch.training.pipeline import parsed_options

try:
    import resource
except ImportError:  # Windows
    resource = None

_FOLDERS = ('experiments_root', 'models', 'training_states', 'log', 'visualization')


@dataclass
class Steps:
    """What some steps of a training took.

    Attributes:
        seconds: Of a step with its data; the first one, which starts workers and kernels, does not count beside others.
        waited: Of these, seconds that the step waited for data.
        memory: Peak bytes: of the GPU, else of this process; ``None`` where neither is known.
        state: Bytes of the optimizers' state.
    """

    seconds: float
    waited: float
    memory: int | None
    state: int


def run(args: argparse.Namespace) -> int:
    """Print what would be done, what is missing, and what steps take; returns 2 if something is missing."""
    opt = read_options(args.opt, args.set, args.force_yml)
    is_train = 'train' in opt['datasets']
    parsed = parsed_options(args, opt, is_train)
    several = distributed.spread_batch(parsed | {'dist': args.processes > 1, 'world_size': args.processes})
    with opt.placing():
        parts = check_options(several, may_miss=True)
    rows = _training(several, parts, distributed.devices(several)) if is_train else _testing(parsed, parts)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f'{name:<{width}}  {text}')
    if parts.missing:
        print('Missing:')
        for label, name in parts.missing.items():
            print(f'  {label}: {name}')
        print(''.join(f'{line}\n' for line in _preparing(parts.missing.values())), end='')
        return 0 if args.allow_missing else 2
    if is_train and args.steps > 0:
        one = several | {'dist': False, 'train': several['train'] | {'total_batch_size': None}}  # of the processes
        one['num_gpu'] = min(parsed['num_gpu'], 1) if args.processes > 1 else parsed['num_gpu']
        try:
            with let_go():
                steps = take_steps(one, args.steps)
        except UserError:
            raise
        except Exception as error:  # of a network or model of anybody's
            raise UserError(f'these options cannot be trained: {told(error)}') from error
        _say_steps(steps, one)
    return 0


def take_steps(opt: dict[str, Any], count: int) -> Steps:
    """Build the model and the loader of a training and take some steps, on real data and the real device."""
    times, waits = [], []
    with TemporaryDirectory() as aside, _warnings_alone():
        opt = opt | {'path': opt['path'] | dict.fromkeys(_FOLDERS, aside)}
        loader = training_loader(opt)
        model = build_model(opt)
        if isinstance(model, CEAModel):
            model.threads.take(torch.get_num_threads())  # too few steps to choose by
        batches = chain.from_iterable(repeat(loader))
        for iteration in range(1, count + 1):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            if iteration <= opt['train']['total_iter']:  # where the schedule ends
                model.update_learning_rate(iteration, warmup_iter=opt['train'].get('warmup_iter', -1))
            model.feed_data(batch)
            model.optimize_parameters(iteration)
            if model.device.type == 'cuda':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    first = 1 if count > 1 else 0
    tensors = [v for o in model.optimizers for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
    mean, waited = (sum(seconds[first:]) / (count - first) for seconds in (times, waits))
    return Steps(mean, waited, _peak_memory(model.device), sum(t.numel() * t.element_size() for t in tensors))


def _training(opt: dict[str, Any], parts: Parts, devices: int) -> list[tuple[str, str]]:
    train, options, logger = opt['train'], opt['datasets']['train'], opt['logger']
    batch, total = options['batch_size_per_gpu'] * devices, train['total_iter']
    in_parts = f', each computed in {train["accumulate"]} parts' if train.get('accumulate', 1) > 1 else ''
    rows = [('network', _network(opt, parts)), *_data(opt, parts, 'training data', ['train'])]
    rows.append(('batch', f'{batch} ({devices} x {options["batch_size_per_gpu"]}{in_parts})'))
    length = f'{total:,} iterations'
    if 'train' in parts.datasets:
        samples = math.ceil(len(parts.datasets['train']) * options.get('dataset_enlarge_ratio', 1) / devices)
        per_epoch = samples // options['batch_size_per_gpu']
        length += f' = {total / per_epoch:.1f} epochs of {per_epoch:,}'
    rows.append(('length', length))
    rows += [(key, _call(value)) for key, value in train.items() if key.endswith('_opt') and value]
    rows += [('optimizer', _call(train['optim_g'])), ('schedule', _call(train['scheduler']))]
    words = ('warmup_iter', 'ema_decay', 'amp', 'grad_clip', 'compile', 'channels_last', 'checkpoint_activations')
    rows.append(
        ('switches', ', '.join(f'{key} {train[key]}' for key in words if train.get(key) is not None) or 'nothing')
    )
    rows += _data(opt, parts, 'validation', [phase for phase in opt['datasets'] if phase != 'train'])
    rows.append(('scores', f'every {opt["val"]["val_freq"]:,} iterations, {_scores(opt)}'))
    kept = min(total // logger['save_checkpoint_freq'], logger.get('keep_last') or total)
    size = _bytes(_stored_bytes(parts) * (2 if train.get('ema_decay') else 1))
    every = f'every {logger["save_checkpoint_freq"]:,} iterations, {kept} kept, each {size} and its training state'
    rows.append(('checkpoints', f'{opt["path"]["experiments_root"]}: {every}'))
    return rows


def _testing(opt: dict[str, Any], parts: Parts) -> list[tuple[str, str]]:
    weights = opt['path']['pretrain_network_g']
    return [
        ('network', _network(opt, parts)),
        ('weights', f'{weights}, {opt["path"].get("param_key_g", "params")}'),
        *_data(opt, parts, 'test data', list(opt['datasets'])),
        ('scores', _scores(opt)),
        ('results', opt['path']['results_root']),
    ]


def _network(opt: dict[str, Any], parts: Parts) -> str:
    counts = [p.numel() for p in parts.network.parameters()]
    trained = sum(p.numel() for p in parts.network.parameters() if p.requires_grad)
    frozen = f', of which {trained:,} train' if trained < sum(counts) else ''
    return f'{_call(opt["network_g"])}: {sum(counts):,} parameters{frozen}'


def _data(opt: dict[str, Any], parts: Parts, title: str, phases: list[str]) -> Iterator[tuple[str, str]]:
    for phase in phases:
        dataset, name = parts.datasets.get(phase), opt['datasets'][phase].get('name')
        if dataset is None:
            yield title, f'{name}: not all there'
        elif phase == 'train' and hasattr(dataset, 'describe'):
            for line in dataset.describe().splitlines():
                yield title, f'{name}, {line}'
                title = ''
        else:
            yield title, f'{name}: {len(dataset):,} images'
        title = ''
        yield from (('', line) for line in _other_counts(dataset))


def _other_counts(dataset: Any) -> Iterator[str]:
    """LMDBs of a benchmark that hold another number of images than published, in sentences."""
    stores = (store for source in getattr(dataset, 'sources', ()) for store in (source.gt, source.lq) if store)
    for store in stores:
        known = stored_in(str(store.root))
        if known and len(store.sizes) != known[1]:
            yield f'{store.root} holds {len(store.sizes):,} images; as published there are {known[1]:,}'


def _preparing(missing: Iterable[str]) -> list[str]:
    """The commands that make what is missing."""
    known = {found[0] for found in map(stored_in, missing) if found}
    known -= {'AIO-3'} if 'AIO-5' in known else set()  # whose sets it has, too
    scripts = sorted(f'datasets_prep/prepare_{name.lower().replace("-", "")}.py' for name in known)
    return [f'`python {script} --raw DOWNLOADS` makes such LMDBs of what you have downloaded.' for script in scripts]


def _scores(opt: dict[str, Any]) -> str:
    protocol, metrics = opt['val'].get('protocol'), opt['val'].get('metrics') or {}
    named = ', '.join(metrics) or 'none'
    return f'{named}; protocol {protocol}: {PROTOCOLS[protocol].text}' if protocol else named


def _call(options: dict[str, Any]) -> str:
    """A typed section in one line: ``L1Loss(loss_weight 1.0)``."""
    words = ', '.join(
        f'{key} {_call(value) if isinstance(value, dict) and "type" in value else value}'
        for key, value in options.items()
        if key != 'type'
    )
    return f'{options["type"]}({words})' if words else options['type']


def _stored_bytes(parts: Parts) -> int:
    network = parts.network
    state = network.stored_state() if isinstance(network, WithCEA) else network.state_dict()
    return sum(value.numel() * value.element_size() for value in state.values())


def _say_steps(steps: Steps, opt: dict[str, Any]) -> None:
    total = opt['train']['total_iter']
    memory = f'; peak memory {_bytes(steps.memory)}' if steps.memory else ''
    print(
        f'A step takes {steps.seconds:.3g} s, of which {100 * steps.waited / steps.seconds:.0f} % wait for data: '
        f'{total:,} take about {_duration(total * steps.seconds)} without validation{memory}; '
        f'a training state has {_bytes(steps.state)}.'
    )


def _peak_memory(device: torch.device) -> int | None:
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


@contextmanager
def _warnings_alone() -> Iterator[None]:
    """Keep BasicSR's reports of what it builds off the screen."""
    logger = logging.getLogger('basicsr')

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _bytes(count: int) -> str:
    return f'{count / 2**20:,.1f} MiB' if count < 2**30 else f'{count / 2**30:,.1f} GiB'


def _duration(seconds: float) -> str:
    for size, unit in ((86400, 'days'), (3600, 'hours'), (60, 'minutes')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} seconds'
