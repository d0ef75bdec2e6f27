"""A run that was cut off goes on as if it had not been; what goes wrong is said, and costs nothing that was saved."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

from cea_arch.checkpoints import write_checkpoint
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.errors import UserError
from cea_arch.networks import CEAIR
from tests.conftest import NET, ROOT
from tests.processes import finish, launch, said
from tests.training.test_training import log_of, train


def weights(folder, iteration, run='run'):
    return torch.load(folder / f'experiments/{run}/models/net_g_{iteration}.pth', weights_only=True)


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.mark.parametrize(('workers', 'accumulate'), [(0, 1), (2, 1), (0, 3)])
def test_six_iterations_equal_three_and_three(workplace, workers, accumulate):
    """Bit for bit: weights, their average, optimizer; epochs have two iterations, so the third is within one."""
    folder, opt = workplace
    opt['datasets']['train']['num_worker_per_gpu'] = workers
    opt['train'] |= {'total_iter': 6, 'accumulate': accumulate}
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['logger']['save_checkpoint_freq'] = 3
    assert train(folder, opt | {'name': 'whole'}) == 0
    opt['train']['total_iter'] = 3
    assert train(folder, opt) == 0
    opt['train']['total_iter'] = 6
    assert train(folder, opt, '--auto_resume') == 0
    assert 'Resuming training from epoch: 1, iter: 3' in log_of(folder)
    assert_same(weights(folder, 6, 'whole'), weights(folder, 6))
    assert not torch.equal(weights(folder, 6)['params']['embed.weight'], weights(folder, 3)['params']['embed.weight'])
    states = [
        torch.load(folder / f'experiments/{run}/training_states/6.state', weights_only=True) for run in ('whole', 'run')
    ]
    assert_same(states[0]['optimizers'], states[1]['optimizers'])


def test_threads_are_chosen_in_the_first_steps_and_kept(workplace, monkeypatch, one_thread):
    folder, opt = workplace
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    opt['train']['total_iter'] = 8
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['logger']['save_checkpoint_freq'] = 4
    torch.set_num_threads(2)
    assert train(folder, opt) == 0
    chosen = int(re.search(r'Threads: (\d), chosen by time', log_of(folder))[1])
    assert torch.get_num_threads() == chosen
    half, last = (
        torch.load(folder / f'experiments/run/training_states/{name}.state', weights_only=True)['threads']
        for name in (4, 8)
    )
    assert (half['chosen'], len(half['seconds']), last['chosen']) == (None, 4, chosen)
    torch.set_num_threads(2)
    opt['train']['total_iter'] = 9
    assert train(folder, opt, '--auto_resume') == 0
    assert torch.get_num_threads() == chosen


def test_what_a_run_checks_first_changes_nothing(workplace):
    """The network starts from the seed alone, whatever was tried before it was built."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 1}
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['logger']['save_checkpoint_freq'] = 1
    assert train(folder, opt) == 0
    opt['val'] |= {'maps': True}
    opt['train']['fft_opt']['loss_weight'] = 0
    assert train(folder, opt | {'name': 'other'}) == 0
    torch.manual_seed(0)
    first = CEAIR(**{key: value for key, value in NET.items() if key != 'type'}).embed.weight
    found = [weights(folder, 1, run)['params']['embed.weight'] for run in ('run', 'other')]
    for weight in found:
        assert (weight - first).abs().max() < 2e-3  # one step of AdamW at 1e-3 from the seed's own numbers


