"""What is done to clean pictures before they are degraded."""

import numpy as np
import pytest

from cea_arch.data.augmentations import augment, crush, drawing, fade, grey, saturate, shrink, soft, tone
from cea_arch.data.cea_dataset import CEADataset
from cea_arch.data.degradations import LUMA, camera_noise, chroma_noise, shot_noise


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_colours_and_tones(rng):
    img = rng.random((5, 7, 3)) * 0.4 + 0.3
    assert np.ptp(grey(img), axis=2).max() == 0
    np.testing.assert_allclose(grey(img)[..., 0], img @ LUMA)
    np.testing.assert_allclose(saturate(img, 1), img)
    np.testing.assert_allclose(saturate(img, 0), grey(img))
    np.testing.assert_allclose(saturate(img, 1.2) @ LUMA, img @ LUMA)
    np.testing.assert_allclose(tone(img, 0.5, 2), (img / 2) ** 2)
    assert tone(img, 10, 0.5).max() == 1
    np.testing.assert_allclose(fade(img, 0.9, 0), img)
    np.testing.assert_allclose(fade(img, 0.9, 1), 0.9)
    assert np.ptp(fade(img, 0.9, 0.5)) == pytest.approx(np.ptp(img) / 2)


def test_half_of_the_faded_pictures_fade_into_the_distance():
    even = np.full((300, 400, 3), 60, np.uint8)
    faded = [augment(even, {'fade': 1}, np.random.default_rng(seed)).astype(int) for seed in range(40)]
    assert min(img.min() for img in faded) >= 60
    varied = [img for img in faded if np.ptp(img) > 0]
    assert 12 <= len(varied) <= 28
    assert np.mean([img.mean() for img in varied]) < np.mean([img.mean() for img in faded])
    assert max(np.abs(np.diff(img, axis=axis)).max() for img in varied for axis in (0, 1)) <= 4  # smoothly


def test_crushed_pictures_are_black_where_they_were_dark(rng):
    img = rng.random((20, 30, 1)) * np.linspace(0.6, 1, 3)
    crushed = crush(img, 0.4)
    black = crushed.max(2) == 0
    assert black.mean() == pytest.approx(0.35, abs=0.1)  # of some, a channel is not
    assert (img @ LUMA)[black].max() < (img @ LUMA)[~black].max()
    assert (crushed <= img).all()
    np.testing.assert_allclose(crush(np.ones((4, 4, 3)), 0.5), 1)
    pale = augment(np.full((8, 8, 3), 230, np.uint8), {'crush': 1}, rng)
    assert 150 < pale.mean() < 230  # an even area does not vanish


def test_soft_pictures_keep_their_tone_and_lose_their_edges():
    edge = np.repeat([0.2, 0.8], 20)[None, :, None].repeat(30, 0).repeat(3, 2)
    slopes = [np.abs(np.diff(soft(edge, width), axis=1)).max() for width in (0.4, 0.8, 1.2)]
    assert 0.6 > slopes[0] > slopes[1] > slopes[2] > 0.15
    assert soft(edge, 1.2).mean() == pytest.approx(edge.mean())


def test_options_choose_what_is_done(rng, image):
    assert augment(image, {}, rng) is image
    reordered = augment(image, {'channels': 1}, np.random.default_rng(1))
    assert not np.array_equal(reordered, image)
    np.testing.assert_array_equal(np.sort(reordered, 2), np.sort(image, 2))
    greyed = augment(image, {'grey': 1}, rng)
    assert greyed.dtype == np.uint8
    assert np.ptp(greyed, axis=2).max() == 0
    darker = augment(image, {'tone': 1, 'brightness': [0.2, 0.3]}, rng)
    assert 0.15 < darker.mean() / image.mean() < 0.35
    pale = augment(image, {'fade': 1}, np.random.default_rng(0))
    assert pale.mean() > image.mean()
    assert 0.2 < np.ptp(pale) / np.ptp(image) < 0.85
    softened = augment(image, {'soft': 1}, rng)
    assert np.abs(np.diff(softened / 255, axis=1)).mean() < np.abs(np.diff(image / 255, axis=1)).mean()
    wide = augment(image.astype(np.uint16) * 257, {'tone': 1, 'gamma': [1.9, 2.1]}, rng)
    np.testing.assert_allclose(wide, 255 * (image / 255) ** 2, atol=12)


