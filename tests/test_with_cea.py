"""WithCEA through BasicSR: building, freezing, checkpoints, merging, resuming, EMA, GANs and DDP."""

import cea_arch  # noqa: F401, I001  before basicsr: spawned processes import this file without conftest

import copy
import importlib.util
import pickle
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from test_inject import ARCHS, awaken, build
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cea_arch.archs.with_cea_arch import WithCEA
from cea_arch.checkpoints import merge, read_checkpoint
from cea_arch.cli import main
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.errors import UserError
from cea_arch.layers import cea_parameters, cea_state_dict, inject_cea

NORMED = """
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class Normed(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)) for _ in range(2))
        self.head = nn.Conv2d(dim, 3, 1)

    def forward(self, x):
        y = self.stem(x)
        for block in self.blocks:
            y = y + block(y)
        return x + self.head(y)
"""


@pytest.fixture
def normed(tmp_path):
    """A third-party file's architecture with running statistics; returns its name."""
    (tmp_path / 'normed_arch.py').write_text(NORMED)
    spec = importlib.util.spec_from_file_location('normed_arch', tmp_path / 'normed_arch.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield 'Normed'
    del ARCH_REGISTRY._obj_map['Normed']


@pytest.fixture
def base_file(tmp_path):
    """Writes an architecture's fresh weights: ``base_file('EDSR')`` returns the path."""

    def write(kind, content=lambda state: {'params': state}):
        torch.save(content(build(kind).state_dict()), tmp_path / f'{kind}.pth')
        return str(tmp_path / f'{kind}.pth')

    return write


def options_of(kind, **more):
    return {'type': 'WithCEA', 'base': {'type': kind} | ARCHS[kind], 'rank': 4, 'width': 8} | more


@pytest.mark.parametrize('kind', ARCHS)
def test_a_frozen_base_stays_and_its_checkpoint_is_small(kind, base_file):
    options = options_of(kind, pretrained_base=base_file(kind), freeze_base=True)
    net, other = build_network(options), build_network(options)
    base = build(kind)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(net(x), base.eval()(x))
    awaken(net, steps=2)
    weights = net.base.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())
    stored = net.stored_state()
    assert stored.keys() == cea_state_dict(net).keys()
    assert all(name.startswith('base.') and '.cea.' in name for name in stored)
    expected = net(x)
    assert not torch.equal(expected, other(x))
    other.load_state_dict(stored)
    assert torch.equal(other(x), expected)
    fewer = dict(list(stored.items())[1:])
    with pytest.raises(RuntimeError, match='Missing key'):
        other.load_state_dict(fewer)


def test_third_party_architecture_keeps_its_running_statistics(normed):
    options = {'type': 'WithCEA', 'base': {'type': normed}, 'targets': 'blocks.*.0', 'rank': 2, 'width': 4}
    free, frozen = build_network(options), build_network(options | {'freeze_base': True})
    for net, moves in ((free, True), (frozen, False)):
        before = copy.deepcopy(net.state_dict())
        awaken(net.train(), steps=2)
        moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.endswith('running_mean') for name in moved) is moves
        assert net.training
        assert net.base.training is moves
        assert net.eval().base.training is False
        # the file of a base that came from none holds everything
        assert net.stored_state().keys() == net.state_dict().keys()
    trainable = [p for p in frozen.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in cea_parameters(frozen)}
    assert all(p.requires_grad for p in free.parameters())


def test_with_cea_is_copied_and_pickled(base_file):
    net = build_network(options_of('SwinIR', pretrained_base=base_file('SwinIR'), freeze_base=True))
    awaken(net, steps=1)
    x = torch.rand(1, 3, 16, 16)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x), net(x))
        assert not copied.train().base.training
        copied.load_state_dict(net.stored_state())


@pytest.mark.parametrize(
    'content',
    [
        lambda state: state,
        lambda state: {'params': state},
        lambda state: {'params': {name: 0 * value for name, value in state.items()}, 'params_ema': state},
        lambda state: {'params': {f'module.{name}': value for name, value in state.items()}},
    ],
    ids=['plain', 'params', 'params_ema', 'module.'],
)
def test_base_weights_as_people_store_them(base_file, content):
    net = build_network(options_of('MSRResNet', pretrained_base=base_file('MSRResNet', content)))
    expected = build('MSRResNet').state_dict()
    assert all(torch.equal(net.base.state_dict()[name], value) for name, value in expected.items())


def test_base_weights_that_do_not_fit_are_named(base_file, tmp_path):
    other = base_file('EDSR')
    with pytest.raises(UserError) as caught:
        build_network(options_of('MSRResNet', pretrained_base=other))
    assert str(caught.value) == (
        f'{other} does not fit MSRResNet: of 16 weights, '
        '4 missing (upconv1.weight, upconv1.bias, conv_hr.weight, ...); '
        '4 unexpected (conv_after_body.weight, conv_after_body.bias, upsample.0.weight, ...).'
    )
    wide = {'type': 'MSRResNet'} | ARCHS['MSRResNet'] | {'num_feat': 16}
    with pytest.raises(UserError, match=r'shape \(conv_first\.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\), '):
        WithCEA(wide, pretrained_base=base_file('MSRResNet'))
    with pytest.raises(UserError, match=r"file 'nowhere.pth' does not exist"):
        WithCEA(wide, pretrained_base='nowhere.pth')
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(UserError, match='is not a file of weights'):
        WithCEA(wide, pretrained_base=str(tmp_path / 'text.pth'))
    for content in ([1], {'epoch': 3}, nn.Identity()):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(UserError, match=r'x\.pth (is not a file of weights|holds no weights)'):
            WithCEA(wide, pretrained_base=str(tmp_path / 'x.pth'))