def test_the_number_of_workers_changes_nothing(workplace):
    folder, opt = workplace
    opt['train']['total_iter'] = 3
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['logger']['save_checkpoint_freq'] = 3
    for workers in (0, 2):
        opt['datasets']['train']['num_worker_per_gpu'] = workers
        assert train(folder, opt | {'name': f'w{workers}'}) == 0
    assert_same(weights(folder, 3, 'w0'), weights(folder, 3, 'w2'))
    assert train(folder, opt | {'name': 'other', 'manual_seed': 1}) == 0
    assert not torch.equal(
        weights(folder, 3, 'w0')['params']['output.weight'], weights(folder, 3, 'other')['params']['output.weight']
    )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_save_the_current_iteration(workplace, number):
    """Sent to the whole group of processes, loader's workers included, as terminals and job schedulers do."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 1000}
    opt['train']['scheduler']['periods'] = [1000]
    opt['logger'] |= {'save_checkpoint_freq': 1000}
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    (folder / 'o.yml').write_text(json.dumps(opt))
    (process,) = launch(folder, 'train', '-opt', 'o.yml')
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
        logs = list((folder / 'experiments/run').glob('train_*.log'))
        if logs and 'iter:       2' in logs[0].read_text():
            break
    os.killpg(process.pid, number)
    assert finish([process], 60) == [130], said(folder)
    last = int(re.search(rf'Stopped by {number.name} after iteration (\d+); saved', said(folder))[1])
    assert (folder / f'experiments/run/training_states/{last}.state').is_file()
    opt['train']['total_iter'] = last + 1
    assert train(folder, opt, '--auto_resume') == 0
    assert f'iter: {last}.' in log_of(folder)


def start(folder, opt, *flags):
    """Train in a process of its own: what is compared bit for bit must have the same number of threads."""
    (folder / 'o.yml').write_text(json.dumps(opt))
    return launch(folder, 'train', '-opt', 'o.yml', *flags)


def test_kill_in_the_middle_loses_what_came_after_the_last_checkpoint(workplace):
    folder, opt = workplace
    opt['train'] |= {'total_iter': 6}
    opt['train']['scheduler']['periods'] = [1000]
    opt['val'] = {'val_freq': 100, 'save_img': False}
    assert finish(start(folder, opt | {'name': 'whole'})) == [0]
    opt['train']['total_iter'] = 1000
    (process,) = start(folder, opt)
    states = folder / 'experiments/run/training_states'
    deadline = time.monotonic() + 120
    while not list(states.glob('*.state')) and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.05)
    process.kill()
    process.join()
    assert list(states.glob('*.state'))
    for path in states.glob('*.state'):  # if it came further before it was killed
        if int(path.stem) > 4:
            path.unlink()
    opt['train']['total_iter'] = 6
    assert finish(start(folder, opt, '--auto_resume')) == [0]
    assert_same(weights(folder, 6, 'whole'), weights(folder, 6))


def test_steps_without_a_finite_gradient_are_skipped_and_named(workplace, monkeypatch, caplog):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 4, 'max_skipped': 3}
    from cea_arch.models.cea_model import CEAModel

    losses = CEAModel.losses
    calls = []

    def poisoned(self, output, gt):
        calls.append(1)
        return {k: v * (float('nan') if len(calls) == 2 else 1) for k, v in losses(self, output, gt).items()}

    monkeypatch.setattr(CEAModel, 'losses', poisoned)
    assert train(folder, opt) == 0
    assert re.search(
        r'Iteration 2: the gradient is not finite \(.*nan.*step skipped, 1 in a row. Batch: x.lmdb/', log_of(folder)
    )
    assert all(value.isfinite().all() for value in weights(folder, 4)['params'].values())


def test_training_stops_with_a_checkpoint_after_many_skipped_steps(workplace, monkeypatch, capsys):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 50, 'max_skipped': 3}
    opt['logger']['save_checkpoint_freq'] = 100
    from cea_arch.models.cea_model import CEAModel

    losses = CEAModel.losses
    monkeypatch.setattr(
        CEAModel, 'losses', lambda self, output, gt: {k: v * float('inf') for k, v in losses(self, output, gt).items()}
    )
    assert train(folder, opt) == 2
    said = capsys.readouterr().err
    assert 'cea train: 3 steps in a row had a gradient that is not finite. Saved; look at the images' in said
    assert (folder / 'experiments/run/training_states/3.state').is_file()


def test_precision_clipping_and_what_is_kept(workplace):
    folder, opt = workplace
    opt['val'] |= {'val_freq': 2, 'save_img': False}
    opt['train'] |= {'total_iter': 6, 'amp': 'bf16', 'grad_clip': 1e-3}
    opt['logger'] |= {'keep_last': 2}
    assert train(folder, opt) == 0
    run = folder / 'experiments/run'
    assert sorted(path.name for path in (run / 'training_states').iterdir()) == ['4.state', '6.state']
    assert sorted(path.name for path in (run / 'models').glob('*.pth')) == [
        f'net_g_{name}.pth' for name in (4, 6, 'best', 'latest')
    ]
    best = json.loads((run / 'models/best.json').read_text())
    means = re.findall(r'# psnr: (\S+)', log_of(folder))
    assert best['metric'] == 'psnr'
    pairs = [(float(a) + float(b)) / 2 for a, b in zip(means[::2], means[1::2])]
    assert best['mean'] == pytest.approx(max(pairs), abs=1e-3)
    assert best['iteration'] == 2 * (1 + int(np.argmax(pairs)))
    norms = [float(value) for value in re.findall(r'grad_norm: (\S+)', log_of(folder))]
    assert len(norms) == 6
    assert min(norms) > 1e-3  # before clipping


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    path = tmp_path / 'net.pth'
    write_checkpoint({'a': torch.ones(1)}, path)
    small = tmp_path / 'small'
    small.mkdir()
    with pytest.raises(UserError, match=r'nowhere/net\.pth could not be written'):
        write_checkpoint({'a': torch.zeros(1)}, tmp_path / 'nowhere/net.pth')
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', small], capture_output=True).returncode:
        pytest.skip('may not mount a small disk')
    try:
        write_checkpoint({'a': torch.ones(1)}, small / 'net.pth')
        with pytest.raises(UserError, match=r'small/net\.pth could not be written'):
            write_checkpoint({'a': torch.zeros(100_000)}, small / 'net.pth')
        assert torch.load(small / 'net.pth', weights_only=True)['a'] == 1
        assert [file.name for file in small.iterdir()] == ['net.pth']
    finally:
        subprocess.run(['umount', small], check=True)


def test_a_damaged_image_is_named(workplace, capsys):
    folder, opt = workplace
    noise = np.random.default_rng(0).integers(0, 256, (40, 45, 3), np.uint8)
    data = cv2.imencode('.png', noise)[1].tobytes()
    write_lmdb([('good', data), ('bad', data)], folder / 'y.lmdb')
    import lmdb

    with lmdb.open(str(folder / 'y.lmdb')) as environment, environment.begin(write=True) as transaction:
        transaction.put(b'bad', data[: len(data) // 2])
    opt['datasets']['train']['sources']['noise'] = {
        'degradation': 'gaussian_noise',
        'dataroot_gt': 'y.lmdb',
        'repeat': 4,
    }
    assert train(folder, opt) == 2
    assert 'y.lmdb/bad: damaged: image file is truncated' in capsys.readouterr().err
    opt['datasets']['train'] |= {'on_bad_image': 'replace', 'num_worker_per_gpu': 1}
    opt['train']['total_iter'] = 6
    assert train(folder, opt) == 0
    replaced = re.findall(r'y.lmdb/bad: damaged: .* Another image took its place, (\d+) so far', log_of(folder))
    assert [int(number) for number in replaced] == list(range(1, len(replaced) + 1))
    assert replaced


def test_no_image_can_be_read(workplace, capsys):
    folder, opt = workplace
    opt['datasets']['train'] |= {'on_bad_image': 'replace'}
    import lmdb

    with lmdb.open(str(folder / 'x.lmdb')) as environment, environment.begin(write=True) as transaction:
        for number in range(8):
            transaction.put(f'{number}'.encode(), b'x')
    del opt['datasets']['val_1'], opt['datasets']['val_2']
    assert train(folder, opt) == 2
    assert 'not a picture of' in capsys.readouterr().err


KILLED = """
import os, signal, sys
from cea_arch.cli import main

