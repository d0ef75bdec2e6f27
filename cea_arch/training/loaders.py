"""Loaders of a training that can be cut off at any step and goes on exactly there."""

import importlib
import logging
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import cv2
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import DataLoader, Dataset

from cea_arch.compat import replaced
from cea_arch.data.replay import ReplayDataset, start_worker


class ReplaySampler(EnlargedSampler):
    """BasicSR's sampler, whose first epoch may begin in its middle; yields ``(index, place in the training)``."""

    start_epoch = 0
    passed = 0

    def start_at(self, epoch: int, passed: int) -> None:
        """Begin ``epoch`` after ``passed`` samples of this process."""
        self.start_epoch, self.passed = epoch, passed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        passed = self.passed if self.epoch == self.start_epoch else 0
        for position, index in enumerate(super().__iter__()):
            if position >= passed:
                yield index, self.epoch * self.total_size + position * self.num_replicas + self.rank


@contextmanager
def let_go() -> Iterator[None]:
    """Let an error end the process, too.

    Workers ignore signals: while a frame of the traceback holds their loader, Python waits for them for ever.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def training_loader(opt: dict[str, Any]) -> DataLoader:
    """The loader of a training, as a run has it."""
    module = importlib.import_module('basicsr.train')
    alone = opt | {'datasets': {'train': opt['datasets']['train']}}
    with replaced([(module, 'EnlargedSampler', ReplaySampler)]):
        return exact_loaders(module, {})(alone, logging.getLogger('basicsr'))[0]


def exact_loaders(module: ModuleType, resumed: dict[str, dict[str, Any] | None]) -> Callable:
    """Loaders for a training that can be resumed exactly.

    BasicSR counts iterations of an epoch rounded up, but its loader drops the last batch: training ended early.
    """
    create_train_val_dataloader, build_dataset = module.create_train_val_dataloader, module.build_dataset

    def create(opt: dict[str, Any], logger: logging.Logger) -> tuple:
        def build(options: dict[str, Any]) -> Dataset:
            dataset = build_dataset(options)
            replace = options.get('on_bad_image') == 'replace'
            return ReplayDataset(dataset, opt['manual_seed'], replace) if options['phase'] == 'train' else dataset

        train = opt['datasets']['train']
        if train.get('prefetch_mode') == 'cpu':
            # BasicSR's thread that reads ahead waits for ever for someone to take what it has read when a run ends
            logger.info('prefetch_mode: cpu: the loader reads ahead by its workers.')
            train['prefetch_mode'] = None
        with replaced([(module, 'build_dataset', build)]):
            loader, sampler, val_loaders, _, total_iter = create_train_val_dataloader(opt, logger)
        loader.worker_init_fn = start_worker
        cv2.setNumThreads(1)  # also of workers, while the network computes; torch gives them one as well
        if hasattr(loader.dataset.dataset, 'describe'):
            logger.info('Sources of the training set:\n%s', loader.dataset.dataset.describe())
        opt['train']['iters_per_epoch'] = len(loader)
        state = resumed.get('state')
        if state:
            state['epoch'], done = divmod(state['iter'], len(loader))
            sampler.start_at(state['epoch'], done * loader.batch_size)
        return loader, sampler, val_loaders, math.ceil(total_iter / len(loader)), total_iter

    return create
