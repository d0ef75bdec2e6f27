"""How many threads torch takes on a CPU: as many as help, found by timing the work itself."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SET_BY_USERS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_THREAD_LIMIT')
ROUNDS = 4  # pieces of work for each number of threads, of which the first does not count
WORTH = 1.1  # more threads are taken where fewer need so many times as long: others may want the cores


class ThreadChooser:
    """Lets pieces of work run with different numbers of threads in turn, and then all with the best one.

    What users have set by the variables of ``SET_BY_USERS`` stays.

    Args:
        told: Called once with a sentence, when the choice is made.
        choose: Whether to choose at all; if not, torch's own number stays.

    Attributes:
        chosen: How many threads; ``None`` while pieces are timed.
        seconds: Those of each piece up to now, for one unit of its amount.
    """

    def __init__(self, told: Callable[[str], None] = lambda text: None, choose: bool = True) -> None:
        most = torch.get_num_threads()
        self.told = told
        self.numbers = [most]
        while self.numbers[-1] > 1:
            self.numbers.append(self.numbers[-1] // 2)
        self.seconds: list[float] = []
        self.fixed = not choose or any(name in os.environ for name in SET_BY_USERS)
        self.chosen: int | None = most if self.fixed or most == 1 else None

    @contextmanager
    def piece(self, amount: float = 1) -> Iterator[None]:
        """Let a piece of work run; where it fails it does not count."""
        if self.chosen is not None:
            yield
            return
        torch.set_num_threads(self.numbers[len(self.seconds) % len(self.numbers)])
        began = time.perf_counter()
        yield
        self.seconds.append((time.perf_counter() - began) / amount)
        if len(self.seconds) == ROUNDS * len(self.numbers):
            self._choose()

    def _choose(self) -> None:
        count = len(self.numbers)
        medians = {n: statistics.median(self.seconds[count + i :: count]) for i, n in enumerate(self.numbers)}
        self.take(min(n for n in self.numbers if medians[n] <= WORTH * min(medians.values())))
        words = ', '.join(f'{medians[n] / medians[self.chosen]:.2f} with {n}' for n in self.numbers)
        self.told(f'Threads: {self.chosen}, chosen by time ({words}); OMP_NUM_THREADS sets another number.')

    def take(self, number: int) -> None:
        """Choose ``number``."""
        self.chosen = number
        torch.set_num_threads(number)

    def state_dict(self) -> dict[str, Any]:
        """What going on with the same numbers of threads needs."""
        return {'chosen': self.chosen, 'numbers': self.numbers, 'seconds': self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a choice, or its measurement, if this machine has the threads for it."""
        if self.fixed or not state:
            return
        if state['chosen'] is not None and state['chosen'] <= self.numbers[0]:
            self.take(state['chosen'])
        elif state['numbers'] == self.numbers:
            self.seconds = list(state['seconds'])
