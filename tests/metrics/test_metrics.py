import json

import cv2
import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric, calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cea_arch.cli import main
from cea_arch.data.cea_dataset import centre_crop
from cea_arch.files import from_json
from cea_arch.metrics.comparison import PUBLISHED, published, side_by_side
from cea_arch.metrics.protocols import PROTOCOLS, score
from cea_arch.metrics.psnr_ssim_metric import uint8_bgr
from cea_arch.metrics.report import Report, SetResult
from cea_arch.training.options import read_options
from tests.conftest import ROOT


@pytest.fixture
def pair(photograph):
    clean = photograph / 255.0
    return np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape), 0, 1), clean


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('calculate_cea_psnr', lambda a, b: peak_signal_noise_ratio(b, a, data_range=1)),
        ('calculate_cea_ssim_uniform', lambda a, b: structural_similarity(a, b, channel_axis=-1, data_range=1)),
        (
            'calculate_cea_ssim_gaussian',
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
    assert calculate_metric(data, {'type': 'calculate_cea_psnr'}) == float('inf')
    assert calculate_metric(data, {'type': 'calculate_cea_ssim_uniform'}) == pytest.approx(1)


def test_images_below_the_window_are_named(pair):
    data = {'img': pair[0][:10, :10], 'img2': pair[1][:10, :10]}
    assert calculate_metric(data, {'type': 'calculate_cea_ssim_uniform'}) < 1
    with pytest.raises(ValueError, match='a window of 11 pixels needs larger images than 10 x 10'):
        calculate_metric(data, {'type': 'calculate_cea_ssim_gaussian'})


def test_results_of_equal_images_are_json_that_every_program_reads(tmp_path, photograph, capsys):
    for name in ('restored', 'gt'):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / 'a.png'), photograph)
    words = ['--set', 'x', str(tmp_path / 'restored'), str(tmp_path / 'gt'), '--output', str(tmp_path / 'out')]
    assert main(['score', '--protocol', 'aio', *words]) == 0
    file = tmp_path / 'out/results.json'

    def refuse(word):
        raise AssertionError(word)

    content = json.loads(file.read_text(), parse_constant=refuse)
    assert content['sets']['x']['means']['psnr'] == 'inf'
    assert content['sets']['x']['rows'][0]['psnr'] == 'inf'
    assert from_json(file.read_bytes())['sets']['x']['means']['psnr'] == np.inf
    capsys.readouterr()
    assert main(['report', str(file)]) == 0
    assert '| inf/1.000 |' in capsys.readouterr().out
    assert main(['score', '--protocol', 'aio', *words[:4], *words]) == 2
    assert "2 sets are called 'x': each needs a name of its own." in capsys.readouterr().err
    assert main(['score', '--protocol', 'aio', *words[:4], '--output', str(file)]) == 2
    assert 'results.json: expected a folder, but there is a file.' in capsys.readouterr().err


@pytest.mark.parametrize('target', ['amplitude', 'complex'])
def test_fft_loss_compares_amplitudes_or_both_parts(target):
    pred, gt = torch.rand(2, 2, 3, 8, 10, dtype=torch.float64)
    one, other = (np.fft.rfft2(img.numpy()) for img in (pred, gt))
    error = one - other
    parts = {'complex': [error.real, error.imag], 'amplitude': [np.abs(one) - np.abs(other)]}
    expected = 0.1 * np.mean(np.abs(parts[target]))
    loss = build_loss({'type': 'CEAFFTLoss', 'loss_weight': 0.1, 'target': target})
    assert loss(pred, gt).item() == pytest.approx(expected)


@pytest.mark.parametrize('target', ['amplitude', 'complex'])
@pytest.mark.parametrize('pred', [torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5), torch.rand(1, 3, 8, 8)])
def test_fft_loss_has_a_gradient_everywhere(target, pred):
    """Of a flat picture all amplitudes but one are zero."""
    pred = pred.clone().requires_grad_()
    build_loss({'type': 'CEAFFTLoss', 'target': target, 'norm': 'ortho'})(pred, torch.rand(1, 3, 8, 8)).backward()
    assert pred.grad.isfinite().all()
    assert pred.grad.abs().max() > 0 or (target == 'amplitude' and not pred.any())


