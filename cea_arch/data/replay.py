"""Training data that come again exactly: every draw depends on the sample's place in the training alone.

So a run that was interrupted goes on as if it had not been, whatever the number of workers, and no state of any random
generator has to be stored.
"""

import ctypes
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from cea_arch.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
MOST_TRIES = 20  # images in a row that cannot be read, before it is no accident


class ReplayDataset(Dataset):
    """A dataset whose random draws follow from ``seed`` and the place that a sampler gives with an index.

    Args:
        dataset: Any dataset that draws from Python's, NumPy's or torch's global generator.
        seed: Of the run.
        replace: Let the next image that can be read stand in for one that cannot; samples then say so as ``replaced``.
    """

    def __init__(self, dataset: Dataset, seed: int, replace: bool = False) -> None:
        self.dataset = dataset
        self.seed = seed
        self.replace = replace

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, place = item
        problem = None
        for number in range(index, index + (MOST_TRIES if self.replace else 1)):
            seed_all(self.seed, place)
            try:
                sample = self.dataset[number % len(self.dataset)]
            except UserError as error:
                problem = problem or error
            else:
                return sample | {'replaced': str(problem or '')} if self.replace else sample
        raise problem


def start_worker(worker_id: int) -> None:
    """Use one thread; leave signals to the main process, which saves and ends, and its workers with it: they go to all.

    If it is killed, Linux kills the worker as well, which would keep its connections to other processes open.
    """
    if cv2.getNumThreads() != 1:  # a forked worker has its parent's one, and would wait for ever for threads to end
        cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # on other systems
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let what is drawn in the block change nothing of what is drawn after it, but on GPUs."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators by a key of whole numbers."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.manual_seed(int(seeds[2]))
