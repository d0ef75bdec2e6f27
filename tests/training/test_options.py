"""Option files: all of ours build, and mistakes in them get the sentence one would want."""

import copy
import math

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR

from cea_arch.cli import main
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.distributed import spread_batch
from cea_arch.errors import UserError
from cea_arch.metrics.protocols import PROTOCOLS
from cea_arch.training.options import check_options, read_options
from tests.conftest import ROOT

FILES = sorted((ROOT / 'options').rglob('*.yml'))


@pytest.fixture(scope='module')
def lmdb(tmp_path_factory, photographs):
    root = tmp_path_factory.mktemp('data') / 'photographs.lmdb'
    write_lmdb(((name.partition('.')[0], data) for name, data in photographs.items()), root)
    return root


def prepared(path, lmdb, is_train):
    """The options of a file, its data replaced by a small LMDB and its weights by a file that exists."""
    opt = read_options(str(path))
    opt |= {'num_gpu': 0, 'is_train': is_train, 'auto_resume': False, 'dist': False, 'rank': 0, 'world_size': 1}
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        if dataset['phase'] == 'train':
            dataset['gt_size'] = min(dataset['gt_size'], 256)  # these photographs are smaller than those of BSDS500
        for source in dataset['sources'].values():
            source |= {key: str(lmdb) for key in source if key.startswith('dataroot')}
            source.pop('only', None)  # there is no pale picture
    if opt['network_g'].get('pretrained_base'):
        opt['network_g']['pretrained_base'] = str(lmdb.parent / 'base.pth')
        torch.save(build_network(opt['network_g']['base']).state_dict(), lmdb.parent / 'base.pth')
    if opt['path'].get('pretrain_network_g'):
        opt['path']['pretrain_network_g'] = str(lmdb.parent / 'weights.pth')
        torch.save(build_network(opt['network_g']).state_dict(), lmdb.parent / 'weights.pth')
    return opt


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_every_option_file_builds(path, lmdb):
    opt = prepared(path, lmdb, is_train=path.parent.name != 'test')
    assert opt['name'] == path.stem
    check_options(opt)
    assert path.read_text().splitlines()[1].startswith('# ')
    assert f'-opt {path.relative_to(ROOT).as_posix()}' in path.read_text().partition('general settings')[0]


IMAGES = {'bsd400_wed': 5144, 'raintrainl': 200, 'ots': 72135, 'gopro': 2103, 'gopro_crops': 16824, 'lol': 485}
SCHEDULES = {  # samples an epoch, epochs
    'cea_aio3': (142431, 120),
    'cea_aio5': (162646, 120),
    'cea_aio5_moce_ir': (236251, 120),
    'cea_aio5_dfpir': (226621, 120),
    'cea_cdd11': (26026, 200),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_benchmarks_keep_the_papers_recipe(name):
    """Samples an epoch, batch, losses, augmentation and the learning rate of every phase."""
    samples, epochs = SCHEDULES[name]
    opt = read_options(str(ROOT / 'options' / f'{name}.yml'))
    sources = opt['datasets']['train']['sources'].values()
    if name == 'cea_cdd11':
        assert 1183 * sum(source['repeat'] for source in sources) == samples
        assert len(sources) == 11
    else:
        stems = [source['dataroot_gt'].rpartition('/')[2].partition('.')[0].removesuffix('_gt') for source in sources]
        assert sum(IMAGES[stem] * source['repeat'] for stem, source in zip(stems, sources)) == samples
    train = opt['train']
    assert train['total_iter'] == math.ceil(samples / 64) * epochs
    assert train['total_batch_size'] == 64
    assert train['optim_g'] == {'type': 'Adam', 'lr': 5e-4, 'betas': [0.9, 0.999]}
    assert not {'ema_decay', 'grad_clip'} & train.keys()
    assert train['fft_opt'] == {'type': 'CEAFFTLoss', 'loss_weight': 0.1, 'target': 'amplitude'}
    assert train['pixel_opt']['type'] == 'L1Loss'
    data = opt['datasets']['train']
    assert (data['gt_size'], data['use_rot'], data.get('use_hflip', True)) == (128, False, True)
    steps = [0, train['total_iter'] // 2, train['total_iter']]
    assert [learning_rate(train, step) for step in steps] == pytest.approx([5e-4, 2.5e-4, 0], abs=1e-8)
    assert opt['network_g'] == {'type': 'CEAIR', 'size': 'S' if name == 'cea_cdd11' else 'base'}


def learning_rate(train, iteration):
    """What BasicSR's warm-up and scheduler set at an iteration."""
    if iteration < train['warmup_iter']:
        return train['optim_g']['lr'] / train['warmup_iter'] * iteration
    options = {key: value for key, value in train['scheduler'].items() if key != 'type'}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], train['optim_g']['lr'])
    scheduler = CosineAnnealingRestartLR(optimizer, **options)
    scheduler.last_epoch = iteration - 1
    return scheduler.get_lr()[0]


