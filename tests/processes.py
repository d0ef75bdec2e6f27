"""Commands in processes of their own, forked from one that has imported everything: each would need seconds for it."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    ['cea_arch.training.pipeline', 'basicsr.train', 'basicsr.test', 'torch.utils.tensorboard']
)


def launch(folder, *arguments, ranks=1):
    """Start ``cea <arguments>`` in ``folder``, once for each rank, as a launcher would.

    Each process has one thread, leads a group of its own, and writes what it says to ``rank_0.txt`` and so on.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    arguments = [str(argument) for argument in arguments] + (['--launcher', 'pytorch'] if ranks > 1 else [])
    common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} if ranks > 1 else {}
        processes.append(CONTEXT.Process(target=_run, args=(str(folder), arguments, environment, rank)))
        processes[-1].start()
    return processes


def finish(processes, seconds=180):
    """Exit codes of the processes when they have ended; those that have not after ``seconds`` are killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def said(folder, rank=0):
    """What the process has written so far."""
    return (Path(folder) / f'rank_{rank}.txt').read_text()


def _run(folder, arguments, environment, rank):
    import torch

    from cea_arch.cli import main

    multiprocessing.set_start_method('fork', force=True)  # of the loader's workers, as in a process of its own
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    output = os.open(f'rank_{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    sys.exit(main(arguments))
