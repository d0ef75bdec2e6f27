import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


@pytest.fixture
def pair(photograph):
    clean = photograph / 255.0
    return np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape), 0, 1), clean


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('calculate_psnr_float', lambda a, b: peak_signal_noise_ratio(b, a, data_range=1)),
        ('calculate_ssim_uniform', lambda a, b: structural_similarity(a, b, channel_axis=-1, data_range=1)),
        (
            'calculate_ssim_gaussian',
            lambda a, b: structural_similarity(a, b, channel_axis=-1, data_range=1, gaussian_weights=True),
        ),
    ],
)
def test_metrics_equal_scikit_image(pair, name, reference):
    restored, clean = pair
    value = calculate_metric({'img': restored, 'img2': clean}, {'type': name})
    assert value == pytest.approx(reference(restored, clean), abs=1e-6)
    assert 0 < value < 30


def test_equal_images(pair):
    data = {'img': pair[1], 'img2': pair[1]}
    assert calculate_metric(data, {'type': 'calculate_psnr_float'}) == float('inf')
    assert calculate_metric(data, {'type': 'calculate_ssim_uniform'}) == pytest.approx(1)


def test_images_below_the_window_are_named(pair):
    data = {'img': pair[0][:10, :10], 'img2': pair[1][:10, :10]}
    assert calculate_metric(data, {'type': 'calculate_ssim_uniform'}) < 1
    with pytest.raises(ValueError, match='a window of 11 pixels needs larger images than 10 x 10'):
        calculate_metric(data, {'type': 'calculate_ssim_gaussian'})


def test_fft_loss_is_the_mean_of_real_and_imaginary_differences():
    pred, target = torch.rand(2, 2, 3, 8, 10, dtype=torch.float64)
    spectra = [np.fft.rfft2(img.numpy()) for img in (pred, target)]
    error = spectra[0] - spectra[1]
    expected = 0.1 * np.mean([np.abs(error.real), np.abs(error.imag)])
    assert build_loss({'type': 'FFTLoss', 'loss_weight': 0.1})(pred, target).item() == pytest.approx(expected)
    pred.requires_grad_()
    build_loss({'type': 'FFTLoss', 'norm': 'ortho'})(pred, target).backward()
    assert pred.grad.abs().max() > 0