@pytest.mark.parametrize('name', ['cea_aio3', 'cea_aio5', 'cea_cdd11'])
def test_what_is_tested_is_what_was_trained(name):
    trained, tested = (read_options(str(ROOT / 'options' / f)) for f in (f'{name}.yml', f'test/{name}.yml'))
    assert tested['network_g'] == trained['network_g']
    assert [d for p, d in trained['datasets'].items() if p != 'train'] == list(tested['datasets'].values())
    assert tested['val']['protocol'] == trained['val']['protocol']


@pytest.mark.parametrize(
    ('devices', 'at_once', 'share', 'parts'),
    [(1, 16, 64, 4), (4, 16, 16, 1), (8, 16, 8, 1), (2, 12, 32, 3), (1, 64, 64, 1)],
)
def test_a_total_batch_is_spread_over_the_devices(devices, at_once, share, parts):
    opt = {'dist': devices > 1, 'world_size': devices, 'num_gpu': 1, 'train': {'total_batch_size': 64}}
    opt['datasets'] = {'train': {'batch_size_per_gpu': at_once}}
    for _ in range(2):  # again changes nothing
        opt = spread_batch(opt)
        assert (opt['datasets']['train']['batch_size_per_gpu'], opt['train']['accumulate']) == (share, parts)


def test_a_total_batch_that_cannot_be_spread_is_named():
    opt = {'dist': True, 'world_size': 3, 'train': {'total_batch_size': 64}}
    opt['datasets'] = {'train': {'batch_size_per_gpu': 16}}
    with pytest.raises(UserError, match=r'train\.total_batch_size: 64 cannot be spread over 3 devices'):
        spread_batch(opt)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_protocol_sets_metrics_and_crop(protocol):
    settings = [f'val.protocol={protocol}', 'val.metrics={gauss: {type: calculate_cea_ssim_gaussian}}']
    opt = read_options(str(ROOT / 'options/cea_aio3.yml'), [*settings, 'datasets.val_2.crop_base=8'])
    assert list(opt['val']['metrics']) == ['psnr', 'ssim', 'gauss']
    crop = PROTOCOLS[protocol].crop_base
    assert [d['crop_base'] for p, d in opt['datasets'].items() if p != 'train'] == [crop, 8, crop, crop, crop]
    assert 'crop_base' not in opt['datasets']['train']


@pytest.fixture
def demo(lmdb):
    opt = prepared(ROOT / 'options/cea_demo.yml', lmdb, is_train=True)
    opt['val'] = {'val_freq': 100, 'save_img': False, 'metrics': {'psnr': {'type': 'calculate_cea_psnr'}}}
    for dataset in opt['datasets'].values():
        del dataset['phase']
    return {
        key: opt[key]
        for key in ('name', 'model_type', 'num_gpu', 'datasets', 'network_g', 'path', 'train', 'val', 'logger')
    }


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run ``cea train`` on options; returns exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(opt, *flags, command='train'):
        text = opt if isinstance(opt, str) else yaml.safe_dump(opt)
        (tmp_path / 'o.yml').write_text(text)
        capsys.readouterr()
        code = main([command, '-opt', 'o.yml', *flags])
        said = capsys.readouterr()
        assert said.out == ''
        return code, said.err.strip()

    return call


