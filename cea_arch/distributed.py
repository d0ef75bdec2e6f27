"""Several processes that train one network: started by torchrun or slurm, over NCCL or, where there is no CUDA, gloo.

BasicSR's own start needs a GPU, chooses it by the rank over all nodes, and has workers spawned, at 9 s an epoch. Every
function here also works in a run of one process, where it does nothing.
"""

import datetime
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cea_arch.errors import UserError

TIMEOUT = 1800  # seconds that a process waits for another one
PORT = 29500  # torch's default


def start(
    launcher: str, cuda: bool, backend: str | None = None, port: int | None = None, timeout: float = TIMEOUT
) -> None:
    """Join the processes that ``launcher`` has started.

    Args:
        launcher: ``pytorch`` (torchrun) or ``slurm`` (srun).
        cuda: Use one GPU each; else the CPU.
        backend: Of ``torch.distributed``; by default NCCL for GPUs, gloo for the CPU.
        port: For slurm, of the first node; by default ``MASTER_PORT``, or 29500.
        timeout: Seconds after which waiting for another process is an error.

    Raises:
        UserError: Not started by this launcher, or fewer GPUs than processes on this machine.
    """
    if launcher == 'slurm':
        _slurm_environment(port)
    if missing := [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') if name not in os.environ]:
        raise UserError(
            f'--launcher {launcher}: {missing[0]} is not set. Start the processes with '
            'torchrun --nproc_per_node=N -m cea_arch.train -opt ... --launcher pytorch.'
        )
    local_rank = int(os.environ['LOCAL_RANK'])
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f'process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are here. Start one '
                'process a GPU, or set num_gpu: 0 for the CPU.'
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend or ('nccl' if cuda else 'gloo'), timeout=datetime.timedelta(seconds=timeout))


def launcher() -> str | None:
    """Which launcher has started this process beside others, ``pytorch`` or ``slurm``; ``None`` if it is alone."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and 'RANK' in os.environ:
        return 'pytorch'
    # of the step that srun has started: a batch script sees SLURM_NTASKS too, and is alone
    return 'slurm' if int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1 else None


def own_device() -> str:
    """The device of this process of several on its machine, for networks that run by themselves."""
    count = torch.cuda.device_count()
    return f'cuda:{int(os.environ["LOCAL_RANK"]) % count}' if count else 'auto'


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the one of rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def devices(opt: dict[str, Any]) -> int:
    """Over how many devices the options of a run, as parsed, spread a batch: processes, or GPUs of one process."""
    return opt['world_size'] if opt['dist'] else max(opt['num_gpu'], 1)


def spread_batch(opt: dict[str, Any]) -> dict[str, Any]:
    """Options of a run, as parsed, with ``train.total_batch_size`` spread over its devices.

    So the same file takes the same steps on any number of them: each loads its share of a batch and computes it in
    parts of ``datasets.train.batch_size_per_gpu``, if that is less.

    Raises:
        UserError: The devices cannot share it alike.
    """
    total = (opt.get('train') or {}).get('total_batch_size')
    loader = opt['datasets'].get('train')
    if not total or not loader:
        return opt
    at_once = math.ceil(loader['batch_size_per_gpu'] / opt['train'].get('accumulate', 1))
    share, rest = divmod(total, devices(opt))
    if rest:
        raise UserError(f'train.total_batch_size: {total} cannot be spread over {devices(opt)} devices.')
    opt = opt | {'train': opt['train'] | {'accumulate': math.ceil(share / at_once)}}
    return opt | {'datasets': opt['datasets'] | {'train': loader | {'batch_size_per_gpu': share}}}


def first_of_machine() -> bool:
    """Whether this is the first process of its machine, as launchers count; known before :func:`start`."""
    return os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', '0')) == '0'


def wait() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """What each process has, by rank, for all of them."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def means(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Mean over the processes, of numbers that all have under the same names; one message for all of them."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values.values()])
    if size() > 1:
        dist.all_reduce(stacked)
        stacked /= size()
    return dict(zip(values, stacked.tolist(), strict=True))


@contextmanager
def together() -> Iterator[None]:
    """Have a UserError of one process end all of them; the first one says what was wrong anywhere."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = list(dict.fromkeys(p for p in gather(problem) if p))
    if problems and rank() == 0:
        raise UserError(' '.join(problems))
    if problems:
        sys.exit(2)


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another process can no longer be reached."""
    return size() > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def _slurm_environment(port: int | None) -> None:
    """Say in torch's variables what slurm says in its own."""
    try:
        rank, world_size = os.environ['SLURM_PROCID'], os.environ['SLURM_NTASKS']
        local_rank, nodes = os.environ['SLURM_LOCALID'], os.environ['SLURM_NODELIST']
    except KeyError as error:
        raise UserError(f'--launcher slurm: {error.args[0]} is not set. Start the processes with srun.') from error
    if 'MASTER_ADDR' not in os.environ:
        command = ['scontrol', 'show', 'hostnames', nodes]
        try:
            names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f'--launcher slurm: the name of the first node is not known: {error}') from error
        os.environ['MASTER_ADDR'] = names[0]
    if port is not None or 'MASTER_PORT' not in os.environ:
        os.environ['MASTER_PORT'] = str(port or PORT)
    if torch.cuda.device_count() == 1:  # --gpus-per-task=1 shows each process its own alone
        local_rank = '0'
    os.environ |= {'RANK': rank, 'WORLD_SIZE': world_size, 'LOCAL_RANK': local_rank}
