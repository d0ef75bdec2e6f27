import shutil

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler

from cea_arch.data.cea_dataset import CEADataset, centre_crop
from cea_arch.data.image_store import ImageStore
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.data.pairing import match_keys, pair_keys
from cea_arch.errors import UserError


def lmdb_of(folder, destination):
    write_lmdb(((path.stem, path.read_bytes()) for path in sorted(folder.glob('*.png'))), destination)
    return destination


def options(phase='train', gt_size=32, **sources):
    return {'name': 'set', 'type': 'CEADataset', 'phase': phase, 'gt_size': gt_size, 'sources': sources}


def noise(folder, **more):
    return {'degradation': 'gaussian_noise', 'dataroot_gt': str(folder), **more}


def test_sources_repeats_and_samples(image_folder, tmp_path):
    gt, lq = image_folder('gt', ['a', 'b']), image_folder('lq', ['a', 'b'])
    dataset = build_dataset(
        options(
            denoise=noise(lmdb_of(gt, tmp_path / 'gt.lmdb'), sigmas=[15, 50], repeat=3),
            derain={'degradation': 'paired', 'dataroot_gt': str(gt), 'dataroot_lq': str(lq)},
            mixed={'degradation': 'synthetic', 'dataroot_gt': str(gt), 'repeat': 2},
        )
    )
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample['task'] for sample in samples] == ['denoise'] * 6 + ['derain'] * 2 + ['mixed'] * 4
    for sample in samples:
        for key in ('lq', 'gt'):
            assert sample[key].shape == (3, 32, 32)
            assert sample[key].dtype == torch.float32
            assert 0 <= sample[key].min() <= sample[key].max() <= 1
    assert not torch.equal(samples[0]['lq'], samples[0]['gt'])
    assert torch.equal(samples[6]['lq'], samples[6]['gt'])  # the same images in both folders: cropped and turned alike
    assert 'denoise: gaussian_noise, 2 x 3 = 6 samples (50.0 %)' in dataset.describe()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_source_takes_pictures_of_certain_tones_alone(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'gt'
    folder.mkdir()
    for name, least, most in (('pale', 120, 230), ('night', 0, 60), ('usual', 0, 255)):
        cv2.imwrite(str(folder / f'{name}.png'), rng.integers(least, most, (64, 64, 3), np.uint8))

    def taken(**only):
        return [gt for _, gt in CEADataset(options(only=noise(folder, only=only))).sources[0].pairs]

    assert taken() == ['night', 'pale', 'usual']
    assert taken(dark_channel=[0.4, 1]) == ['pale']
    assert taken(brightness=[0, 0.2]) == ['night']
    assert taken(brightness=[0.4, 1], dark_channel=[0, 0.3]) == ['usual']
    cv2.imwrite(str(folder / 'small.png'), np.full((16, 16, 3), 60, np.uint8))  # no patch is cut from it
    assert taken(dark_channel=[0.4, 1]) == ['pale']
    (folder / 'small.png').unlink()
    with pytest.raises(UserError, match=r'only: none of 3 pictures is within .* brightness 0\.1. to 0\.6'):
        taken(brightness=[0.9, 1])
    with pytest.raises(UserError, match="unknown key 'dark'"):
        taken(dark=[0, 1])


def test_crops_and_noise_do_not_repeat_from_epoch_to_epoch(image_folder):
    """The stock loader re-seeds NumPy's and Python's generators alike each time its workers start."""
    dataset = CEADataset(options(denoise=noise(image_folder('gt', ['a', 'b', 'c', 'd']), sigmas=25)))
    loader_options = {'phase': 'train', 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 2}
    sampler = EnlargedSampler(dataset, 1, 0)
    loader = build_dataloader(dataset, loader_options, num_gpu=0, sampler=sampler, seed=0)

    def epochs():
        torch.manual_seed(5)
        out = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            out += [{batch['gt_path'][0]: batch for batch in loader}]
        return out

    first, again = epochs(), epochs()
    for path in first[0]:
        for kind in ('gt', 'lq'):
            images = [epoch[path][kind] for epoch in first]
            assert not torch.equal(images[0], images[1])
            assert not torch.equal(images[1], images[2])
    noises = [epoch[path]['lq'] - epoch[path]['gt'] for epoch in first for path in epoch]
    assert len({float(n.sum()) for n in noises}) == len(noises)
    assert torch.equal(first[2][path]['lq'], again[2][path]['lq'])  # and a seed still decides everything


@pytest.mark.parametrize('degradation', ['gaussian_noise', 'synthetic'])
def test_evaluation_is_fixed_whatever_the_order_folder_or_worker(image_folder, tmp_path, degradation):
    folder = image_folder('gt', ['a', 'b', 'c'])
    source = {'degradation': degradation, 'dataroot_gt': str(folder)}
    dataset = CEADataset(options('val', all=source))
    forward = {s['gt_path'][-5:]: s['lq'] for s in (dataset[i] for i in (0, 1, 2))}
    torch.manual_seed(99)
    np.random.seed(99)
    loader = torch.utils.data.DataLoader(dataset, shuffle=True, num_workers=2)
    for batch in loader:
        assert torch.equal(batch['lq'][0], forward[batch['gt_path'][0][-5:]])
    moved = image_folder('elsewhere/gt', ['b'])
    shutil.copy(folder / 'b.png', moved / 'b.png')
    assert torch.equal(CEADataset(options('val', all=source | {'dataroot_gt': str(moved)}))[0]['lq'], forward['b.png'])
    other = CEADataset(options('val', all=source) | {'seed': 1})
    assert not torch.equal(other[0]['lq'], forward['a.png'])


def test_a_period_is_a_number_or_drawn_from_a_range(image_folder):
    source = {'degradation': 'synthetic', 'tasks': ['haze'], 'dataroot_gt': str(image_folder('gt', ['a']))}
    hazy = [
        CEADataset(options('val', all=source | more))[0]['lq']
        for more in ({}, {'period': 160}, {'period': [20, 40]}, {'period': [20, 40]}, {'period': [20, 41]})
    ]
    assert [torch.equal(hazy[0], other) for other in hazy] == [True, True, False, False, False]
    assert torch.equal(hazy[2], hazy[3])
    assert not torch.equal(hazy[2], hazy[4])


def test_evaluation_crops_the_centre(image_folder):
    source = noise(image_folder('gt', ['a'], (50, 67)))
    sample = CEADataset(options('val', all=source) | {'crop_base': 16})[0]
    assert sample['gt'].shape == sample['lq'].shape == (3, 48, 64)
    img = np.arange(50 * 67).reshape(50, 67, 1)
    assert centre_crop(img, 16)[0, 0, 0] == 1 * 67 + 1


@pytest.mark.parametrize('source', [{'degradation': 'jpeg', 'qualities': 10}, {'degradation': 'defocus', 'radii': [3]}])
def test_degradations_of_one_strength(image_folder, source):
    source |= {'dataroot_gt': image_folder('gt', ['a'], (48, 48))}
    sample = CEADataset(options('val', x=source))[0]
    assert 0.002 < (sample['lq'] - sample['gt']).abs().mean() < 0.4
    crop = CEADataset(options(x=source, gt_size=16))[0]
    assert not torch.equal(crop['lq'], crop['gt'])


def test_downscaling_is_matlabs_bicubic(image_folder):
    """Of a linear ramp, away from the border, every cubic kernel gives the ramp; aligned as pixel areas are."""
    source = {'degradation': 'downscale', 'scale': 3, 'dataroot_gt': image_folder('gt', ['a'], (49, 65))}
    sample = CEADataset(options('val', x=source))[0]
    assert sample['gt'].shape == (3, 48, 63)
    assert sample['lq'].shape == (3, 16, 21)
    train = CEADataset(options(x=source, gt_size=24))[0]
    assert (train['gt'].shape, train['lq'].shape) == ((3, 24, 24), (3, 8, 8))
    ramp = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2) * 4
    small = CEADataset(options('val', x=source)).sources[0].degrade(ramp, None)
    assert small.dtype == np.uint8
    np.testing.assert_array_equal(small[2:-2, 2:-2, 0], np.tile((4 + 12 * np.arange(20))[2:-2], (16, 1)))
    with pytest.raises(UserError, match=r'gt_size is 32, no multiple of scale, 3, of x'):
        CEADataset(options(x=source))


