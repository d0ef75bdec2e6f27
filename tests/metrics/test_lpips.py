"""LPIPS: the arithmetic, with a backbone of random weights; with those of the literature it was not tried."""

import json
from importlib import resources

import cv2
import numpy as np
import pytest
import torch
import torchvision
from basicsr.metrics import calculate_metric
from torch.nn import functional as F

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.metrics import lpips_metric
from cea_arch.metrics.lpips_metric import calculate_cea_lpips

lpips = pytest.importorskip('lpips', reason='needs the extra: pip install -e ".[lpips]"')


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    """A file as torchvision has it, of AlexNet with random weights; and the network."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    path = tmp_path_factory.mktemp('backbone') / 'alexnet.pth'
    torch.save(network.state_dict(), path)
    return str(path), network


def by_hand(network, img, img2):
    """Distances of features, each of unit length, weighted by the package's numbers, after each ReLU."""
    file = resources.files('lpips') / 'weights/v0.1/alex.pth'
    weights = torch.load(str(file), map_location='cpu', weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = []
    for image in (img, img2):
        x = (torch.from_numpy(image).float() * 2 - 1 - shift) / scale
        x, found = x.permute(2, 0, 1)[None], []
        for layer in network.features[:12]:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(F.normalize(x, dim=1))
        features.append(found)
    parts = [
        ((a - b).square() * weights[f'lin{number}.model.1.weight']).sum(1).mean()
        for number, (a, b) in enumerate(zip(*features))
    ]
    return float(sum(parts))


@pytest.mark.parametrize('eight_bit', [False, True])
def test_the_arithmetic(photograph, backbone, eight_bit):
    path, network = backbone
    clean = photograph[:96, :128] / 255
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape), 0, 1)
    options = {'type': 'calculate_cea_lpips', 'backbone': path, 'eight_bit': eight_bit}
    value = calculate_metric({'img': noisy, 'img2': clean}, options)
    with torch.no_grad():
        expected = by_hand(network, np.rint(noisy * 255) / 255 if eight_bit else noisy, clean)
    assert value == pytest.approx(expected, rel=1e-4)
    assert value > 0
    assert calculate_cea_lpips(clean, clean, backbone=path) == 0


def test_mistakes_are_named(backbone, monkeypatch, tmp_path):
    image = np.zeros((64, 64, 3))
    with pytest.raises(UserError, match="net must be one of alex, vgg, squeeze, got 'resnet'"):
        calculate_cea_lpips(image, image, net='resnet')
    with pytest.raises(
        UserError, match=r'alexnet\.pth are not the weights of this backbone: features\.0\.weight is absent'
    ):
        calculate_cea_lpips(image, image, net='vgg', backbone=backbone[0])
    with pytest.raises(UserError, match=r"file 'nowhere\.pth' does not exist"):
        calculate_cea_lpips(image, image, backbone='nowhere.pth')

    def unreachable(**_):
        raise OSError('no network')

    monkeypatch.setattr(lpips, 'LPIPS', unreachable)
    lpips_metric._network.cache_clear()
    with pytest.raises(UserError, match=r'cannot be downloaded \(no network\)\. Give torchvision'):
        calculate_cea_lpips(image, image)
    monkeypatch.setitem(__import__('sys').modules, 'lpips', None)
    lpips_metric._network.cache_clear()
    with pytest.raises(UserError, match=r'pip install -e "\.\[lpips\]"'):
        calculate_cea_lpips(image, image)


def test_cea_score_with_lpips(photograph, backbone, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, sigma in (('gt', 0), ('ours', 10)):
        (tmp_path / name).mkdir()
        noisy = np.clip(photograph[:96, :128] + rng.normal(0, sigma, (96, 128, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / name / '1.png'), noisy[..., ::-1])
    words = ['--set', 'noise', str(tmp_path / 'ours'), str(tmp_path / 'gt'), '--protocol', 'aio']
    assert main(['score', *words, '--output', str(tmp_path / 'out'), '--lpips', backbone[0]]) == 0
    assert 'lpips' in capsys.readouterr().out
    means = json.loads((tmp_path / 'out/results.json').read_text())['sets']['noise']['means']
    saved = [cv2.imread(str(tmp_path / name / '1.png'))[..., ::-1] / 255 for name in ('ours', 'gt')]
    assert means['lpips'] == pytest.approx(calculate_cea_lpips(*saved, backbone=backbone[0]), rel=1e-4)


def test_validation_with_lpips_keeps_the_lowest(workplace, backbone):
    from tests.training.test_training import train

    folder, opt = workplace
    opt['val'] |= {
        'save_img': False,
        'metrics': {'lpips': {'type': 'calculate_cea_lpips', 'backbone': backbone[0], 'better': 'lower'}},
    }
    assert train(folder, opt) == 0
    best = json.loads((folder / 'experiments/run/models/best.json').read_text())
    assert 0 < best['mean'] < 1
    assert (
        train(
            folder,
            opt
            | {
                'name': 'other',
                'val': opt['val'] | {'metrics': {'lpips': {'type': 'calculate_cea_lpips', 'backbone': 'nowhere.pth'}}},
            },
        )
        == 2
    )
    assert not (folder / 'experiments/other').exists()
