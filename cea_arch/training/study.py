"""``cea study``: does CEA earn its place, and what does it do? The same training, networks that differ in one thing."""

import argparse
import glob
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.errors import UserError
from cea_arch.files import as_json, from_json, written_beside
from cea_arch.layers.observing import observing, silenced, sites
from cea_arch.metrics.study_tables import mean, same_networks, tables
from cea_arch.networks.from_file import build_network, load_network
from cea_arch.restoring.explain import psnr
from cea_arch.rules import differences
from cea_arch.training.option_files import Options, load_options, write_options
from cea_arch.training.options import check_options, read_options
from cea_arch.training.pipeline import parsed_options
from cea_arch.training.study_variants import DEFAULT, REFERENCE, Variant, find_variants

PICTURES, SIDE = 6, 256  # of each validation set, for what is asked of a trained network; pixels
Scores = dict[str, float]
Pictures = dict[str, list[tuple[Tensor, Tensor]]]  # degraded and clean by set, RGB (1, 3, H, W) in [0, 1]


@dataclass
class Run:
    """One training of a study: of a variant from a seed."""

    variant: Variant
    seed: int
    name: str

    def folder(self, root: str) -> Path:
        return Path(root, 'experiments', self.name)


@dataclass
class Trainings:
    """Trainings in processes of their own, which go on from their last checkpoints, until there is no time left.

    Args:
        root: Folder that holds ``experiments``.
        folder: Of the study: option files, logs and seconds of processor time of each run.
        hours: After so many, what trains is asked to save and to end; ``None``: no limit.
    """

    root: str
    folder: Path
    hours: float | None = None
    running: set[subprocess.Popen] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + (float('inf') if self.hours is None else 3600 * self.hours)

    def train(self, run: Run, opt: Options) -> bool | None:
        """Whether the run came to its end; ``None`` if there is no time left for it."""
        file = self.folder / f'{run.name}.yml'
        if file.is_file() and [*differences(_scored_by(load_options(str(file))), _scored_by(opt))]:
            (run.folder(self.root) / 'results.json').unlink(
                missing_ok=True
            )  # other sets or metrics: to be scored again
        if is_done(run, self.root, opt):
            return True
        write_options(opt, file, f'cea study -opt {opt.file}: {run.variant.name}, seed {run.seed}')
        if self.stopped.is_set() or time.monotonic() > self.end:
            return None
        file.with_suffix('.json').unlink(missing_ok=True)  # what was found out about the run
        if not any(run.folder(self.root).glob('training_states/*.state')):  # it begins anew
            file.with_suffix('.seconds').unlink(missing_ok=True)
        command = [sys.executable, '-m', 'cea_arch.train', '-opt', str(file), '--root', self.root, '--auto_resume']
        print(f'{run.name}: training', file=sys.stderr)
        with file.with_suffix('.log').open('a') as log:
            # of its own session, so that Ctrl-C reaches it once, by us
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self.running.add(process)
            try:
                code, seconds = self._wait(process)
            finally:
                self.running.discard(process)
        self._add_seconds(run, seconds)
        return None if self.stopped.is_set() or time.monotonic() > self.end else code == 0

    def check(self, run: Run, opt: Options) -> None:
        """Raise a UserError if the run was begun with other data, another training or another network."""
        file, folder = self.folder / f'{run.name}.yml', run.folder(self.root)
        if not file.is_file() or not [*folder.glob('training_states/*.state'), *folder.glob('results.json')]:
            return
        found = next(differences(_trained_by(load_options(str(file))), _trained_by(opt)), None)
        if found:
            raise UserError(
                f'{folder} was begun with other options: {found}. Give this study a name of its own, by '
                '--set name=..., or delete that folder.'
            )

    def stop(self, *_: object) -> None:
        """Ask all that train to save and to end."""
        self.stopped.set()
        for process in list(self.running):
            process.terminate()

    def seconds(self, run: Run) -> float | None:
        """Processor time that the run has taken in all its pieces; ``None`` where that is not known."""
        file = self.folder / f'{run.name}.seconds'
        return float(file.read_text()) if file.is_file() else None

    def _wait(self, process: subprocess.Popen) -> tuple[int, float]:
        asked = False
        while process.returncode is None:
            if time.monotonic() > self.end and not asked:
                asked = True
                process.terminate()
            if not hasattr(os, 'wait4'):  # Windows
                try:
                    return process.wait(1), 0.0
                except subprocess.TimeoutExpired:
                    continue
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, usage.ru_utime + usage.ru_stime
            time.sleep(0.2)
        return process.returncode, 0.0

    def _add_seconds(self, run: Run, seconds: float) -> None:
        with written_beside(self.folder / f'{run.name}.seconds') as aside:
            aside.write_text(f'{(self.seconds(run) or 0) + seconds:.1f}')


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then write ``study.md`` and ``study.json``.

    Returns 1 if a training failed, or if some are left for want of time; the same command goes on.
    """
    opt = read_options(args.opt, args.set, args.force_yml)
    with opt.placing():
        _check(opt)
        variants = find_variants(opt, args.variants or list(DEFAULT), args.match)
    folder = Path(args.root, 'experiments', f'{opt["name"]}_study')
    folder.mkdir(parents=True, exist_ok=True)
    runs = [Run(v, seed, f'{opt["name"]}_{v.name}_s{seed}') for seed in args.seeds for v in variants]
    trainings = Trainings(args.root, folder, args.hours)
    for one in runs:
        trainings.check(one, _options(opt, one))
    ours = {(one.variant.name, one.seed) for one in runs}  # these have the networks of now
    others = [one for one in _stored(folder, opt) if (one['variant'], one['seed']) not in ours]
    same_networks(
        {one['variant']: one['network_g'] for one in others},
        {one.name: one.network for one in variants},
        f'in {folder}',
    )
    with _ending(trainings), ThreadPoolExecutor(args.jobs) as pool:
        try:
            ended = list(pool.map(lambda one: trainings.train(one, _options(opt, one)), runs))
        except BaseException:
            trainings.stop()
            raise
    done = [one for one, good in zip(runs, ended, strict=True) if good]
    content = _content(args, opt, done, trainings)
    text = tables(content)
    for file, written in (('study.md', text), ('study.json', as_json(content, indent=1))):
        with written_beside(folder / file) as aside:
            aside.write_text(written, 'utf-8')
    print(text, end='')
    for one, good in zip(runs, ended, strict=True):
        if good is False:
            print(f'{one.name} failed; see {folder / one.name}.log', file=sys.stderr)
    if None in ended:
        print(f'{len(done)} of {len(runs)} trainings are done; the same command goes on.', file=sys.stderr)
    return 0 if len(done) == len(runs) else 1


def is_done(one: Run, root: str, opt: Options) -> bool:
    """Whether a run has come to its last step, and was scored there on every set."""
    folder = one.folder(root)
    results = folder / 'results.json'
    if not (results.is_file() and (folder / 'models/net_g_latest.pth').is_file()):
        return False
    found = from_json(results.read_text('utf-8'))
    sets = {dataset['name'] for phase, dataset in opt['datasets'].items() if phase != 'train'}
    return found['iteration'] == opt['train']['total_iter'] and sets <= found['sets'].keys()


def residuals(net: nn.Module, images: list[Tensor]) -> dict[str, tuple[float, float]]:
    """What CEA does, by site.

    Args:
        net: A network with hyper-adapters.
        images: RGB ``(1, 3, H, W)`` in [0, 1], two or more.

    Returns:
        The mean of |dY| / |XW| over the images, and of the cosine between the rows of A of any two of them, if any.
    """
    with torch.no_grad(), observing(net.eval()) as seen:
        for image in images:
            net(image)
    found = {}
    for name, calls in seen.items():
        bases = [call.bases for call in calls]
        cosines = [F.cosine_similarity(a, b, dim=-1).mean() for n, a in enumerate(bases) for b in bases[:n]]
        found[name] = (mean([call.size for call in calls]), mean([cosine.item() for cosine in cosines]))
    return found


def ablated(net: nn.Module, pictures: Pictures) -> Scores:
    """What silencing CEA changes in a network, in dB by set, and by all of them."""
    changes = {}
    with torch.no_grad():
        for name, pairs in pictures.items():
            with silenced(net.eval()):
                without = [psnr(net(lq), gt) for lq, gt in pairs]
            whole = [psnr(net(lq), gt) for lq, gt in pairs]
            changes[name] = mean([a - b for a, b in zip(without, whole)])
    return changes | {'mean': mean([*changes.values()])}


def _check(opt: Options) -> None:
    if 'psnr' not in (opt['val'].get('metrics') or {}):
        raise UserError('cea study needs psnr among val.metrics, such as by val.protocol: aio.', 'val.metrics')
    if opt['path'].get('pretrain_network_g'):
        raise UserError('cea study trains from nothing: path.pretrain_network_g must be ~.', 'path.pretrain_network_g')


def _trained_by(opt: Options) -> dict[str, Any]:
    """What makes a run another one."""
    data = {key: value for key, value in opt['datasets']['train'].items() if key != 'num_worker_per_gpu'}
    return {'network_g': opt['network_g'], 'datasets': {'train': data}, 'train': opt['train']}


def _scored_by(opt: Options) -> dict[str, Any]:
    return {'datasets': {**opt['datasets'], 'train': None}, 'val': opt['val']}


def _recipe(opt: Options) -> int:
    """Equal where data, training and scoring are, whatever the network is."""
    return zlib.crc32(as_json([_trained_by(opt) | {'network_g': None}, _scored_by(opt)]).encode())


def _stored(folder: Path, opt: Options) -> list[dict[str, Any]]:
    """What was found out about the runs of this recipe, by all calls up to now."""
    files = folder.glob(f'{glob.escape(opt["name"])}_*_s*.json')
    runs = [from_json(file.read_text('utf-8')) for file in files]
    return [one for one in runs if one['recipe'] == _recipe(opt)]


def _options(opt: Options, one: Run) -> Options:
    """The option file of one run."""
    changed = Options(opt.file, opt.said)
    changed.update(opt | {'name': one.name, 'manual_seed': one.seed, 'network_g': one.variant.network})
    if one.variant.longer != 1:
        train = dict(opt['train'])
        train['total_iter'] = round(train['total_iter'] * one.variant.longer)
        scheduler = dict(train['scheduler'])
        for key in ('periods', 'milestones'):
            if key in scheduler:
                scheduler[key] = [round(steps * one.variant.longer) for steps in scheduler[key]]
        changed['train'] = train | {'scheduler': scheduler}
        changed['val'] = opt['val'] | {'val_freq': round(opt['val']['val_freq'] * one.variant.longer)}
    return changed


def _content(args: argparse.Namespace, opt: Options, done: list[Run], trainings: Trainings) -> dict[str, Any]:
    """All figures of a study: of these runs, and of those of earlier calls with the same data and training.

    What was found out about a finished run is kept beside it.
    """
    recipe, pictures = _recipe(opt), None
    for one in done:
        file = trainings.folder / f'{one.name}.json'
        if file.is_file() and from_json(file.read_text('utf-8'))['recipe'] == recipe:
            continue
        pictures = pictures or _pictures(args, opt)
        told = {'variant': one.variant.name, 'seed': one.seed, 'recipe': recipe, 'network_g': one.variant.network}
        told |= {'parameters': one.variant.parameters, 'core_seconds': trainings.seconds(one)}
        told['steps'] = _options(opt, one)['train']['total_iter']
        with written_beside(file) as aside:
            aside.write_text(as_json(told | _found_out(one, args.root, pictures)), 'utf-8')
    order = [one.variant.name for one in done]
    runs = _stored(trainings.folder, opt)
    runs.sort(key=lambda one: (order.index(one['variant']) if one['variant'] in order else len(order), one['seed']))
    variants = {one['variant']: {key: one.pop(key) for key in ('parameters', 'steps', 'network_g')} for one in runs}
    return {'study': opt['name'], 'reference': REFERENCE, 'variants': variants, 'runs': runs}


def _found_out(one: Run, root: str, pictures: Pictures) -> dict[str, Any]:
    """Scores of a trained network and, where it has CEA, what that does."""
    found: dict[str, Any] = {'psnr': _scores(one.folder(root) / 'results.json')}
    net = load_network(one.folder(root) / 'models' / 'net_g_latest.pth')
    if sites(net):
        images = [lq for pairs in pictures.values() for lq, _ in (pairs[:1] if len(pictures) > 1 else pairs)]
        fresh, trained = residuals(build_network(one.variant.network), images), residuals(net, images)
        found['residuals'] = {site: (fresh[site], trained[site]) for site in fresh}
        found['ablated'] = ablated(net, pictures)
    return found


def _pictures(args: argparse.Namespace, opt: Options) -> Pictures:
    """The first pictures of each validation set, cut to ``SIDE``."""
    with opt.placing():
        datasets = check_options(parsed_options(args, opt, is_train=True)).datasets
    found = {}
    for phase, dataset in datasets.items():
        if phase != 'train':
            rows = [dataset[n] for n in range(min(PICTURES, len(dataset)))]
            scale = rows[0]['gt'].shape[-1] // rows[0]['lq'].shape[-1]
            cut, whole = slice(SIDE), slice(SIDE * scale)
            found[opt['datasets'][phase]['name']] = [
                (row['lq'][None, :, cut, cut], row['gt'][None, :, whole, whole]) for row in rows
            ]
    return found


def _scores(results: Path) -> Scores:
    """PSNR by set, and the mean of each group."""
    sets = from_json(results.read_text('utf-8'))['sets']
    scores = {key: result['means']['psnr'] for key, result in sets.items()}
    for group in dict.fromkeys(result['group'] for result in sets.values() if result['group']):
        members = [scores[key] for key, result in sets.items() if result['group'] == group]
        scores[f'**mean of {group}**'] = mean(members)
    return scores


@contextmanager
def _ending(trainings: Trainings) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal have the trainings save and end, and the study say how far it came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    old = {number: signal.signal(number, trainings.stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