def test_sixteen_bit_images_keep_their_depth(tmp_path):
    img = np.arange(64 * 64 * 3, dtype=np.uint16).reshape(64, 64, 3) * 5
    for name in ('lq', 'gt'):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / 'a.png'), img)
    source = {'degradation': 'paired', 'dataroot_gt': str(tmp_path / 'gt'), 'dataroot_lq': str(tmp_path / 'lq')}
    sample = CEADataset(options('val', all=source))[0]
    expected = torch.from_numpy(img[..., ::-1].transpose(2, 0, 1) / 65535.0).float()
    torch.testing.assert_close(sample['gt'], expected, rtol=0, atol=1e-7)


def test_pairing_by_name_id_and_norain():
    pairs = pair_keys(['rain-1', 'rain-10'], ['norain-10', 'norain-1'], 'set')
    assert pairs == [('rain-1', 'norain-1'), ('rain-10', 'norain-10')]
    pairs = pair_keys(['p1/0025_0.8_0.04', 'p1/0025_0.9_0.2', 'p1/0026_1_0.1'], ['p1/0025', 'p1/0026'], 'set')
    assert [gt for _, gt in pairs] == ['p1/0025', 'p1/0025', 'p1/0026']
    assert pair_keys(['a_1', 'a_2'], ['a_1', 'a_2'], 'set') == [('a_1', 'a_1'), ('a_2', 'a_2')]


