"""How many threads torch takes on a CPU: as many as help, found by timing the work itself."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SET_BY_USERS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_THREAD_LIMIT')
ROUNDS = 4  # pieces of work for each number of threads, of which the first does not count
WORTH = 1.1  # more threads are taken where fewer need so many times as long: others may want the cores


class ThreadChooser:
    """Lets pieces of work run with different numbers of threads in turn, and then all with the best one.

    Between ``start()`` and ``stop(amount)`` is a piece. What users have set by the variables of ``SET_BY_USERS`` stays.

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
        self.began = 0.0
        self.fixed = not choose or any(name in os.environ for name in SET_BY_USERS)
        self.chosen: int | None = most if self.fixed or most == 1 else None

    def start(self) -> None:
        """Set the number of threads for the piece of work that begins."""
        if self.chosen is None:
            torch.set_num_threads(self.numbers[len(self.seconds) % len(self.numbers)])
            self.began = time.perf_counter()

    def stop(self, amount: float = 1) -> None:
        """Note the time of the piece that ends, and choose after the last one."""
        if self.chosen is not None:
            return
        self.seconds.append((time.perf_counter() - self.began) / amount)
        if len(self.seconds) == ROUNDS * len(self.numbers):
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

    def watch(self, net: nn.Module) -> None:
        """Let each call of ``net`` be a piece of work, in amount the numbers of its first input."""
        net.register_forward_pre_hook(lambda *_: self.start())
        net.register_forward_hook(lambda _, inputs, output: self.stop(inputs[0].numel()))
