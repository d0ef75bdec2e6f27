"""A run's folder: it belongs to one process, and holds the options that made it."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.files import locked
from cea_arch.training.options import read_options
from tests.conftest import ROOT
from tests.processes import CONTEXT
from tests.training.test_resume import weights
from tests.training.test_training import train


def start(folder, opt, *flags):
    (folder / 'p.yml').write_text(json.dumps(opt))
    command = [sys.executable, '-m', 'cea_arch.train', '-opt', 'p.yml', *flags]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_second_run_in_one_folder_ends_at_once(workplace):
    """It names the folder and the first run's process, which goes on; after a kill the folder is free again."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 100000}
    opt['train']['scheduler']['periods'] = [100000]
    opt['datasets']['train']['num_worker_per_gpu'] = 1  # workers outlive a kill by some seconds
    opt['val'] = {'val_freq': 100000, 'save_img': False}
    first = start(folder, opt)
    states = folder / 'experiments/run/training_states'
    deadline = time.monotonic() + 120
    while not list(states.glob('*.state')) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    second = start(folder, opt)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 2
    assert f'{folder}/experiments/run is in use by process {first.pid} on {platform.node()}. Wait for it' in said
    assert first.poll() is None
    assert [path.name for path in (folder / 'experiments').iterdir() if path.is_dir()] == ['run']  # not renamed
    first.kill()
    first.wait(60)
    first.stderr.close()
    last = max(int(path.stem) for path in states.glob('*.state'))
    opt['train']['total_iter'] = last + 1
    assert train(folder, opt, '--auto_resume') == 0
    assert not list((folder / 'experiments').glob('.*'))


def hold(folder, pipe):
    """Lock ``folder`` until told otherwise; says the number of a child that lives on."""
    with locked(folder):
        child = os.fork()
        if child == 0:
            time.sleep(120)
            os._exit(0)
        pipe.send(child)
        pipe.recv()


@pytest.mark.parametrize('number', [0, signal.SIGKILL])
def test_a_lock_ends_with_its_process(tmp_path, number):
    """Also while a child of it is alive, and whether or not it could clean up."""
    pipe, other_end = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(tmp_path / 'run', other_end))
    process.start()
    child = pipe.recv()
    with pytest.raises(UserError, match=f'run is in use by process {process.pid} on '), locked(tmp_path / 'run'):
        pass
    if number:
        os.kill(process.pid, number)
    else:
        pipe.send('end')
    process.join(60)
    assert (tmp_path / '.run.lock').exists() == bool(number)
    with locked(tmp_path / 'run'):
        assert (tmp_path / '.run.lock').read_text() == f'process {os.getpid()} on {platform.node()}'
    assert list(tmp_path.iterdir()) == []
    os.kill(child, signal.SIGKILL)


def test_the_options_of_a_run_train_the_same_again(workplace):
    folder, opt = workplace
    opt['val'] = {'protocol': 'aio', 'save_img': False, 'metrics': {'eight': {'type': 'calculate_cea_psnr'}}}
    del opt['logger'], opt['manual_seed']
    opt['num_gpu'] = 'auto'
    sets = ['train.total_iter=2', 'train.optim_g.lr=1e-5', 'train.amp=off', 'logger.save_checkpoint_freq=1']
    flags = ['--set', *sets, '--force_yml', 'num_gpu=0']
    assert train(folder, opt, *flags) == 0
    kept = folder / 'experiments/run/options.yml'
    text = kept.read_text()
    assert text.startswith('# cea train -opt o.yml --set train.total_iter=2 train.optim_g.lr=1e-5 ')
    resolved = read_options(str(kept))
    assert resolved == read_options('o.yml', sets, ['num_gpu=0'])
    assert resolved['train']['total_iter'] == 2
    assert resolved['train']['optim_g']['lr'] == 1e-5
    assert resolved['logger'] == {'print_freq': 100, 'save_checkpoint_freq': 1, 'use_tb_logger': True}
    assert list(resolved['val']['metrics']) == ['psnr', 'ssim', 'eight']
    assert resolved['datasets']['val_1']['crop_base'] == 16
    assert [path.name for path in kept.parent.glob('*.yml')] == ['options.yml']
    once = weights(folder, 'latest')['params']['output.weight']
    assert main(['train', '-opt', str(kept)]) == 0  # whose folder is renamed meanwhile
    assert weights(folder, 'latest')['params']['output.weight'].equal(once)
    assert read_options(str(kept)) == resolved
    assert main(['train', '-opt', str(kept), '--auto_resume', '--set', 'train.total_iter=3']) == 0
    assert read_options(str(kept), ['train.total_iter=2']) == resolved


def test_the_options_of_a_test_are_kept(workplace):
    folder, opt = workplace
    train(folder, opt, '--set', 'train.total_iter=1', 'val=~')
    test = {key: opt[key] for key in ('name', 'model_type', 'num_gpu', 'network_g')}
    test['datasets'] = {'test_1': opt['datasets']['val_1']}
    test['path'] = {'pretrain_network_g': 'experiments/run/models/net_g_latest.pth'}
    (folder / 't.yml').write_text(yaml.safe_dump(test))
    assert main(['test', '-opt', 't.yml', '--set', 'val.protocol=basicsr']) == 0
    kept = str(folder / 'results/run/options.yml')
    assert read_options(kept) == read_options('t.yml', ['val.protocol=basicsr'])
    assert main(['test', '-opt', kept]) == 0
