"""Two processes over gloo train what one trains, share the validation, and say when one of them is gone."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from cea_arch import distributed
from cea_arch.errors import UserError
from tests.conftest import ROOT
from tests.processes import finish, launch, said
from tests.training.test_resume import assert_same, weights
from tests.training.test_training import log_of


def start(folder, opt, *flags, ranks=2, command='train'):
    (folder / 'o.yml').write_text(json.dumps(opt))
    return launch(folder, command, '-opt', 'o.yml', *flags, ranks=ranks)


def run(folder, opt, *flags, **options):
    """Exit codes."""
    return finish(start(folder, opt, *flags, **options))


def wait_for(path, text, processes):
    deadline = time.monotonic() + 120
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.1)


@pytest.fixture
def long_run(workplace):
    folder, opt = workplace
    opt['train'] |= {'total_iter': 100_000, 'ema_decay': 0.5}
    opt['train']['scheduler']['periods'] = [100_000]
    opt['datasets']['train'] |= {'batch_size_per_gpu': 2, 'num_worker_per_gpu': 1}
    opt['val'] = {'val_freq': 100_000, 'save_img': False}
    opt['logger']['save_checkpoint_freq'] = 3
    return folder, opt


def test_two_processes_train_what_one_trains(workplace):
    """Same data, same total batch: parameters and validation after ten steps."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 10, 'grad_clip': 1.0}
    opt['train']['scheduler']['periods'] = [10]
    opt['val'] |= {'val_freq': 10, 'save_img': True}
    for name, ranks in (('one', 1), ('two', 2)):
        opt['datasets']['train']['batch_size_per_gpu'] = 4 // ranks
        assert run(folder, opt | {'name': name}, ranks=ranks) == [0] * ranks
    assert 'Effective batch: 4 (2 x 2)' in log_of(folder, 'two')
    assert said(folder, 1) == ''
    one, two = (weights(folder, 10, name)['params'] for name in ('one', 'two'))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    assert any(not torch.equal(value, weights(folder, 2, 'one')['params'][name]) for name, value in one.items())
    one, two = (json.loads((folder / f'experiments/{name}/results.json').read_text()) for name in ('one', 'two'))
    for name, results in one['sets'].items():
        rows = two['sets'][name]['rows']
        assert [row['image'] for row in rows] == [str(i) for i in range(8)]
        for row, other in zip(results['rows'], rows, strict=True):
            assert other == pytest.approx(row, abs=1e-3)
    pictures = [{p.name for p in (folder / f'experiments/{n}').rglob('*.png')} for n in ('one', 'two')]
    assert pictures[0] == pictures[1]


def test_the_shared_test_equals_that_of_one_process(workplace):
    """Seven images, two processes: the same numbers, in the same order."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 2}
    assert run(folder, opt, ranks=1) == [0]
    opt['path'] = {'pretrain_network_g': 'experiments/run/models/net_g_2.pth'}
    opt['datasets'] = {'test': opt['datasets']['val_1'] | {'crop_base': 8}}
    for name, ranks in (('one', 1), ('two', 2)):
        assert run(folder, opt | {'name': name}, ranks=ranks, command='test') == [0] * ranks
    one, two = ((folder / f'results/{name}/results.csv').read_text() for name in ('one', 'two'))
    assert one == two
    assert len(one.splitlines()) == 9


def test_two_processes_stop_together_and_go_on_exactly(long_run):
    """SIGTERM to one of them: both stop after the same iteration, which the first one saves; then bit for bit."""
    folder, opt = long_run
    processes = start(folder, opt)
    wait_for(folder / 'rank_0.txt', 'iter:       4', processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, 60) == [130, 130]
    last = int(re.search(r'Stopped by another process after iteration (\d+); saved', said(folder, 0))[1])
    assert said(folder, 1) == ''
    opt['train']['total_iter'] = last + 3
    opt['logger']['save_checkpoint_freq'] = last + 3
    assert run(folder, opt, '--auto_resume') == [0, 0]
    assert f'iter: {last}.' in log_of(folder)
    assert run(folder, opt | {'name': 'whole'}) == [0, 0]
    assert_same(weights(folder, last + 3, 'whole'), weights(folder, last + 3))


def test_one_of_two_processes_is_killed(long_run):
    folder, opt = long_run
    processes = start(folder, opt)
    wait_for(folder / 'rank_0.txt', 'iter:       4', processes)
    processes[1].kill()
    killed = time.monotonic()
    assert finish(processes[:1], 60) == [2]
    assert time.monotonic() - killed < 60
    assert 'cea train: process 0 of 2 has lost another one, whose own output may say why.' in said(folder, 0)
    assert 'Traceback' not in said(folder, 0)
    states = [int(path.stem) for path in (folder / 'experiments/run/training_states').glob('*.state')]
    opt['train']['total_iter'] = max(states) + 1
    assert run(folder, opt, '--auto_resume') == [0, 0]
    assert f'iter: {max(states)}.' in log_of(folder)


def test_a_mistake_is_said_once(workplace):
    folder, opt = workplace
    opt['train']['acumulate'] = 2
    assert run(folder, opt) == [2, 2]
    assert said(folder, 0).count("unknown key 'acumulate'. Did you mean 'accumulate'?") == 1
    assert said(folder, 1) == ''


def test_torchrun(workplace):
    folder, opt = workplace
    opt['train']['total_iter'] = 2
    opt['datasets']['train']['batch_size_per_gpu'] = 2
    (folder / 'o.yml').write_text(json.dumps(opt))
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '-m',
        'cea_arch.train',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [*command, '-opt', 'o.yml', '--launcher', 'pytorch'],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'Effective batch: 4 (2 x 2)' in done.stderr


def test_launchers_that_were_not_used(monkeypatch):
    for name in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r'--launcher pytorch: RANK is not set\. Start the processes with torchrun'):
        distributed.start('pytorch', cuda=False)
    with pytest.raises(UserError, match=r'--launcher slurm: SLURM_PROCID is not set\. Start the processes with srun'):
        distributed.start('slurm', cuda=False)


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (('RANK', '3'), ('WORLD_SIZE', '4'), ('LOCAL_RANK', '3')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='process 3 of this machine has no GPU: 2 are here'):
        distributed.start('pytorch', cuda=True)


def test_slurm_names_the_processes(monkeypatch, tmp_path):
    """srun's variables become torch's; the first node of the list is the one to meet at."""
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setattr(os, 'environ', {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_NODELIST': 'n[7-8]'})
    os.environ.update({'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_LOCALID': '1'})
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, timeout: None)
    distributed.start('slurm', cuda=False, port=29400)
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    assert [os.environ[name] for name in names] == ['3', '4', '1', 'n7', '29400']
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)  # as with --gpus-per-task=1
    distributed.start('slurm', cuda=False)
    assert os.environ['LOCAL_RANK'] == '0'
