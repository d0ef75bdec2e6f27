"""WithCEA in training: whole runs, BasicSR's own models and GANs, averaging, and two processes."""

import cea_arch  # noqa: F401, I001  before basicsr: spawned processes import this file without conftest

import copy
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models import build_model
from tests.layers.test_inject import awaken, build, options_of, write_base
from torch.nn.parallel import DistributedDataParallel

from cea_arch.checkpoints import read_checkpoint
from cea_arch.networks.with_cea import merge
from cea_arch.cli import main
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.layers import cea_parameters, cea_state_dict


@pytest.fixture
def run_options(tmp_path, photograph, monkeypatch):
    """A folder with an LMDB, made the current one; returns options of a run of x2 with a frozen MSRResNet."""
    crops = {f'{i}': photograph[i * 20 : i * 20 + 40, i * 30 : i * 30 + 44, ::-1] for i in range(4)}
    write_lmdb(((key, cv2.imencode('.png', img)[1].tobytes()) for key, img in crops.items()), tmp_path / 'x.lmdb')
    monkeypatch.chdir(tmp_path)
    source = {'x2': {'degradation': 'downscale', 'scale': 3, 'dataroot_gt': 'x.lmdb'}}
    dataset = {'type': 'CEADataset', 'sources': source}
    return {
        'name': 'run',
        'model_type': 'CEAModel',
        'scale': 3,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'train': dataset | {'name': 't', 'gt_size': 24, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 2},
            'val': dataset | {'name': 'v'},
        },
        'network_g': options_of('MSRResNet', pretrained_base=write_base(tmp_path, 'MSRResNet'), freeze_base=True),
        'path': {'strict_load_g': True},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-2},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [100]},
            'total_iter': 4,
            'ema_decay': 0.5,
            'pixel_opt': {'type': 'L1Loss'},
        },
        'val': {'val_freq': 100, 'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 3}}},
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False},
    }


def start(opt, *flags, command='train'):
    Path('o.yml').write_text(yaml.safe_dump(opt))
    return main([command, '-opt', 'o.yml', *flags])


def test_a_frozen_run_saves_resumes_and_is_tested_by_its_layers_alone(run_options, tmp_path):
    assert start(run_options) == 0
    run = tmp_path / 'experiments/run'
    content = read_checkpoint(run / 'models/net_g_4.pth')
    assert set(content) == {'params', 'params_ema', 'network_g'}
    assert content['network_g'] == run_options['network_g']
    assert all('.cea.' in name for name in content['params'] | content['params_ema'])
    (run / 'training_states/4.state').unlink()
    assert start(run_options, '--auto_resume') == 0
    log = '\n'.join(file.read_text() for file in run.glob('train_*.log'))
    assert f'{sum(p.numel() for p in build("MSRResNet").parameters()):,} parameters are frozen' in log
    assert 'Resuming training from epoch: 1, iter: 2' in log
    assert 'Current net - loaded net' not in log
    weights = {'pretrain_network_g': str(run / 'models/net_g_latest.pth'), 'param_key_g': 'params_ema'}
    test = {key: run_options[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'val')}
    test |= {'datasets': {'test': run_options['datasets']['val']}, 'path': weights}
    assert start(test, command='test') == 0
    trained, tested = (tmp_path / folder / 'run/results.csv' for folder in ('experiments', 'results'))
    assert trained.read_text() == tested.read_text()
    merge(run_options['network_g']['pretrained_base'], str(run / 'models/net_g_latest.pth'), 'whole.pth')
    test['network_g'] = run_options['network_g'] | {'pretrained_base': None}
    test['path']['pretrain_network_g'] = 'whole.pth'
    assert start(test, command='test') == 0
    assert trained.read_text() == tested.read_text()


def model_options(run_options, model_type, tmp_path, **train):
    opt = copy.deepcopy(run_options) | {'model_type': model_type, 'is_train': True, 'dist': False, 'rank': 0}
    opt['path'] |= {'models': str(tmp_path), 'training_states': str(tmp_path), 'experiments_root': str(tmp_path)}
    opt['train'] |= train
    return opt


