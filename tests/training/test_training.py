"""Whole runs through BasicSR's pipelines, small enough for a test, on a real photograph."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import yaml

from cea_arch.cli import main
from cea_arch.files import PACKAGED_WEIGHTS
from cea_arch.layers import ConvBlock
from cea_arch.metrics.report import Report, SetResult, panels
from cea_arch.networks import CEAIR
from tests.conftest import ROOT


def train(folder, opt, *flags, name='o.yml'):
    (folder / name).write_text(yaml.safe_dump(opt))
    return main(['train', '-opt', name, *flags])


def log_of(folder, run='run'):
    return sorted((folder / 'experiments' / run).glob('train_*.log'))[-1].read_text()


def test_a_run_leaves_what_it_should(workplace):
    folder, opt = workplace
    assert train(folder, opt) == 0
    run = folder / 'experiments' / 'run'
    log = log_of(folder)
    assert [int(i) for i in re.findall(r'iter:\s+(\d+), lr', log)] == [1, 2, 3, 4, 5, 6, 7]  # 8 samples in batches of 3
    assert 'l_pix: ' in log
    assert 'l_fft: ' in log
    assert 'noise: gaussian_noise, 8 x 1 = 8 samples (100.0 %)' in log
    assert 'Multiple validation' not in log
    assert len(log.splitlines()[0]) < 150  # no banner
    assert sorted(p.name for p in (run / 'models').iterdir()) == [
        'best.json',
        *(f'net_g_{i}.pth' for i in (2, 4, 6, 'best', 'latest')),
    ]
    assert sorted(p.name for p in (run / 'training_states').iterdir()) == ['2.state', '4.state', '6.state']
    assert list((folder / 'tb_logger/run').glob('events*'))
    assert log.count('# psnr: ') == 4  # two sets at iteration 4 and two at the end, none twice


def test_the_table_says_what_the_images_say(workplace):
    folder, opt = workplace
    train(folder, opt)
    run = folder / 'experiments' / 'run'
    rows = list(csv.DictReader((run / 'results.csv').open()))
    assert list(rows[0]) == ['set', 'image', 'psnr_input', 'psnr', 'psnr8_input', 'psnr8']
    assert [(row['set'], row['image']) for row in rows] == [(s, str(i)) for s in ('s25', 's50') for i in range(8)]
    clean = cv2.cvtColor(cv2.imdecode(np.frombuffer(_stored(folder, '3'), np.uint8), 1), cv2.COLOR_BGR2RGB)
    saved = cv2.imread(str(run / 'visualization/s50/3_7.png'))[..., ::-1]
    psnr8 = 10 * np.log10(255**2 / np.mean((saved.astype(float) - clean) ** 2))
    assert float(rows[11]['psnr8']) == pytest.approx(psnr8, abs=1e-9)
    assert float(rows[11]['psnr']) == pytest.approx(psnr8, abs=0.05)
    mean = np.mean([float(row['psnr']) for row in rows[8:]])
    table = (run / 'results.md').read_text()
    assert f'| {mean:.2f} |' in next(line for line in table.splitlines() if line.startswith('| s50 | 8 |'))
    both = np.mean([float(row['psnr']) for row in rows])
    assert f'| {both:.2f} |' in next(
        line for line in table.splitlines() if line.startswith('| **mean of ours** | 16 |')
    )
    assert '# run, iteration 7' in table
    assert cv2.imread(str(run / 'comparison/s25.png')).shape == (40 + 26, 3 * 45, 3)
    assert cv2.imread(str(run / 'comparison.png')).shape == (2 * (40 + 26), 3 * 45, 3)


def _stored(folder, key):
    from cea_arch.data.image_store import ImageStore

    return ImageStore(folder / 'x.lmdb').read_bytes(key)


def test_ema_weights_are_saved_and_tested(workplace):
    folder, opt = workplace
    train(folder, opt)
    weights = torch.load(folder / 'experiments/run/models/net_g_latest.pth', weights_only=True)
    assert set(weights) == {'params', 'params_ema', 'network_g'}
    assert weights['network_g'] == opt['network_g']
    assert not torch.equal(weights['params']['embed.weight'], weights['params_ema']['embed.weight'])
    trained = list(csv.DictReader((folder / 'experiments/run/results.csv').open()))
    test = {key: opt[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'val')}
    test['datasets'] = {'test_1': opt['datasets']['val_1'], 'test_2': opt['datasets']['val_2']}
    test['path'] = {'pretrain_network_g': 'experiments/run/models/net_g_latest.pth', 'param_key_g': 'params_ema'}
    (folder / 't.yml').write_text(yaml.safe_dump(test))
    assert main(['test', '-opt', 't.yml', '--root', 'there']) == 0
    tested = list(csv.DictReader((folder / 'there/results/run/results.csv').open()))
    assert tested == trained
    assert len(list((folder / 'there/results/run/visualization/s25').iterdir())) == 8


def test_training_goes_on_from_the_weights_of_the_package(workplace):
    folder, opt = workplace
    opt['network_g'] = {'type': 'CEAIR', 'size': 'T'}
    opt['path'] = {'pretrain_network_g': str(PACKAGED_WEIGHTS)}
    opt['train'] |= {'total_iter': 1, 'optim_g': {'type': 'AdamW', 'lr': 1e-6}}
    assert train(folder, opt) == 0
    assert f'starts with the weights of {PACKAGED_WEIGHTS}' in log_of(folder)
    scores = json.loads((folder / 'experiments/run/results.json').read_text())['sets']['s25']['means']
    assert scores['psnr'] > 26


def test_resume_goes_on_from_the_newest_whole_checkpoint(workplace, caplog):
    folder, opt = workplace
    opt['train']['total_iter'] = 4
    train(folder, opt)
    run = folder / 'experiments' / 'run'
    (run / 'training_states/6.state').write_bytes((run / 'training_states/4.state').read_bytes()[:1000])  # a torn write
    opt['train']['total_iter'] = 7
    assert train(folder, opt, '--auto_resume') == 0
    assert 'Cannot resume from' in caplog.text
    assert '6.state' in caplog.text
    log = log_of(folder)
    assert 'Resuming training from epoch: 2, iter: 4' in log  # two iterations an epoch
    assert [int(i) for i in re.findall(r'iter:\s+(\d+), lr', log)] == [5, 6, 7]
    six = torch.load(run / 'training_states/6.state', weights_only=True)
    assert six['optimizers'][0]['state'][0]['step'] == 6
    for state in (run / 'training_states').iterdir():
        state.write_bytes(b'')
    assert train(folder, opt, '--auto_resume') == 2  # rather than starting over
    assert (run / 'models/net_g_6.pth').exists()


@pytest.mark.parametrize('start', [['cea_arch/train.py'], ['-m', 'cea_arch.cli', 'train']])
def test_an_interrupted_run_is_resumed_by_each_form_of_the_command(workplace, start, monkeypatch):
    folder, opt = workplace
    opt['train']['total_iter'] = 100
    opt['logger']['save_checkpoint_freq'] = 1
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    if start[0].endswith('.py'):
        start = [str(ROOT / start[0])]
    command = [sys.executable, *start, '-opt', 'o.yml']
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    states = folder / 'experiments/run/training_states'
    deadline = time.monotonic() + 240
    while not list(states.glob('*.state')) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert 'interrupted. The same command with --auto_resume goes on from the last checkpoint' in said
    last = max(int(p.stem) for p in states.glob('*.state'))
    opt['train']['total_iter'] = last + 2
    assert train(folder, opt, '--auto_resume') == 0
    assert f'iter: {last}.' in log_of(folder)
    assert (states / f'{last + 2}.state').exists()


def test_training_on_unequal_sets_and_without_ground_truth(workplace):
    folder, opt = workplace
    del opt['val']['metrics']
    opt['train'] |= {'total_iter': 1, 'ema_decay': 0}
    assert train(folder, opt) == 0
    table = (folder / 'experiments/run/results.md').read_text()
    assert '| s25 | 8 |' in table


def test_report_of_sets_with_different_scores(tmp_path):
    report = Report(tmp_path, 'title', {'psnr': {'type': 'calculate_cea_psnr'}}, 'aio')
    picture = panels([np.zeros((400, 600, 3), np.uint8)] * 3, ['a', 'b', 'c'])
    assert picture.shape == (320 + 26, 3 * 480, 3)
    one = [{'image': 'i', 'psnr': 20.0, 'ssim': 0.5}, {'image': 'j', 'psnr': 22.0, 'ssim': 0.7}]
    report.add('one', 1, SetResult('x', 'single', one, picture))
    report.add('two', 1, SetResult('x', 'single', [{'image': 'i', 'psnr': 30.0}], picture[:, :90]))
    report.add('three', 1, SetResult('x', 'double', [{'image': 'i', 'psnr': 40.0}]))
    assert report.markdown().splitlines()[2:9] == [
        '| set | images | psnr (aio) | ssim (aio) |',
        '|---|---:|---:|---:|',
        '| one | 2 | 21.00 | 0.6000 |',
        '| two | 1 | 30.00 |  |',
        '| three | 1 | 40.00 |  |',
        '| **mean of single** | 3 | 25.50 |  |',
        '| **mean of double** | 1 | 40.00 |  |',
    ]
    assert '| **mean of x** | 4 | 30.33 |  |' in report.markdown()
    assert 'Protocol aio: float RGB clipped' in report.markdown()
    report.write()
    stored = json.loads((tmp_path / 'results.json').read_text())
    assert stored['protocol'] == 'aio'
    assert stored['sets']['one'] == {
        'benchmark': 'x',
        'group': 'single',
        'rows': one,
        'means': {'psnr': pytest.approx(21), 'ssim': pytest.approx(0.6)},
    }
    report.add('two', 2, SetResult('y', None, [{'image': 'i', 'psnr': 31.0}], picture))
    report.write()
    assert not report.has('one', 1)
    assert report.has('two', 2)
    assert '| one |' not in (tmp_path / 'results.md').read_text()
    assert not list(tmp_path.rglob('*.tmp'))


def test_report_says_which_pictures_were_made_worse():
    report = Report('unused', 'title', {})
    rows = [{'image': name, 'psnr_input': 20.0, 'psnr': psnr} for name, psnr in (('a', 19.5), ('b', 25.0), ('c', 18.0))]
    report.add('noise', None, SetResult('x', rows=rows))
    rows = [{'image': name, 'psnr_input': math.inf, 'psnr': psnr} for name, psnr in (('a', 45.0), ('b', math.inf))]
    report.add('clean', None, SetResult('x', rows=rows))
    report.add(
        'real', None, SetResult('x', rows=[{'image': 'a', 'psnr': 30.0}])
    )  # of another size, as in super-resolution
    lines = report.markdown().splitlines()
    assert '| noise | 2 of 3 | c | 18.00 | -2.00 |' in lines
    assert '| clean | 1 of 2 | a | 45.00 | clean |' in lines
    assert not any(line.startswith('| real | 0') for line in lines)


def test_a_batch_in_parts_makes_the_same_step(workplace):
    folder, opt = workplace
    opt['datasets']['train']['batch_size_per_gpu'] = 8
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 2, 'optim_g': {'type': 'SGD', 'lr': 0.1}}
    weights, losses = [], []
    for accumulate in (1, 3):
        opt['train']['accumulate'] = accumulate
        assert train(folder, opt) == 0
        weights.append(torch.load(folder / 'experiments/run/models/net_g_2.pth', weights_only=True)['params'])
        losses.append(float(re.findall(r'l_pix: (\S+)', log_of(folder))[-1]))
    assert 'Effective batch: 8 (1 x 8, each computed in 3 parts)' in log_of(folder)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])  # in parts indeed


@pytest.mark.parametrize(
    'switch', [{'channels_last': True}, {'checkpoint_activations': True}, {'checkpoint_activations': ['latent.*']}]
)
def test_switches_change_the_cost_and_not_the_result(workplace, switch, monkeypatch):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train']['total_iter'] = 2
    formats, recomputed = [], []
    forward = CEAIR.forward
    monkeypatch.setattr(CEAIR, 'forward', lambda self, x: formats.append(x.stride()[1]) or forward(self, x))
    block = ConvBlock.forward
    monkeypatch.setattr(ConvBlock, 'forward', lambda self, x: recomputed.append(1) or block(self, x))
    weights, calls = [], []
    for changed in ({}, switch):
        formats.clear(), recomputed.clear()
        assert train(folder, opt | {'train': opt['train'] | changed}) == 0
        calls.append((formats[1], len(recomputed)))  # the first is the check's
        weights.append(torch.load(folder / 'experiments/run/models/net_g_2.pth', weights_only=True)['params'])
    blocks = {'True': 8, "['latent.*']": 1}.get(str(switch.get('checkpoint_activations')), 0)  # each step, once more
    assert calls[1] == (1 if 'channels_last' in switch else 16**2, calls[0][1] + 2 * blocks)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


def test_blocks_that_the_network_does_not_have(workplace, capsys):
    folder, opt = workplace
    opt['train']['checkpoint_activations'] = ['latnt.*']
    assert train(folder, opt) == 2
    assert "train.checkpoint_activations: 'latnt.*' matches no module. The nearest names are latent" in (
        capsys.readouterr().err
    )
    opt['network_g'] = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    opt['train']['checkpoint_activations'] = True
    assert train(folder, opt) == 2
    assert 'EDSR does not say what its blocks are. Give a list of patterns, such as [body.*]' in capsys.readouterr().err


def test_a_compiled_network_trains_the_same(workplace, monkeypatch):
    """Traced and run graph by graph; generating code for them takes minutes."""
    folder, opt = workplace
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train']['total_iter'] = 2
    weights = []
    for compile_it in (False, True):
        opt['train']['compile'] = compile_it
        torch._dynamo.utils.counters.clear()
        assert train(folder, opt) == 0
        assert (torch._dynamo.utils.counters['stats']['unique_graphs'] > 0) == compile_it
        weights.append(torch.load(folder / 'experiments/run/models/net_g_2.pth', weights_only=True)['params'])
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


def test_the_log_says_what_makes_runs_comparable(workplace):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False, 'protocol': 'moce-ir'}
    opt['train']['total_iter'] = 1
    assert train(folder, opt) == 0
    log = log_of(folder)
    assert 'Effective batch: 3 (1 x 3)' in log
    assert 'Loss term l_pix: L1Loss, loss_weight 1.0\n' in log
    assert 'Loss term l_fft: CEAFFTLoss, loss_weight 0.01, target amplitude, norm backward\n' in log
    assert 'Scores by protocol moce-ir: float RGB clipped to [0, 1], centre crop to multiples of 16' in log
    assert 'Validation s25 (moce-ir)' in log
    table = (folder / 'experiments/run/results.md').read_text()
    assert 'psnr (moce-ir)' in table
    assert cv2.imread(str(folder / 'experiments/run/comparison/s25.png')).shape == (32 + 26, 3 * 32, 3)  # of 40 x 45


def test_basicsrs_own_pipeline_runs_our_files(workplace):
    """Its batch is the total one, in parts, and its scores are by the protocol."""
    folder, opt = workplace
    opt['train'] |= {'total_iter': 2, 'total_batch_size': 6}
    opt['datasets']['train']['batch_size_per_gpu'] = 2
    opt['val'] = {'val_freq': 2, 'save_img': False, 'protocol': 'aio'}
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    code = "import cea_arch; from basicsr.train import train_pipeline; train_pipeline('.')"
    done = subprocess.run([sys.executable, '-c', code, '-opt', 'o.yml'], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'Effective batch: 6 (1 x 6, each computed in 3 parts)' in done.stderr
    assert 'Scores by protocol aio' in done.stderr
    means = json.loads((folder / 'experiments/run/results.json').read_text())['sets']['s25']['means']
    assert {'psnr', 'ssim'} <= means.keys()


def test_reading_ahead_ends_with_the_training(workplace):
    """BasicSR's own thread for it would wait for ever."""
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['datasets']['train'] |= {'num_worker_per_gpu': 2, 'prefetch_mode': 'cpu', 'persistent_workers': True}
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    command = [sys.executable, '-m', 'cea_arch.train', '-opt', 'o.yml']
    done = subprocess.run(command, cwd=folder, env=os.environ | {'PYTHONPATH': str(ROOT)}, timeout=120, check=False)
    assert done.returncode == 0
    assert 'iter:       7' in log_of(folder)


def test_a_metric_of_one_picture_alone(workplace, capsys):
    folder, opt = workplace
    opt['train']['total_iter'] = 1
    opt['val'] |= {'save_img': False, 'metrics': {'niqe': {'type': 'calculate_niqe', 'crop_border': 0}}}
    assert train(folder, opt) == 2  # its pictures are smaller than NIQE's blocks
    assert 'metric niqe of 45 x 40 pixels: RuntimeError' in capsys.readouterr().err