def test_fft_losses_are_the_papers_by_default_and_other_words_are_named():
    assert build_loss({'type': 'CEAFFTLoss'}).target == 'amplitude'
    with pytest.raises(ValueError, match="target must be amplitude or complex, got 'phase'"):
        build_loss({'type': 'CEAFFTLoss', 'target': 'phase'})


@pytest.fixture
def images(photograph):
    """A noisy photograph, a denoised one as a network would put it out, and the clean one: RGB float32 in [0, 1]."""
    clean = photograph.astype(np.float32) / 255
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 0.1, clean.shape).astype(np.float32), 0, 1)
    return {'degraded': noisy, 'restored': np.clip(cv2.GaussianBlur(noisy, (0, 0), 1.2), 0, 1), 'clean': clean}


def test_protocols_equal_their_references(images, tmp_path):
    restored, clean = images['restored'], images['clean']
    float64 = [img.astype(np.float64) for img in (clean, restored)]
    scores = {name: score(images, protocol.metrics) for name, protocol in PROTOCOLS.items()}
    psnr = peak_signal_noise_ratio(*float64, data_range=1)
    for name, options in (('aio', {}), ('moce-ir', {'gaussian_weights': True})):
        ssim = structural_similarity(*float64, channel_axis=-1, data_range=1, **options)
        assert scores[name]['psnr'] == pytest.approx(psnr, abs=1e-6)
        assert scores[name]['ssim'] == pytest.approx(ssim, abs=1e-6)
    for name, img in images.items():
        cv2.imwrite(str(tmp_path / f'{name}.png'), uint8_bgr(img))
    saved = [cv2.imread(str(tmp_path / f'{name}.png')) for name in ('clean', 'restored')]
    assert scores['onerestore']['psnr'] == pytest.approx(peak_signal_noise_ratio(*saved), abs=1e-9)
    ssim = structural_similarity(*(img / 255.0 for img in saved), channel_axis=-1, data_range=1)
    assert scores['onerestore']['ssim'] == pytest.approx(ssim, abs=1e-9)
    assert scores['basicsr']['psnr'] == calculate_psnr(saved[1], saved[0], crop_border=0)
    assert scores['basicsr']['ssim'] == calculate_ssim(saved[1], saved[0], crop_border=0)
    assert len({round(s['ssim'], 5) for s in scores.values()}) == 4  # so that the protocol's name matters
    assert scores['aio']['psnr_input'] == pytest.approx(peak_signal_noise_ratio(images['clean'], images['degraded']))


def test_what_is_saved_is_what_basicsr_would_save(images):
    tensor = torch.from_numpy(images['restored']).permute(2, 0, 1)[None]
    assert np.array_equal(uint8_bgr(images['restored']), tensor2img([tensor]))


@pytest.fixture
def saved_sets(images, tmp_path):
    """Restored images as a test run names them, cropped to multiples of 16, and whole ground truths."""
    folders = tmp_path / 'restored', tmp_path / 'gt'
    for folder in folders:
        folder.mkdir()
    for number in range(2):
        part = {name: img[number * 20 :][:70, :85] for name, img in images.items()}
        cv2.imwrite(str(folders[0] / f'rain-{number}_run.png'), uint8_bgr(centre_crop(part['restored'], 16)))
        cv2.imwrite(str(folders[1] / f'norain-{number}.png'), uint8_bgr(part['clean']))
    return [str(folder) for folder in folders]


def test_scoring_saved_images(saved_sets, tmp_path, capsys):
    output = tmp_path / 'results' / 'other'
    command = ['score', '--set', 'Rain', *saved_sets, '--set', 'Again', *saved_sets]
    assert main([*command, '--protocol', 'aio', '--output', str(output)]) == 0
    said = capsys.readouterr().out
    assert said.startswith('# other\n\n| set | images | psnr (aio) | ssim (aio) |\n')
    stored = json.loads((output / 'results.json').read_text())
    assert list(stored['sets']) == ['Rain', 'Again']
    rows = stored['sets']['Rain']['rows']
    assert [row['image'] for row in rows] == ['norain-0', 'norain-1']
    pair = [cv2.imread(f'{saved_sets[0]}/rain-1_run.png'), cv2.imread(f'{saved_sets[1]}/norain-1.png')]
    assert rows[1]['psnr'] == pytest.approx(peak_signal_noise_ratio(pair[0], centre_crop(pair[1], 16)), abs=1e-5)
    assert (output / 'comparison/Rain.png').is_file()
    assert main([*command, '--protocol', 'onerestore', '--output', str(output)]) == 2
    assert 'rain-0_run.png is (64, 80) (height, width), but its ground truth' in capsys.readouterr().err
    assert main([*command, '--protocol', 'aoi', '--output', str(output)]) == 2
    assert "protocol must be one of aio, moce-ir, onerestore, basicsr, got 'aoi'. Did you mean 'aio'?" in (
        capsys.readouterr().err
    )