MISTAKES = [
    ('network_g.type', 'CEAIRR', "network_g.type: 'CEAIRR' is not known. Did you mean 'CEAIR'?"),
    ('network_g.ranks', 4, "network_g: unknown key 'ranks'. Did you mean 'rank'?"),
    ('network_g.size', 'XL', "network_g: size must be one of base, S, T, got 'XL'."),
    ('datasets.train.type', 'CEADataSet', "'CEADataSet' is not known. Did you mean 'CEADataset'?"),
    ('datasets.train.gt_sise', 64, "datasets.train: unknown key 'gt_sise'. Did you mean 'gt_size'?"),
    ('datasets.train.gt_size', 4096, 'gt_size is 4096, but'),
    ('datasets.train.sources.denoise.sigma', 25, "sources.denoise: unknown key 'sigma'. Did you mean 'sigmas'?"),
    ('datasets.train.sources.denoise.dataroot_gt', 'nowhere.lmdb', "folder 'nowhere.lmdb' does not exist"),
    ('datasets.train.batch_size_per_gpu', '8', "batch_size_per_gpu must be a whole number of at least 1, got '8'"),
    ('datasets.train.batch_size_per_gpu', 10**6, 'a batch of 1000000 is more than the'),
    ('datasets.vall', {'name': 'x'}, "datasets: unknown key 'vall': a data set is called train, val, val_1"),
    ('train.warmup_iters', 5, "train: unknown key 'warmup_iters'. Did you mean 'warmup_iter'?"),
    ('train.optim_g.lr', 'fast', "train.optim_g.lr must be a number above 0, got 'fast'"),
    (
        'train.optim_g.type',
        'Adamm',
        "train.optim_g.type must be one of Adam, AdamW, NAdam, RAdam, SGD, RMSprop, got 'Adamm'. Did you",
    ),
    ('train.optim_g.beta', 1, "train.optim_g: unknown key 'beta'. Did you mean 'betas'?"),
    ('train.pixel_opt.type', 'L1los', "CEAFFTLoss, got 'L1los'. Did you mean 'L1Loss'?"),
    ('train.fft_opt', {'type': 'FFT'}, "CEAFFTLoss, got 'FFT'. Did you mean 'CEAFFTLoss'?"),
    ('train.scheduler.type', 'Cosine', "CosineAnnealingRestartLR, got 'Cosine'. Did you mean 'Cosine"),
    ('train.scheduler.periods', [5], 'train.scheduler.periods [5] end before total_iter'),
    ('train.total_iter', None, 'train.total_iter is missing'),
    ('train.amp', 'fp8', "train.amp must be one of off, bf16, fp16, got 'fp8'"),
    ('train.grad_clip', 0, 'train.grad_clip must be a number above 0, got 0'),
    ('train.max_skipped', 0, 'train.max_skipped must be a whole number of at least 1, got 0'),
    ('logger.keep_last', 'all', "logger.keep_last must be a whole number of at least 1, got 'all'"),
    ('train.accumulate', 9, 'train.accumulate: a batch of 4 on each device cannot be computed in 9 parts'),
    ('train.accumulate', 0, 'train.accumulate must be a whole number of at least 1, got 0'),
    (
        'val.protocol',
        'aoi',
        "val.protocol must be one of aio, moce-ir, onerestore, basicsr, got 'aoi'. Did you mean 'aio'?",
    ),
    ('val.protocol', 'basicsr', 'val.metrics.psnr: protocol basicsr defines this metric; give yours another name'),
    ('val.metrics.psnr.type', 'psnr', "metrics.psnr.type: 'psnr' is not known. Did you mean 'calculate_psnr'"),
    ('logger.print_frequency', 1, "logger: unknown key 'print_frequency'. Did you mean 'print_freq'?"),
    ('path.pretrain_network_g', 'x.pth', "path.pretrain_network_g: file 'x.pth' does not exist"),
    ('num_gpu', 64, 'num_gpu is 64, but 0 are here; num_gpu: 0 runs on the CPU'),
    ('model_type', 'CEAModell', "model_type: 'CEAModell' is not known. Did you mean 'CEAModel'?"),
    ('modell', 1, "options: unknown key 'modell'."),
    ('network_g', None, 'network_g is missing'),
]


