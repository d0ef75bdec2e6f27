"""What a run shows while it trains, and at its end."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cea_arch.training.curves import read_curves
from tests.conftest import ROOT
from tests.training.test_training import train


def test_what_a_run_shows(workplace):
    """Scalars, pictures, routing in TensorBoard; curves beside the table; a resumed run takes back what was ahead."""
    folder, opt = workplace
    opt['val'] |= {'val_freq': 2, 'save_img': False, 'maps': ['fuse.0.cea']}
    opt['train']['total_iter'] = 6
    assert train(folder, opt) == 0
    events = EventAccumulator(str(folder / 'tb_logger/run'), size_guidance={'images': 0})
    events.Reload()
    tags = events.Tags()
    scalars = {'lr', 'losses/l_pix', 'losses/l_fft', 'grad_norm', 'speed/images_per_s', 'speed/data_wait'}
    assert scalars | {f'metrics/{name}/{m}' for name in ('s25', 's50') for m in ('psnr', 'psnr8')} == set(
        tags['scalars']
    )
    assert {f'{name}/{tag}' for name in ('s25', 's50') for tag in ('comparison', 'fuse.0.cea')} == set(tags['images'])
    assert [event.step for event in events.Images('s25/comparison')] == [2, 4, 6]
    assert all(0 <= event.value <= 1 for event in events.Scalars('speed/data_wait'))
    run = folder / 'experiments/run'
    height, width = cv2.imread(str(run / 'maps/s25/fuse.0.cea.png')).shape[:2]
    assert (height, width) == (3 * (40 + 8), 3 * (45 + 8))  # eight components
    curves = cv2.imread(str(run / 'curves.png'))
    assert curves.shape == (3 * 260, 2 * 480, 3)
    coloured = np.ptp(curves.reshape(3, 260, 2, 480, 3).astype(int), axis=-1).max((1, 3)) > 50
    assert coloured.ravel().tolist() == [True] * 5 + [False]  # lr, two losses, two metrics; no sixth panel
    for path in (run / 'training_states').iterdir():
        if int(path.stem) > 2:
            path.unlink()
    opt['train']['total_iter'] = 4
    assert train(folder, opt, '--auto_resume') == 0
    steps, _ = read_curves(folder / 'tb_logger/run')['losses/l_pix']
    assert steps.tolist() == [1, 2, 3, 4]


def test_maps_of_no_layer(workplace, capsys):
    folder, opt = workplace
    opt['val'] |= {'val_freq': 1, 'maps': ['fuze.0.cea']}
    assert train(folder, opt) == 2
    assert "no CEA layer 'fuze.0.cea'. Did you mean 'fuse.0.cea'?" in capsys.readouterr().err


def test_wandb_offline(workplace):
    """BasicSR's switch: what TensorBoard is told goes to wandb as well."""
    pytest.importorskip('wandb', reason='needs wandb')
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train']['total_iter'] = 2
    opt['logger']['wandb'] = {'project': 'cea'}
    (folder / 'o.yml').write_text(json.dumps(opt))
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'WANDB_MODE': 'offline'}
    command = [sys.executable, '-m', 'cea_arch.train', '-opt', 'o.yml']
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / 'wandb').glob('offline-run-*/*.wandb')
    assert b'losses/l_pix' in file.read_bytes()
    assert b'"type":"CEAIR"' in file.read_bytes()
