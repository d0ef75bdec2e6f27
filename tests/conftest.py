import dataclasses
import os
import re
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')  # none is chosen by time, so that results are those of every run

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cea_arch.compat import has_basicsr  # noqa: E402  before any test imports basicsr

if not has_basicsr():  # Python 3.13 and later: layers, networks, and restoring
    without = ('test_cea', 'test_cea_ir', 'test_comfyui', 'test_compat', 'test_demo', 'test_restore', 'test_restorer')
    without += ('test_docs', 'test_rooms', 'test_start', 'test_video', 'test_whole_image')
    collect_ignore = [str(path) for path in Path(__file__).parent.rglob('test_*.py') if path.stem not in without]

NET = {'type': 'CEAIR', 'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch):
    """What another test has imported stays imported, but is not stored with this one's weights."""
    monkeypatch.setattr('cea_arch.plugins._loaded', {})


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope='module')
def one_thread():
    """For images so small that threads wait longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def photographs():
    """Colour photographs that scikit-image carries: file bytes by name."""
    from importlib import resources

    folder = resources.files('skimage') / 'data'
    return {name: (folder / name).read_bytes() for name in ('astronaut.png', 'chelsea.png', 'coffee.png')}


@pytest.fixture(scope='session')
def photograph(photographs):
    """chelsea, RGB uint8 (300, 451, 3)."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(photographs['chelsea.png'], np.uint8), 1), cv2.COLOR_BGR2RGB)


@pytest.fixture
def image_folder(tmp_path, photograph):
    """Writes crops of a photograph as PNGs: ``image_folder('gt', ['a', 'b'], (48, 64))`` returns the folder."""

    def make(name, keys, size=(48, 64)):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, key in enumerate(keys):
            crop = photograph[number * 8 :, number * 8 :][: size[0], : size[1]]
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f'{key}.png'), crop[..., ::-1])
        return folder

    return make


@pytest.fixture(scope='session')
def shared_data():
    """Real photographs and pairs beside the checkout; tests that need them skip where they are absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip('needs the development pictures in ../shared/data')
    return folder


@pytest.fixture
def plant(tmp_path, photograph):
    """Writes an image file below ``raw``: another crop of a photograph for each ``content`` (by default the path).

    Versions other than 0 are degraded: with streaks where the path speaks of rain, else darker and of less contrast.
    """
    contents = {}

    def write(path, content=None, size=(24, 32), version=0):
        number = contents.setdefault(content or path, len(contents))
        top, left = divmod(number, 40)
        crop = photograph[5 * top :, 10 * left :][: size[0], : size[1], ::-1]
        if version and re.search('(?<!t)rain', path.lower()):
            crop = np.clip(crop.astype(int) + 6 * version * (np.arange(crop.shape[1]) % 2)[:, None], 0, 255)
        elif version:
            crop = crop * (0.9 - 0.02 * version)
        crop = crop.astype(np.uint8)
        file = tmp_path / 'raw' / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(cv2.imencode(file.suffix, crop)[1].tobytes())
        return file

    return write


@pytest.fixture
def small_benchmarks(monkeypatch):
    """Lets a tree of a few images count as complete: ``small_benchmarks('AIO-5', RAW)``."""

    from cea_arch.data.benchmarks import BENCHMARKS

    def shrink(benchmark, tree):
        counts = {key: len(lq or gt) for key, (_, (gt, lq)) in tree.items()}
        sets = [
            dataclasses.replace(one, expected=counts[one.name, one.split], scenes=None)
            for one in BENCHMARKS[benchmark]
            if (one.name, one.split) in counts
        ]
        monkeypatch.setitem(BENCHMARKS, benchmark, sets)

    return shrink


@pytest.fixture
def workplace(tmp_path, photograph, monkeypatch):
    """A folder with an LMDB of eight small pictures, which is the current one; returns it and the options of a run."""
    from cea_arch.data.lmdb_writer import write_lmdb

    crops = {f'{i}': photograph[i * 20 : i * 20 + 40, i * 30 : i * 30 + 45, ::-1] for i in range(8)}
    write_lmdb(((key, cv2.imencode('.png', img)[1].tobytes()) for key, img in crops.items()), tmp_path / 'x.lmdb')
    noise = {'degradation': 'gaussian_noise', 'sigmas': 25, 'dataroot_gt': 'x.lmdb'}
    dataset = {'type': 'CEADataset', 'benchmark': 'ours'}
    val = [
        dataset | {'name': name, 'sources': {'all': noise | {'sigmas': sigma}}}
        for name, sigma in (('s25', 25), ('s50', 50))
    ]
    train = {'name': 'train', 'type': 'CEADataset', 'sources': {'noise': noise}, 'gt_size': 16}
    opt = {
        'name': 'run',
        'model_type': 'CEAModel',
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'train': train | {'num_worker_per_gpu': 0, 'batch_size_per_gpu': 3},
            'val_1': val[0],
            'val_2': val[1],
        },
        'network_g': NET,
        'path': {},
        'train': {
            'optim_g': {'type': 'AdamW', 'lr': 1e-3},
            'scheduler': {'type': 'CosineAnnealingRestartLR', 'periods': [100], 'restart_weights': [1], 'eta_min': 0},
            'total_iter': 7,
            'ema_decay': 0.9,
            'pixel_opt': {'type': 'L1Loss'},
            'fft_opt': {'type': 'CEAFFTLoss', 'loss_weight': 0.01},
        },
        'val': {
            'val_freq': 4,
            'save_img': True,
            'metrics': {
                'psnr': {'type': 'calculate_cea_psnr'},
                'psnr8': {'type': 'calculate_psnr', 'crop_border': 0},
            },
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': True},
    }
    monkeypatch.chdir(tmp_path)
    return tmp_path, opt


@pytest.fixture(scope='session')
def small_net():
    """A small CEAIR that changes a picture visibly."""
    from cea_arch.networks import CEAIR
    from tests.networks.test_cea_ir import TINY, lively

    torch.manual_seed(0)
    net = lively(CEAIR(**TINY))
    with torch.no_grad():
        net.output.weight.mul_(0.05 / net(torch.rand(1, 3, 32, 32)).std())  # a change that can be seen, not noise
    return net


@pytest.fixture(scope='session')
def model(small_net, tmp_path_factory):
    """Path of a file that holds ``small_net`` and its options."""
    from cea_arch.checkpoints import write_checkpoint
    from tests.networks.test_cea_ir import TINY

    path = tmp_path_factory.mktemp('model') / 'net.pth'
    write_checkpoint({'params': small_net.state_dict(), 'network_g': {'type': 'CEAIR', **TINY}}, path)
    return str(path)
