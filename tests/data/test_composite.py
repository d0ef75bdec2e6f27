import sys

import cv2
import numpy as np
import pytest

from cea_arch.data.benchmarks import CDD11_CLASSES
from cea_arch.data.composite import Inputs, composite, degrade, write_composites
from cea_arch.data.image_store import ImageStore
from cea_arch.errors import UserError
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / 'datasets_prep'))
import synthesize_composite


def grey_map(folder, name, values):
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / f'{name}.png'), values)
    return folder


@pytest.fixture
def inputs(image_folder, tmp_path):
    clear = image_folder('photos', ['a', 'b'])
    depth = grey_map(tmp_path / 'depth', 'a', np.full((24, 32), 255, np.uint8))
    grey_map(depth, 'b', np.zeros((24, 32), np.uint8))
    rain = grey_map(tmp_path / 'rain', 'any', np.full((20, 20), 51, np.uint8))
    snow = grey_map(tmp_path / 'snow', 'any', np.full((20, 20), 255, np.uint8))
    return Inputs(*(ImageStore(folder) for folder in (clear, depth, rain, snow)))


def test_given_maps_are_used(inputs):
    clear = inputs.clear.read('a')
    assert np.array_equal(degrade(inputs, 'a', 'haze'), clear)  # near everywhere: no haze
    rain = np.rint(np.minimum(clear / 255 + 51 / 255, 1) * 255)
    assert np.abs(degrade(inputs, 'a', 'rain') - rain).max() <= 1
    assert (degrade(inputs, 'a', 'snow') == 255).all()
    far = degrade(inputs, 'b', 'haze').astype(float)
    assert far.std() < 0.6 * inputs.clear.read('b').std()


def naive_composite(clear, name, depth, streaks, flakes, rng):
    """The formulas written out, with zero noise."""
    img = clear.copy()
    if 'low' in name:
        gamma, _ = rng.uniform(2, 3), rng.uniform(0.03, 0.08)
        light = (
            cv2.blur(cv2.blur(0.299 * img[..., 0] + 0.587 * img[..., 1] + 0.114 * img[..., 2], (3, 3)), (3, 3)) + 1e-7
        )
        img = np.stack([np.clip(img[..., c] * light ** (gamma - 1), 0, 1) for c in range(3)], -1)
    if 'rain' in name:
        img = np.stack([img[..., c] + streaks for c in range(3)], -1)
    if 'snow' in name:
        img = np.stack([img[..., c] * (1 - flakes) + flakes for c in range(3)], -1)
    if 'haze' in name:
        beta, airlight = rng.uniform(1, 2), rng.uniform(0.6, 0.9)
        t = np.exp(-np.minimum(1 - cv2.blur(depth, (22, 22)), 0.7) * beta)
        img = np.stack([np.clip(img[..., c] * t + airlight * (1 - t), 0, 1) for c in range(3)], -1)
    return np.rint(np.clip(img, 0, 1) * 255)


class Quiet:
    """A generator whose noise is zero."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.uniform = self.rng.uniform

    def standard_normal(self, shape):
        return np.zeros(shape)


@pytest.mark.parametrize('name', CDD11_CLASSES)
def test_classes_follow_the_formulas(photograph, name):
    clear = photograph[:48, :64] / 255
    rng = np.random.default_rng(3)
    depth, streaks, flakes = rng.random((48, 64)), 0.3 * rng.random((48, 64)), 0.4 * rng.random((48, 64))
    out = composite(clear, name, depth, streaks, flakes, Quiet(7))
    assert out.dtype == np.uint8
    assert np.abs(out - naive_composite(clear, name, depth, streaks, flakes, Quiet(7))).max() <= 1


def test_seed_image_and_class_decide_every_draw(image_folder):
    inputs = Inputs(ImageStore(image_folder('photos', ['a', 'b'])))
    first = degrade(inputs, 'a', 'low_haze_rain')
    assert np.array_equal(degrade(inputs, 'a', 'low_haze_rain'), first)
    assert not np.array_equal(degrade(Inputs(inputs.clear, seed=1), 'a', 'low_haze_rain'), first)
    renamed = image_folder('renamed', ['c'])  # the pixels of a
    assert not np.array_equal(degrade(Inputs(ImageStore(renamed)), 'c', 'low_haze_rain'), first)


def test_without_depth_the_top_is_far(tmp_path):
    grey_map(tmp_path / 'grey', 'a', np.full((96, 64, 3), 30, np.uint8))
    hazy = degrade(Inputs(ImageStore(tmp_path / 'grey')), 'a', 'haze')
    assert hazy[:10].mean() > hazy[-20:].mean() + 30


def test_the_command_writes_cdd11s_layout(image_folder, tmp_path, capsys):
    clear = image_folder('photos', ['a', 'b'])
    arguments = ['--clear', str(clear), '--output', str(tmp_path / 'out'), '--workers', '2']
    assert synthesize_composite.main(arguments) == 0
    assert 'out: 24 images' in capsys.readouterr().out
    for name in ('clear', *CDD11_CLASSES):
        assert ImageStore(tmp_path / 'out' / name).sizes == dict.fromkeys('ab', (48, 64))
    assert np.array_equal(ImageStore(tmp_path / 'out/clear').read('b'), ImageStore(clear).read('b'))
    one = degrade(Inputs(ImageStore(clear)), 'b', 'haze_snow')
    assert np.array_equal(ImageStore(tmp_path / 'out/haze_snow').read('b'), one)
    assert synthesize_composite.main(arguments) == 2
    assert 'out exists; remove it first' in capsys.readouterr().err


def test_a_missing_depth_map_is_named(inputs, image_folder, tmp_path):
    clear = ImageStore(image_folder('more', ['a', 'b', 'c']))
    with pytest.raises(UserError, match=r"1 of 3 images have no depth map: 'c' \(nearest: 'b'\)"):
        Inputs(clear, inputs.depth)
    with pytest.raises(UserError, match='exists; remove it first'):
        write_composites(inputs, tmp_path)


def test_the_published_sample(shared_data):
    """Inverse depth lies under light_map there: the two names are swapped in the original."""
    folder = shared_data / 'composite'
    stores = [ImageStore(folder / name) for name in ('clear', 'light_map', 'rain_mask', 'snow_mask')]
    reference = cv2.imread(str(folder / 'reference_low_haze_rain_or_snow.jpg'))[..., ::-1]
    out = degrade(Inputs(*stores), '1', 'low_haze_rain')
    assert out.shape == reference.shape
    clear = stores[0].read('1')
    for statistic in (np.mean, np.std):  # grey and flat, as the published result is, unlike the clear image
        assert abs(statistic(out) - statistic(reference)) < 0.6 * abs(statistic(clear) - statistic(reference))