@pytest.mark.parametrize(
    ('lq', 'gt', 'expected'),
    [
        (['rain-001', 'rain-010'], ['norain-1', 'norain-10'], ['norain-1', 'norain-10']),
        (['norain-1x2', 'norain-2x2'], ['norain-1', 'norain-2'], ['norain-1', 'norain-2']),
        (['low_00002', 'low_haze_00002'], ['2'], ['2', '2']),
        (['0001_hazy'], ['0001_GT'], ['0001_GT']),
        (['p1/0025_0.8_0.04', 'p2/0026_1_0.1'], ['0025', '0026'], ['0025', '0026']),
        (['seq1/0001', 'seq2/0001'], ['seq1/1', 'seq2/1'], ['seq1/1', 'seq2/1']),
        (['Ü_0.8'], ['Ü'], ['Ü']),
    ],
)
def test_pairing_on_id_tokens(lq, gt, expected):
    assert pair_keys(lq, gt, 'set') == list(zip(lq, expected))


@pytest.mark.parametrize(
    ('lq', 'gt', 'lonely', 'unused'),
    [
        (['0025_0.8_0.04', '0026_1_0.1'], ['0025', '0004'], ['0026_1_0.1'], ['0004']),
        (['cat1', 'dog1'], ['cat1'], ['dog1'], []),  # another cat's number
        (['rain-1', 'rain-2'], ['norain-1', 'norain-01', 'norain-2'], ['rain-1'], ['norain-01', 'norain-1']),
        (['seq1/1', 'seq2/1'], ['seq1/1'], ['seq2/1'], []),
        (['rain-1', 'rain-2', 'rain-3'], ['norain-1', 'norain-3'], ['rain-2'], []),
        (['a', 'b'], [], ['a', 'b'], []),
    ],
)
def test_pairing_leaves_alone_what_has_no_partner(lq, gt, lonely, unused):
    found = match_keys(lq, gt)
    assert (found.lonely, found.unused) == (lonely, unused)


def test_real_pairs_are_found(shared_data):
    for task, count in (('derain', 2), ('dehaze', 2)):
        folder = shared_data / 'pairs' / task
        source = {'degradation': 'paired', 'dataroot_gt': str(folder / 'target'), 'dataroot_lq': str(folder / 'input')}
        dataset = CEADataset(options('val', all=source))
        assert len(dataset) == count
        assert all(sample['lq'].shape == sample['gt'].shape for sample in (dataset[i] for i in range(count)))


def test_unmatched_pairs_are_named(image_folder):
    lq, gt = image_folder('lq', ['a', 'b', 'zebra']), image_folder('gt', ['a', 'b', 'zebro', 'c'])
    source = {'degradation': 'paired', 'dataroot_gt': str(gt), 'dataroot_lq': str(lq)}
    with pytest.raises(UserError) as error:
        CEADataset(options(derain=source))
    assert "1 degraded: 'zebra' (nearest: 'zebro')" in str(error.value)
    assert "2 ground truth: 'c' (nearest: 'zebra'), 'zebro' (nearest: 'zebra')" in str(error.value)
    assert "dataset 'set', sources.derain" in str(error.value)


