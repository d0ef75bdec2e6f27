import zlib

import cv2
import numpy as np
import pytest

from cea_arch.data import degradations as deg


@pytest.fixture
def clear(photograph):
    return photograph[:96, :128] / 255.0


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize('task', deg.ORDER)
@pytest.mark.parametrize('vary', [True, False])
def test_each_task_degrades_reproducibly_and_leaves_its_input_alone(clear, task, vary):
    before = clear.copy()
    first, again, other = (deg.synthesize(clear, [task], generator(seed), vary) for seed in (1, 1, 2))
    assert np.array_equal(clear, before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == clear.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.abs(first - clear).mean() > 0.003


def test_synthesis_is_the_same_on_every_platform(clear):
    """The literal was computed once; another one here means that published synthetic test sets have changed."""
    img = deg.quantize(deg.synthesize(clear, deg.TASKS, generator()))
    assert zlib.crc32(img.tobytes()) == 2116559643


def test_the_period_is_how_far_strengths_reach():
    even = np.full((64, 64, 3), 0.4)

    def spread(period):
        return np.mean([deg.synthesize(even, ['haze'], generator(seed), period=period).std() for seed in range(20)])

    assert spread(40) > 1.5 * spread(160) > 3 * spread(1000)
    first, again = (deg.synthesize(even, ['haze'], generator(), **words) for words in ({}, {'period': 160}))
    assert np.array_equal(first, again)


def test_tasks_act_in_the_fixed_order(clear):
    tasks = list(deg.ORDER)
    forth, back = (deg.synthesize(clear, order, generator()) for order in (tasks, tasks[::-1]))
    assert np.array_equal(forth, back)


@pytest.mark.parametrize('sigma', [15, 25, 50])
def test_gaussian_noise_follows_the_literature(photograph, sigma):
    """Clip and truncate, as PromptIR, AdaIR and MoCE-IR feed it to the network."""
    noise = generator(3).standard_normal(photograph.shape)
    expected = np.clip(photograph + noise * sigma, 0, 255).astype(np.uint8)
    actual = deg.quantize(deg.gaussian_noise(photograph / 255, sigma, generator(3)), 'trunc')
    assert np.array_equal(actual, expected)


def test_noise_power_on_cbsd68(shared_data):
    """Mean input PSNR after the centre crop to multiples of 16, as published: 24.83, 20.54, 15.00 dB."""
    from cea_arch.data.cea_dataset import centre_crop

    for sigma, expected in ((15, 24.833), (25, 20.536), (50, 15.003)):
        scores = []
        for number, path in enumerate(sorted((shared_data / 'cbsd68').glob('*.jpg'))):
            clean = centre_crop(cv2.imread(str(path)), 16)
            noisy = deg.quantize(deg.gaussian_noise(clean / 255, sigma, generator(number)), 'trunc')
            scores.append(10 * np.log10(255**2 / np.mean((noisy.astype(float) - clean) ** 2)))
        assert len(scores) == 68
        assert np.mean(scores) == pytest.approx(expected, abs=0.01)


def test_haze_formula(clear):
    depth = np.full(clear.shape[:2], 0.6)
    transmission = np.exp(-1.5 * 0.4)
    expected = clear * transmission + 0.8 * (1 - transmission)
    np.testing.assert_allclose(deg.haze(clear, depth, 1.5, 0.8), expected, atol=1e-12)
    far = np.exp(-1.5 * 0.7)  # depth saturates
    np.testing.assert_allclose(deg.haze(clear, depth * 0, 1.5, 0.8), clear * far + 0.8 * (1 - far), atol=1e-12)


def test_low_light_formula(clear):
    grey = clear @ np.array([0.299, 0.587, 0.114])
    light = cv2.blur(cv2.blur(grey, (3, 3)), (3, 3))[..., None] + 1e-7
    np.testing.assert_allclose(deg.low_light(clear, 2.5, 0, generator()), clear * light**1.5, atol=1e-12)


def test_rain_adds_and_snow_covers(clear):
    mask = np.zeros(clear.shape[:2])
    mask[10:20] = 0.5
    assert np.allclose(deg.rain(clear, mask)[10:20], clear[10:20] + 0.5)
    assert np.allclose(deg.snow(clear, mask)[10:20], clear[10:20] / 2 + 0.5)
    assert np.array_equal(deg.rain(clear, mask)[20:], clear[20:])


def test_broad_streaks_are_broader_and_brighter_than_rain(clear):
    def figures(draw):  # share of the picture, brightness there, and how much of it is left when a pixel is taken off
        masks = [draw((96, 128), generator(seed)) for seed in range(30)]
        wet = [mask > 0.1 for mask in masks]
        cores = [cv2.erode(where.astype(np.uint8), np.ones((1, 3), np.uint8)) for where in wet]
        shares = [where.mean() for where in wet]
        return np.array(shares), np.concatenate([m[w] for m, w in zip(masks, wet)]).mean(), np.sum(cores) / np.sum(wet)

    (shares, bright, core), (_, faint, thin) = figures(deg.broad_streaks), figures(deg.rain_streaks)
    assert shares.min() > 0.01
    assert shares.max() < 0.4
    assert bright > 1.2 * faint
    assert core > 1.2 * thin


def test_blur_keeps_flat_areas_and_blends(clear):
    kernel = deg.line_kernel(9, 30)
    assert kernel.sum() == pytest.approx(1)
    flat = np.full_like(clear, 0.3)
    np.testing.assert_allclose(deg.blur(flat, kernel), flat, atol=1e-12)
    half = deg.blur(clear, kernel, 0.5)
    np.testing.assert_allclose(half, (clear + deg.blur(clear, kernel)) / 2, atol=1e-12)


@pytest.mark.parametrize(('angle', 'axis'), [(0, 1), (90, 0)])
def test_line_kernel_points_along_its_angle(angle, axis):
    kernel = deg.line_kernel(11, angle)
    centre = len(kernel) // 2
    assert kernel.take(centre, axis=axis).sum() == pytest.approx(1)


def test_smooth_field_is_smooth_and_fills_its_range():
    field = deg.smooth_field((400, 600), generator())
    assert field.min() >= 0
    assert field.max() <= 1
    assert field.max() - field.min() > 0.4
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in (0, 1)) < 0.02


def test_quantize():
    img = np.array([[[-0.5, 10.6 / 255, 1.5]]])
    assert deg.quantize(img).tolist() == [[[0, 11, 255]]]
    assert deg.quantize(img, 'trunc').tolist() == [[[0, 10, 255]]]
    levels = np.arange(256).reshape(-1, 1, 1) / 255.0
    assert deg.quantize(levels, 'trunc').ravel().tolist() == list(range(256))


def test_defocus_spreads_a_point_over_a_disk():
    point = np.zeros((21, 21, 3))
    point[10, 10] = 1
    disk = deg.defocus(point, 4)[..., 0]
    assert disk.sum() == pytest.approx(1)
    assert 1 / disk.max() == pytest.approx(np.pi * 16, rel=0.05)
    np.testing.assert_allclose((disk[10, 16], disk[4, 10]), 0, atol=1e-12)
    np.testing.assert_allclose(deg.defocus(point, 0), point, atol=1e-12)


def test_jpeg_keeps_less_at_a_lower_quality(clear):
    errors = [np.abs(deg.jpeg(clear, quality) - clear).mean() for quality in (95, 40, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]
    red = np.zeros((16, 16, 3))
    red[..., 0] = 1
    np.testing.assert_allclose(deg.jpeg(red, 95), red, atol=0.02)  # channels in their order