def test_drawings_are_what_no_photograph_shows(image):
    drawn = [drawing((48, 64), np.random.default_rng(seed)) for seed in range(60)]
    assert {img.shape for img in drawn} == {(48, 64, 3)}
    assert {img.dtype for img in drawn} == {np.dtype(np.uint8)}
    colours = [len(np.unique(img.reshape(-1, 3), axis=0)) for img in drawn]
    assert 10 <= sum(count == 1 for count in colours) <= 25  # even areas, a quarter
    assert sum(np.ptp(img, axis=2).max() == 0 for img in drawn) >= 10  # grey ones
    edges = [np.abs(np.diff(img.astype(int), axis=1)).max() for img in drawn]
    assert sum(edge > 60 for edge in edges) >= 15  # shapes and text
    np.testing.assert_array_equal(drawn[3], drawing((48, 64), np.random.default_rng(3)))
    same = augment(image, {'drawn': 1}, np.random.default_rng(0))
    assert same.shape == image.shape
    assert same.dtype == np.uint8
    assert not np.array_equal(same, image)


def test_about_as_many_as_asked_for(rng, image):
    counts = np.zeros(3)
    for _ in range(400):
        found = augment(image, {'channels': 0.6, 'grey': 0.2, 'tone': 0.5, 'brightness': [0.3, 0.5]}, rng)
        counts += [np.ptp(found, axis=2).max() == 0, found.mean() < 100, found is image]
    np.testing.assert_allclose(counts / 400, [0.2, 0.5, 0.16], atol=0.08)


def test_shrunk_images_show_more_and_keep_their_tone(rng, image):
    pair = [np.kron(image, np.ones((4, 4, 1), np.uint8)), np.full((160, 240, 3), 999, np.uint16)]
    sizes = set()
    for _ in range(50):
        small, other = shrink(pair, rng, 32)
        assert small.shape == other.shape
        assert min(small.shape[:2]) >= 32
        assert abs(small.mean() - image.mean()) < 2
        assert (other == 999).all()
        sizes.add(small.shape[0])
    assert min(sizes) < 45
    assert max(sizes) > 130


def test_noise_of_photons_and_of_colour(rng):
    img = np.broadcast_to(np.array([0.0, 0.25, 1.0])[:, None, None], (3, 20000, 3))
    deviation = (shot_noise(img, 20, rng) - img).std((1, 2)) * 255
    np.testing.assert_allclose(deviation, [0, 10, 20], rtol=0.02)
    img = np.full((200, 200, 3), 0.5)
    noise = chroma_noise(img, 10, rng) - img
    assert noise.std() * 255 == pytest.approx(10)
    assert abs(noise @ LUMA).max() < 1e-12
    assert np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1] > 0.5


def test_noise_as_files_of_cameras_have_it(rng):
    img = np.broadcast_to(np.array([0.0, 1.0])[:, None, None], (2, 1, 3)).repeat(150, 0).repeat(300, 1)
    for width, together in ((0.3, 0.1), (0.6, 0.5), (1.2, 0.8)):
        noise = (camera_noise(img, 10, width, rng) - img) * 255
        assert noise[200:].std() == pytest.approx(10, rel=0.06)
        assert noise[:100].std() == pytest.approx(10 * 0.2**0.5, rel=0.06)
        assert np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1] == pytest.approx(together, abs=0.12)
        luminance = noise.mean(2, keepdims=True)
        assert 0.3 < (noise - luminance).std() / luminance.std() < 0.6


def test_a_training_uses_them_and_an_evaluation_does_not(image_folder):
    folder = image_folder('clean', ['a'], (60, 80))
    source = {'degradation': 'gaussian_noise', 'sigmas': 0, 'dataroot_gt': str(folder), 'augment': {'grey': 1}}
    opt = {'name': 't', 'sources': {'x': source}, 'gt_size': 32, 'shrink': 1}
    sample = CEADataset(opt | {'phase': 'train'})[0]
    assert sample['gt'].shape == (3, 32, 32)
    assert np.ptp(sample['gt'].numpy(), axis=0).max() == 0
    assert np.array_equal(sample['gt'], sample['lq'])
    whole = CEADataset(opt | {'phase': 'val'})[0]
    assert whole['gt'].shape == (3, 60, 80)
    assert np.ptp(whole['gt'].numpy(), axis=0).max() > 0