@pytest.mark.parametrize('as_lmdb', [True, False])
def test_pairs_of_unequal_size_are_named(image_folder, tmp_path, as_lmdb):
    roots = image_folder('lq', ['a'], (48, 64)), image_folder('gt', ['a'], (48, 60))
    if as_lmdb:
        roots = [lmdb_of(root, tmp_path / f'{root.name}.lmdb') for root in roots]
    source = {'degradation': 'paired', 'dataroot_lq': str(roots[0]), 'dataroot_gt': str(roots[1])}
    with pytest.raises(UserError, match=r'unequal size .*lq\S*/a\S* is \(48, 64\), \S*gt\S*/a\S* is \(48, 60\)'):
        CEADataset(options(derain=source))


def test_unreadable_files_are_named(image_folder):
    folder = image_folder('gt', ['a', 'b'])
    (folder / 'c.png').write_text('not an image')
    with pytest.raises(UserError, match=r'c\.png: not a picture of'):
        ImageStore(folder)
    (folder / 'c.png').unlink()
    whole = (folder / 'b.png').read_bytes()
    (folder / 'b.png').write_bytes(whole[: len(whole) // 2])
    store = ImageStore(folder)  # the header is whole
    with pytest.raises(UserError, match=r'b\.png: damaged: image file is truncated'):
        store.read('b')


def test_a_crop_larger_than_an_image_is_named(image_folder):
    folder = image_folder('gt', ['small'], (40, 64))
    with pytest.raises(UserError, match=r'gt_size is 48, but \S+small\.png has only 40 x 64 pixels'):
        CEADataset(options(gt_size=48, denoise=noise(folder)))


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ({'degradation': 'pairs'}, "degradation must be one of .*, got 'pairs'. Did you mean 'paired'?"),
        ({'degradation': 'paired'}, r'dataroot_lq is missing'),
        ({'degradation': 'downscale'}, 'sources.x.scale is missing'),
        ({'degradation': 'gaussian_noise', 'sigma': 25}, "unknown key 'sigma'. Did you mean 'sigmas'?"),
        ({'degradation': 'gaussian_noise', 'quantize': 'floor'}, "quantize must be one of trunc, round, got 'floor'"),
        ({'degradation': 'jpeg', 'qualities': [20, 0]}, r'qualities\[1\] must be .*, got 0'),
        ({'degradation': 'defocus', 'radii': -1}, 'radii must be .*, got -1'),
        ({'degradation': 'gaussian_noise', 'repeat': 0}, 'repeat must be a whole number of at least 1, got 0'),
        ({'degradation': 'synthetic', 'tasks': ['fog']}, r"tasks\[0\]: 'fog' is not known. Known: blur"),
        ({'degradation': 'synthetic', 'tasks': ['rain'], 'num_tasks': 2}, 'num_tasks must lie in 1 to 1'),
        ({'degradation': 'gaussian_noise', 'dataroot_gt': 'nowhere'}, "folder 'nowhere' does not exist"),
        (
            {'degradation': 'gaussian_noise', 'io_backend': {'type': 'lmdb'}},
            r"io_backend is lmdb, but the folder is 'gt'",
        ),
        ({'degradation': 'gaussian_noise', 'io_backend': {'type': 'zip'}}, "type must be one of disk, lmdb, got 'zip'"),
    ],
)
def test_bad_options_are_named(image_folder, source, message):
    folder = image_folder('gt', ['a'])
    with pytest.raises(UserError, match=message):
        CEADataset(options(x={'dataroot_gt': str(folder)} | source))


def test_no_sources_and_no_images(tmp_path):
    with pytest.raises(UserError, match='sources must be a mapping of at least one name'):
        CEADataset({'name': 'set', 'phase': 'train', 'gt_size': 8, 'sources': {}})
    with pytest.raises(UserError, match='holds no images'):
        CEADataset(options(x=noise(tmp_path)))


@pytest.mark.parametrize(('sigma', 'psnr'), [(15, 24.833), (25, 20.536), (50, 15.003)])
def test_noise_has_the_literatures_strength(shared_data, sigma, psnr):
    """Input PSNR of CBSD68 as published code sees it: clipped, truncated, cropped to multiples of 16."""
    dataset = CEADataset(options('val', all=noise(shared_data / 'cbsd68', sigmas=sigma)) | {'crop_base': 16})
    errors = [(s['lq'] - s['gt']).double().square().mean().item() for s in (dataset[i] for i in range(68))]
    assert np.mean([-10 * np.log10(error) for error in errors]) == pytest.approx(psnr, abs=0.01)