def test_report_puts_results_beside_published_figures(tmp_path, capsys):
    report = Report(tmp_path, 'ours', {}, 'aio')
    sets = ('SOTS', 'Rain100L', 'CBSD68_sigma15', 'CBSD68_sigma25', 'CBSD68_sigma50')
    for number, name in enumerate(sets):
        report.add(name, 1, SetResult('AIO-3', None, [{'image': 'i', 'psnr': 30.0 + number, 'ssim': 0.9}]))
    report.write()
    path = str(tmp_path / 'results.json')
    assert main(['report', path, '--published', 'aio3']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'| method | protocol | parameters | {" | ".join(sets)} | mean | source |'
    assert (
        f'| ours | aio |  | 30.00/.900 | 31.00/.900 | 32.00/.900 | 33.00/.900 | 34.00/.900 | 32.00/.900 | {path} |'
        in lines
    )
    assert (
        '| AdaIR | aio | 28.78 M | 31.06/.980 | 38.64/.983 | 34.12/.935 | 31.45/.892 | 28.19/.802 | 32.69/.918 | '
        'figure: AdaIR |'
    ) in lines
    assert lines[-1].startswith('5 protocols (not stated, aio,')
    assert main(['report', '--published', 'aio4']) == 2
    assert "published figures are here for aio3, aio5, cdd11, not for 'aio4'." in capsys.readouterr().err
    assert main(['report', str(tmp_path / 'none.json')]) == 2
    assert 'none.json cannot be read' in capsys.readouterr().err
    (tmp_path / 'bad.json').write_text('{}')
    assert main(['report', str(tmp_path / 'bad.json')]) == 2
    assert 'bad.json is not a results.json with psnr for each set' in capsys.readouterr().err
    assert main(['report']) == 2


@pytest.mark.parametrize('benchmark', PUBLISHED)
def test_published_figures_have_the_recipes_columns(benchmark):
    sets = [
        dataset['name']
        for phase, dataset in read_options(str(ROOT / f'options/cea_{benchmark}.yml'))['datasets'].items()
        if phase != 'train'
    ]
    methods = published(benchmark)
    assert len(methods) >= 18
    for method in methods:
        assert list(method.scores) == sets
        assert method.source
        assert all(5 < psnr < 50 and (ssim is None or 0.3 < ssim < 1) for psnr, ssim in method.scores.values())


@pytest.mark.parametrize(
    ('benchmark', 'name', 'mean'),
    [
        ('aio3', 'CEA-IR-S', (32.89, 0.918)),
        ('aio3', 'CEA-IR', (33.07, 0.922)),
        ('aio5', 'CEA-IR-S', (30.80, 0.919)),
        ('aio5', 'CEA-IR', (31.13, 0.922)),
        ('cdd11', 'CEA-IR-S', (29.79, 0.886)),
        ('cdd11', 'MoCE-IR-S', (29.05, 0.881)),
    ],
)
def test_the_papers_rows_have_the_means_that_it_prints(benchmark, name, mean):
    [row] = [method for method in published(benchmark) if method.name == name]
    found = np.mean(list(row.scores.values()), axis=0)
    assert abs(found - mean).max() <= 0.0101  # of rounded figures


def test_a_published_psnr_without_ssim_has_a_mean_of_its_own():
    lines = side_by_side(published('aio3')).splitlines()
    assert '| FIT | not stated |  | 31.11 | 38.92 | 34.23 | 31.55 | 28.32 | 32.83 | table: arXiv 2608.06832 |' in lines