def test_networks_of_other_channels_and_sizes():
    grey = {'type': 'RIDNet', 'in_channels': 1, 'mid_channels': 16, 'out_channels': 1, 'num_block': 2}
    grey |= {'rgb_mean': [0.5], 'rgb_std': [1.0]}
    raw = {'type': 'RRDBNet'} | ARCHS['RRDBNet'] | {'num_in_ch': 4}
    with pytest.raises(ValueError, match='Give an example that it accepts'):
        WithCEA(raw)
    assert WithCEA(raw, example_shape=[4, 8, 8], rank=2)(torch.rand(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"base\.type: 'EDSRR' is not registered"):
        WithCEA({'type': 'EDSRR'})


def test_merging_gives_a_whole_checkpoint(base_file, tmp_path, capsys):
    base = base_file('MSRResNet')
    options = options_of('MSRResNet', pretrained_base=base, freeze_base=True)
    net = build_network(options)
    awaken(net, steps=2)
    stored = {'params': net.stored_state(), 'params_ema': net.stored_state(), 'network_g': options}
    torch.save(stored, tmp_path / 'cea.pth')
    out = tmp_path / 'out.pth'
    assert main(['merge', base, str(tmp_path / 'cea.pth'), str(out)]) == 0
    assert capsys.readouterr().out == f'{out}: {len(net.state_dict())} weights.\n'
    content = read_checkpoint(out)
    whole = build_network(content['network_g'])  # what the file says is enough
    whole.load_state_dict(content['params_ema'])
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(whole(x), net(x))
    assert main(['merge', base, str(tmp_path / 'cea.pth'), str(out)]) == 2
    assert 'exists already' in capsys.readouterr().err


def test_merging_layers_of_a_network_injected_by_hand(base_file, tmp_path):
    net = build('EDSR')
    inject_cea(net, 'body.*', rank=2, width=4)
    torch.save(cea_state_dict(net), tmp_path / 'cea.pth')
    assert merge(base_file('EDSR'), str(tmp_path / 'cea.pth'), str(tmp_path / 'out.pth')) == len(net.state_dict())
    net.load_state_dict(read_checkpoint(tmp_path / 'out.pth')['params'])


def test_what_cannot_be_merged_is_named(base_file, tmp_path):
    net = build_network(options_of('SwinIR', pretrained_base=base_file('SwinIR'), freeze_base=True))
    cea, out = tmp_path / 'cea.pth', tmp_path / 'out.pth'
    torch.save({'params': net.stored_state()}, cea)
    with pytest.raises(
        UserError, match=r"does not fit .*EDSR\.pth, which has no module 'layers\.0\.residual_group\.blocks"
    ):
        merge(base_file('EDSR'), str(cea), str(out))
    with pytest.raises(UserError, match=r'EDSR\.pth holds more than CEA layers: conv_first\.weight'):
        merge(base_file('SwinIR'), base_file('EDSR'), str(out))
    assert not list(tmp_path.glob('out*'))


@pytest.fixture
def run_options(tmp_path, photograph, monkeypatch, base_file):
    """A folder with an LMDB, made the current one; returns options of a run of x2 with a frozen MSRResNet."""
    crops = {f'{i}': photograph[i * 20 : i * 20 + 40, i * 30 : i * 30 + 44, ::-1] for i in range(4)}
    write_lmdb(((key, cv2.imencode('.png', img)[1].tobytes()) for key, img in crops.items()), tmp_path / 'x.lmdb')
    monkeypatch.chdir(tmp_path)
    source = {'x2': {'degradation': 'downscale', 'scale': 3, 'dataroot_gt': 'x.lmdb'}}
    dataset = {'type': 'AllInOneDataset', 'sources': source}
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
        'network_g': options_of('MSRResNet', pretrained_base=base_file('MSRResNet'), freeze_base=True),
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
    assert 'Resuming training from epoch: 0, iter: 2' in log
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


def test_two_processes_train_the_same_layers(base_file, tmp_path):
    options = options_of('EDSR', pretrained_base=base_file('EDSR'), freeze_base=True)
    torch.multiprocessing.spawn(train_on, (options, str(tmp_path)), nprocs=2)
    states = [read_checkpoint(tmp_path / f'{rank}.pth') for rank in range(2)]
    net = build_network(options)
    assert states[0].keys() == cea_state_dict(net).keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    net.load_state_dict(states[0])
    gammas = [value for name, value in states[0].items() if name.endswith('gamma')]
    assert all(gamma.abs().max() > 0 for gamma in gammas)