A_NAME = 'becomes a file or folder: no slash, not empty, not . or ..'
# of BasicSR's options, values that it takes and fails on later
MISTAKES += [
    ('name', '../outside', f"name: '../outside' {A_NAME}"),
    ('name', 'a/b', A_NAME),
    ('name', '..', A_NAME),
    ('name', 'x' * 240, 'becomes part of names of files: at most 150 bytes, got 240'),
    ('datasets.val_1.name', 'a/b', f"datasets.val_1.name: 'a/b' {A_NAME}"),
    ('val.suffix', 'a/b', f"val.suffix: 'a/b' {A_NAME}"),
    ('manual_seed', 2**32, 'manual_seed must be a whole number of at least 0 and up to 4294901759, got 4294967296'),
    ('device', 'nonsense', 'device cannot be used: RuntimeError: Expected one of cpu, cuda'),
    ('datasets.train.persistent_workers', True, 'persistent_workers: there are no workers, num_worker_per_gpu is 0'),
    ('datasets.val_1.persistent_workers', True, 'there are no workers, validation and tests have none'),
    ('datasets.train.prefetch_mode', 'cuda', 'datasets.train.prefetch_mode: cuda needs a GPU, and there is none'),
    ('train.pixel_opt.reduction', 'none', 'train.pixel_opt cannot be used: RuntimeError: grad can be implicitly'),
    ('train.perceptual_opt', {'type': 'L1Loss'}, 'train.perceptual_opt cannot be used: TypeError'),
    ('train.optim_g.differentiable', True, 'train.optim_g cannot be used: RuntimeError'),
    ('train.checkpoint_activations', ['x.*'], "train.checkpoint_activations: 'x.*' matches no module"),
    ('val.maps', ['nothing'], "no CEA layer 'nothing'"),
    ('val.metrics.psnr.nothing', 1, "unknown key 'nothing'"),
    ('logger.wandb', {'project': 'x'}, 'logger.wandb: no one is logged in'),
    ('path.resume_state', 'x.state', "path.resume_state: file 'x.state' does not exist"),
]


@pytest.mark.parametrize(('key', 'value', 'message'), MISTAKES, ids=[f'{key}={value}' for key, value, _ in MISTAKES])
def test_mistakes_get_one_sentence_and_leave_no_trace(demo, run, tmp_path, key, value, message):
    opt = copy.deepcopy(demo)
    opt['datasets']['train']['num_worker_per_gpu'] = 0
    if key == 'logger.wandb':
        pytest.importorskip('wandb', reason='needs wandb')
    *path, last = key.split('.')
    place = opt
    for part in path:
        place = place[part]
    place[last] = value
    code, said = run(opt)
    assert code == 2
    assert message in said
    assert said.startswith('cea train: ')
    assert len(said.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['o.yml']  # nothing archived, nothing begun


BASE_MISTAKES = [
    ('EDSR', "network_g.base must be a mapping, got 'EDSR'"),
    ({'type': 'EDSRR'}, "network_g.base.type: 'EDSRR' is not known. Did you mean 'EDSR'?"),
    ({'type': 'RRDBNet', 'num_blocks': 2}, "network_g.base: unknown key 'num_blocks'. Did you mean 'num_block'?"),
    ({'type': 'RRDBNet'}, 'network_g.base.num_in_ch is missing'),
    ({'type': 'CEAIR', 'size': 'T'}, 'network_g: targets: auto knows ECBSR, EDSR, '),
]


@pytest.mark.parametrize(('base', 'message'), BASE_MISTAKES, ids=[str(base) for base, _ in BASE_MISTAKES])
def test_mistakes_in_the_base_of_with_cea(demo, run, base, message):
    demo['network_g'] = {'type': 'WithCEA', 'base': base}
    code, said = run(demo)
    assert code == 2
    assert message in said


def test_option_file_that_does_not_exist(capsys):
    assert main(['train', '-opt', str(ROOT / 'options' / 'cea_dem.yml')]) == 2
    said = capsys.readouterr().err
    assert 'does not exist. Did you mean' in said
    assert 'cea_demo.yml' in said


@pytest.mark.parametrize('text', ['1e-3', '1E-3', '1.e-3', '0.1e-2', '!!float 1e-3', '0.001'])
def test_numbers_as_people_write_them(tmp_path, text):
    text = (
        (ROOT / 'options/cea_demo.yml').read_text().replace('lr: 2e-3', f'lr: {text}').replace('cea_demo\n', '1e3x\n')
    )
    (tmp_path / 'o.yml').write_text(text)
    opt = read_options(str(tmp_path / 'o.yml'))
    assert opt['train']['optim_g']['lr'] == 0.001
    assert opt['name'] == '1e3x'


def test_testing_wants_weights(demo, run):
    opt = {key: value for key, value in demo.items() if key not in ('train', 'logger')}
    opt['datasets'] = {'test_1': opt['datasets']['val_1']}
    code, said = run(opt, command='test')
    assert code == 2
    assert 'path.pretrain_network_g is missing: without it, untrained weights would be tested' in said
