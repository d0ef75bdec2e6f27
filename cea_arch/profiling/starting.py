"""How long commands take before they work, in processor time, beside what they cannot do without."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def starting_times(repeats: int) -> list[dict[str, Any]]:
    """A row for each of some commands, each in a process of its own with one thread, run in turn.

    Raises:
        subprocess.CalledProcessError: A command failed.
    """
    cea = [sys.executable, '-m', 'cea_arch.cli']
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, 'picture.png')
        picture.write_bytes(cv2.imencode('.png', np.full((240, 320, 3), 128, np.uint8))[1].tobytes())
        restore = ['restore', str(picture), '-o', f'{folder}/out', '--overwrite', '--device', 'cpu']
        commands = {
            'python -c "import torch"': [sys.executable, '-c', 'import torch'],
            'cea --help': [*cea, '--help'],
            'cea restore --help': [*cea, 'restore', '--help'],
            'cea restore, a picture of 320 x 240': [*cea, *restore],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                seconds[name].append(_processor_time(command))
    first = seconds['python -c "import torch"']
    return [
        {
            'command': name,
            's': statistics.median(times),
            'to import torch': statistics.median(a / b for a, b in zip(times, first, strict=True)),
        }
        for name, times in seconds.items()
    ]


def _processor_time(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1'}, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
