"""Threads: chosen by time, never against what the user has set, and kept in the training state."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from cea_arch.cli import main
from cea_arch.restoring.restorer import Restorer, restore
from cea_arch.threads import ROUNDS, ThreadChooser


class Machine:
    """A clock and a number of threads, instead of the real ones: how long work takes is given by that number."""

    def __init__(self, monkeypatch, most, seconds):
        self.now, self.threads, self.seconds, self.said = 0.0, most, seconds, []
        monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        monkeypatch.setattr('cea_arch.threads.time.perf_counter', lambda: self.now)
        monkeypatch.setattr(torch, 'get_num_threads', lambda: self.threads)
        monkeypatch.setattr(torch, 'set_num_threads', lambda number: setattr(self, 'threads', number))

    def chooser(self, **options):
        return ThreadChooser(self.said.append, **options)

    def work(self, chooser, amount=1.0):
        with chooser.piece(amount):
            used = self.threads
            self.now += amount * self.seconds[used]
        return used


@pytest.mark.parametrize(
    ('seconds', 'chosen'),
    [
        ({4: 1.0, 2: 1.5, 1: 2.5}, 4),
        ({4: 1.0, 2: 1.05, 1: 2.0}, 2),  # hardly slower, and two cores are free
        ({4: 9.6, 2: 3.0, 1: 0.7}, 1),
        ({2: 0.35, 1: 0.35}, 1),
        ({6: 1.0, 3: 0.8, 1: 2.0}, 3),
    ],
)
def test_the_fewest_that_are_about_as_fast_as_any(monkeypatch, seconds, chosen):
    machine = Machine(monkeypatch, max(seconds), seconds)
    chooser = machine.chooser()
    used = [machine.work(chooser, amount) for amount in range(1, 1 + ROUNDS * len(seconds))]
    assert used == ROUNDS * list(seconds)  # in turn
    assert (chooser.chosen, machine.threads) == (chosen, chosen)
    assert [machine.work(chooser) for _ in range(3)] == 3 * [chosen]
    assert len(machine.said) == 1
    assert machine.said[0].startswith(f'Threads: {chosen}, chosen by time (')


def test_what_the_user_has_set_stays(monkeypatch):
    machine = Machine(monkeypatch, 4, {4: 9.0, 2: 1.0, 1: 1.0})
    for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        with monkeypatch.context() as patch:
            patch.setenv(variable, '4')
            chooser = machine.chooser()
            chooser.load_state_dict({'chosen': 2, 'numbers': [4, 2, 1], 'seconds': []})
            assert [machine.work(chooser) for _ in range(20)] == 20 * [4]
    assert [machine.work(machine.chooser(choose=False)) for _ in range(20)] == 20 * [4]


def test_the_choice_and_its_measurement_go_on(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 1.0, 1: 3.0})
    whole, first = machine.chooser(), machine.chooser()
    used = [machine.work(whole) for _ in range(10)]
    machine.threads = 2
    parts = [machine.work(first) for _ in range(3)]
    machine.threads = 2
    second = machine.chooser()
    second.load_state_dict(first.state_dict())
    parts += [machine.work(second) for _ in range(7)]
    assert parts == used
    machine.threads = 2
    third = machine.chooser()
    third.load_state_dict({'chosen': 1, 'numbers': [8, 4, 2, 1], 'seconds': []})
    assert machine.work(third) == 1
    machine.threads = 2
    fourth = machine.chooser()
    fourth.load_state_dict({'chosen': 8, 'numbers': [8, 4, 2, 1], 'seconds': []})  # of a larger machine
    assert fourth.chosen is None


def test_tiles_are_timed_by_their_size(monkeypatch):
    machine = Machine(monkeypatch, 2, {})

    class Net(nn.Module):
        def forward(self, x):
            machine.now += x.numel() * (3 if machine.threads == 2 else 2)
            return x

    restorer = Restorer(Net(), 'cpu', tile='auto')
    restorer.threads = machine.chooser()
    for side in range(64, 72):
        restore(np.zeros((side, side, 3), np.uint8), restorer)
    assert restorer.threads.seconds == 4 * [3, 2]
    assert restorer.threads.chosen == 1


def test_work_that_fails_does_not_count(monkeypatch):
    chooser = Machine(monkeypatch, 2, {}).chooser()
    with pytest.raises(MemoryError), chooser.piece():
        raise MemoryError
    assert chooser.seconds == []


def test_threads_do_not_spin_long_unless_told_to(monkeypatch):
    for variable in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        monkeypatch.delenv(variable, raising=False)
    for variable, value, expected in (
        (None, None, '10000'),
        ('GOMP_SPINCOUNT', '5', '5'),
        ('OMP_WAIT_POLICY', 'active', None),
    ):
        with monkeypatch.context() as patch:
            if variable:
                patch.setenv(variable, value)
            assert main(['info', 'nothing.pth']) == 2
            assert os.environ.pop('GOMP_SPINCOUNT', None) == expected