def batch():
    return {'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 48, 48)}


def test_the_models_of_basicsr_train_frozen_layers_and_resume(run_options, tmp_path):
    opt = model_options(run_options, 'SRModel', tmp_path)
    model = build_model(opt)
    base = build('MSRResNet').state_dict()
    for iteration in range(2):
        model.feed_data(batch())
        model.optimize_parameters(iteration)
    model.save(0, 2)
    trained = {id(p) for group in model.optimizer_g.param_groups for p in group['params']}
    assert trained == {id(p) for p in cea_parameters(model.net_g)}
    state = model.net_g.state_dict()
    assert all(torch.equal(state[f'base.{name}'], value) for name, value in base.items())
    opt = model_options(run_options, 'SRModel', tmp_path)
    opt['path']['pretrain_network_g'] = str(tmp_path / 'net_g_2.pth')
    resumed = build_model(opt)
    resumed.resume_training(torch.load(tmp_path / '2.state', weights_only=True))
    assert all(torch.equal(value, state[name]) for name, value in resumed.net_g.state_dict().items())
    alone = {
        key: {name: value for name, value in net.items() if '.cea.' in name}
        for key, net in torch.load(tmp_path / 'net_g_2.pth', weights_only=True).items()
    }
    torch.save(alone, tmp_path / 'net_g_2.pth')
    opt = model_options(run_options, 'SRModel', tmp_path)
    opt['path']['pretrain_network_g'] = str(tmp_path / 'net_g_2.pth')
    small = build_model(opt)
    averaged = model.net_g_ema.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in small.net_g.state_dict().items())
    layers = cea_state_dict(small.net_g_ema)
    assert all(torch.equal(value, averaged[name]) for name, value in layers.items())


def test_gans_of_basicsr_train_generator_and_discriminator_with_layers(run_options, tmp_path):
    gan = {'type': 'GANLoss', 'gan_type': 'vanilla', 'real_label_val': 1.0, 'fake_label_val': 0.0, 'loss_weight': 0.1}
    discriminator = options_of('UNetDiscriminatorSN')
    opt = model_options(run_options, 'SRGANModel', tmp_path, optim_d={'type': 'Adam', 'lr': 1e-2}, gan_opt=gan)
    opt['network_g'] = options_of('RRDBNet', targets='body.*.rdb[12]')
    opt['network_d'] = discriminator
    model = build_model(opt)
    before = [copy.deepcopy(net.state_dict()) for net in (model.net_g, model.net_d)]
    for iteration in range(1, 4):  # in iteration 0 the discriminator trains alone
        model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 32, 32)})
        model.optimize_parameters(iteration)
    model.save(0, 3)
    for net, old in zip((model.net_g, model.net_d), before):
        moved = {name for name, value in net.state_dict().items() if not torch.equal(value, old[name])}
        assert cea_state_dict(net).keys() <= moved
    build_network(opt['network_g']).load_state_dict(read_checkpoint(tmp_path / 'net_g_3.pth')['params_ema'])


def test_averaging_leaves_what_does_not_train_exact(run_options, tmp_path):
    model = build_model(model_options(run_options, 'CEAModel', tmp_path))
    for iteration in range(3):
        model.feed_data(batch())
        model.optimize_parameters(iteration)
    frozen = {name: p for name, p in model.net_g_ema.named_parameters() if '.cea.' not in name}
    current = dict(model.net_g.named_parameters())
    assert all(torch.equal(p, current[name]) for name, p in frozen.items())
    name = next(name for name in current if name.endswith('cea.gamma'))
    assert not torch.equal(model.net_g_ema.get_parameter(name), current[name])
    assert not model.net_g_ema.get_parameter(name).eq(0).all()


def train_on(rank, options, folder):
    """One of two processes: DDP around WithCEA, each rank on its own images."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder}/meeting', rank=rank, world_size=2)
    torch.manual_seed(0)
    net = DistributedDataParallel(build_network(options))
    torch.manual_seed(rank)
    awaken(net, steps=3)
    torch.save(net.module.stored_state(), f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_layers(tmp_path):
    options = options_of('EDSR', pretrained_base=write_base(tmp_path, 'EDSR'), freeze_base=True)
    torch.multiprocessing.spawn(train_on, (options, str(tmp_path)), nprocs=2)
    states = [read_checkpoint(tmp_path / f'{rank}.pth') for rank in range(2)]
    net = build_network(options)
    assert states[0].keys() == cea_state_dict(net).keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    net.load_state_dict(states[0])
    gammas = [value for name, value in states[0].items() if name.endswith('gamma')]
    assert all(gamma.abs().max() > 0 for gamma in gammas)