replace = os.replace

def fail(source, target):
    if str(target).endswith('4.state'):
        os.truncate(source, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = fail
sys.exit(main(['train', '-opt', 'o.yml']))
"""


def test_kill_in_the_middle_of_a_save(workplace):
    """The weights of iteration 4 are there, its state is half written beside: the run goes on from iteration 2."""
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    (folder / 'o.yml').write_text(json.dumps(opt))
    run = [sys.executable, '-c', KILLED]
    done = subprocess.run(
        run, cwd=folder, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    states = folder / 'experiments/run/training_states'
    assert sorted(path.suffix for path in states.iterdir()) == ['.state', '.tmp']
    assert (folder / 'experiments/run/models/net_g_4.pth').is_file()
    assert train(folder, opt, '--auto_resume') == 0
    assert 'Resuming training from epoch: 1, iter: 2.' in log_of(folder)
    assert not list(folder.rglob('*.tmp'))


PLANTED = """
import sys
from cea_arch.cli import main
from cea_arch.models.cea_model import CEAModel

def fail(self, current_iter):
    raise RuntimeError('planted')

CEAModel.optimize_parameters = fail
sys.exit(main(['train', '-opt', 'o.yml']))
"""


def test_an_error_that_nobody_foresaw_ends_the_process(workplace):
    """Loader workers, which leave signals to the main process, do not keep it waiting."""
    folder, opt = workplace
    opt['datasets']['train']['num_worker_per_gpu'] = 1
    (folder / 'o.yml').write_text(json.dumps(opt))
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    run = [sys.executable, '-c', PLANTED]
    done = subprocess.run(run, cwd=folder, env=environment, timeout=90, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith('RuntimeError: planted\n')
