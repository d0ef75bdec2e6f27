import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset

from cea_arch.data import prepare
from cea_arch.data.all_in_one_dataset import AllInOneDataset
from cea_arch.data.benchmarks import BENCHMARKS, CDD11_CLASSES
from cea_arch.data.check import check_sets, in_order
from cea_arch.data.image_store import ImageStore, decode, open_lmdb
from cea_arch.data.pairing import pair_keys
from cea_arch.data.read_speed import main as read_speed_main
from cea_arch.data.recognise import scan
from cea_arch.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE = 'GOPR0372_07_00'


def both(gt, lq):
    """Paths of ground truths and degraded images, as two lists."""
    return gt.split(), lq.split()


# by set and split: the layout's name, ground truths, degraded images; all in the names that are published
RAW = {
    ('BSD400', 'train'): ('raw', both('BSD400/8068.jpg BSD400/117025.jpg', '')),
    ('WED', 'train'): ('raw', both('exploration_database_and_code/pristine_images/00001.bmp', '')),
    ('CBSD68', 'test'): ('raw', both('CBSD68/original_png/3096.png CBSD68/original_png/101085.png', '')),
    ('Kodak24', 'test'): ('raw', both('Kodak24/kodim01.png', '')),
    ('Urban100', 'test'): ('raw', both('Urban100/img_001.png', '')),
    ('RainTrainL', 'train'): (
        'raw, one folder',
        both('RainTrainL/norain-1.png RainTrainL/norain-10.png', 'RainTrainL/rain-1.png RainTrainL/rain-10.png'),
    ),
    ('Rain100L', 'test'): (
        'raw, one folder',
        both(
            'Rain100L/norain-001.png Rain100L/norain-002.png', 'Rain100L/rainy/rain-001.png Rain100L/rainy/rain-002.png'
        ),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'raw',
        both('OTS_BETA/clear/0025.jpg', 'OTS_BETA/hazy/part1/0025_0.8_0.04.jpg OTS_BETA/hazy/part4/0025_1_0.2.jpg'),
    ),
    ('SOTS-outdoor', 'test'): (
        'MoCE-IR, raw',
        both('SOTS/outdoor/gt/0001.png', 'SOTS/outdoor/hazy/0001_0.8_0.2.jpg SOTS/outdoor/hazy/0001_0.9_0.1.jpg'),
    ),
    ('GoPro', 'train'): (
        'raw',
        both(
            'GOPRO_Large/train/GOPR0372_07_00/sharp/000047.png GOPRO_Large/train/GOPR0374_11_00/sharp/000047.png',
            'GOPRO_Large/train/GOPR0372_07_00/blur/000047.png GOPRO_Large/train/GOPR0374_11_00/blur/000047.png',
        ),
    ),
    ('GoPro', 'test'): (
        'raw',
        both('GOPRO_Large/test/GOPR0384_11_00/sharp/000001.png', 'GOPRO_Large/test/GOPR0384_11_00/blur/000001.png'),
    ),
    ('LOL-v1', 'train'): ('raw', both('LOL/our485/high/2.png', 'LOL/our485/low/2.png')),
    ('LOL-v1', 'test'): ('raw', both('LOL/eval15/high/1.png', 'LOL/eval15/low/1.png')),
}
PROMPTIR = {
    ('BSD400', 'train'): ('PromptIR, AdaIR, DFPIR', both('Train/Denoise/a8068.jpg Train/Denoise/a117025.jpg', '')),
    ('WED', 'train'): ('PromptIR, AdaIR, DFPIR', both('Train/Denoise/00001.bmp Train/Denoise/04744.bmp', '')),
    ('CBSD68', 'test'): ('PromptIR, AdaIR, DFPIR', both('test/denoise/bsd68/3096.jpg', '')),
    ('RainTrainL', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both('Train/Derain/gt/norain-1.png', 'Train/Derain/rainy/rain-1.png'),
    ),
    ('Rain100L', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/derain/Rain100L/target/1.png', 'test/derain/Rain100L/input/1.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both(
            'Train/Dehaze/original/0025.png',
            'Train/Dehaze/synthetic/part1/0025_0.8_0.04.jpg Train/Dehaze/synthetic/part2/0025_1_0.2.jpg',
        ),
    ),
    ('SOTS-outdoor', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/dehaze/target/0001.png', 'test/dehaze/input/0001_0.8_0.2.jpg'),
    ),
    ('GoPro', 'train'): (
        'AdaIR',
        both('Train/Deblur/sharp/GOPR0372_07_00_000047.png', 'Train/Deblur/blur/GOPR0372_07_00_000047.png'),
    ),
    ('GoPro', 'test'): (
        'AdaIR',
        both('test/deblur/gopro/target/GOPR0384_11_00_000001.png', 'test/deblur/gopro/input/GOPR0384_11_00_000001.png'),
    ),
    ('LOL-v1', 'train'): ('AdaIR', both('Train/Enhance/gt/2.png', 'Train/Enhance/low/2.png')),
    ('LOL-v1', 'test'): ('AdaIR', both('test/enhance/lol/target/1.png', 'test/enhance/lol/input/1.png')),
}
MOCE = {
    ('BSD400', 'train'): ('MoCE-IR', both('denoising/BSD400/8068.jpg', '')),
    ('WED', 'train'): ('MoCE-IR', both('denoising/WaterlooED/00001.bmp', '')),
    ('CBSD68', 'test'): ('MoCE-IR', both('denoising/cBSD68/original_png/0000.png', '')),
    ('RainTrainL', 'train'): (
        'MoCE-IR',
        both('deraining/RainTrainL/gt/norain-1.png', 'deraining/RainTrainL/rainy/rain-1.png'),
    ),
    ('Rain100L', 'test'): (
        'MoCE-IR',
        both('deraining/Rain100L/gt/norain-001.png', 'deraining/Rain100L/rainy/rain-001.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'MoCE-IR',
        both('dehazing/RESIDE/clear/0025.jpg', 'dehazing/RESIDE/part1/0025_0.8_0.04.jpg'),
    ),
    ('SOTS-outdoor', 'test'): (
        'MoCE-IR, raw',
        both('dehazing/SOTS/outdoor/gt/0001.png', 'dehazing/SOTS/outdoor/hazy/0001_0.8_0.2.jpg'),
    ),
    ('GoPro', 'train'): (
        'MoCE-IR, Restormer (crops)',
        both(
            'deblurring/GoPro/crop/train/target_crops/GOPR0372_07_00_000047-1.png',
            'deblurring/GoPro/crop/train/input_crops/GOPR0372_07_00_000047-1.png',
        ),
    ),
    ('GoPro', 'test'): (
        'MoCE-IR, Restormer',
        both(
            'deblurring/GoPro/test/target/GOPR0384_11_00_000001.png',
            'deblurring/GoPro/test/input/GOPR0384_11_00_000001.png',
        ),
    ),
    ('LOL-v1', 'train'): ('MoCE-IR', both('llie/LOLv1/Train/target/2.png', 'llie/LOLv1/Train/input/2.png')),
    ('LOL-v1', 'test'): ('MoCE-IR', both('llie/LOLv1/Test/target/1.png', 'llie/LOLv1/Test/input/1.png')),
}
DFPIR = {
    ('Rain100L', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/derain/Rain100L/target/norain-001.png', 'test/derain/Rain100L/input/rain-001.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both('Train/Dehaze/original/0025.jpg', 'Train/Dehaze/synthetic/0025_0.8_0.04.jpg'),
    ),
    ('GoPro', 'train'): (
        'DFPIR',
        both('GOPRO_Large/train/sharp/GOPR0372_07_00_000047.png', 'GOPRO_Large/train/blur/GOPR0372_07_00_000047.png'),
    ),
    ('GoPro', 'test'): (
        'DFPIR',
        both('GOPRO_Large/test/sharp/GOPR0384_11_00_000001.png', 'GOPRO_Large/test/blur/GOPR0384_11_00_000001.png'),
    ),
    ('LOL-v1', 'train'): ('DFPIR', both('train485/high/2.png', 'train485/low/2.png')),
    ('LOL-v1', 'test'): ('DFPIR', both('test15/high/1.png', 'test15/low/1.png')),
}


@pytest.fixture
def plant(tmp_path, photograph):
    """Writes an image file below ``raw``: another crop of a photograph for each ``content`` (by default the path)."""
    contents = {}

    def write(path, content=None, size=(24, 32)):
        number = contents.setdefault(content or path, len(contents))
        top, left = divmod(number, 40)
        crop = photograph[5 * top :, 10 * left :][: size[0], : size[1], ::-1]
        file = tmp_path / 'raw' / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(cv2.imencode(file.suffix, crop)[1].tobytes())
        return file

    return write


def plant_tree(plant, tree):
    for _, (gt, lq) in tree.values():
        for path in (*gt, *lq):
            plant(path)


@pytest.fixture
def small_benchmarks(monkeypatch):
    """Lets a tree of a few images count as complete: ``small_benchmarks('AIO-5', RAW)``."""

    def shrink(benchmark, tree):
        counts = {key: len(lq or gt) for key, (_, (gt, lq)) in tree.items()}
        sets = [
            dataclasses.replace(one, expected=counts[one.name, one.split])
            for one in BENCHMARKS[benchmark]
            if (one.name, one.split) in counts
        ]
        monkeypatch.setitem(BENCHMARKS, benchmark, sets)

    return shrink


def read(path):
    return decode(path.read_bytes(), str(path))


def run(benchmark, tmp_path, *more):
    return prepare.main(benchmark, ['--raw', str(tmp_path / 'raw'), '--output', str(tmp_path / 'out'), *more])


@pytest.mark.parametrize('tree', [RAW, PROMPTIR, MOCE, DFPIR], ids=['raw', 'promptir', 'moce', 'dfpir'])
def test_layouts_are_recognised(plant, tmp_path, tree):
    plant_tree(plant, tree)
    for junk in ('.DS_Store', 'Thumbs.db', 'GOPRO_Large/readme.txt'):
        (tmp_path / 'raw' / junk).parent.mkdir(exist_ok=True)
        (tmp_path / 'raw' / junk).write_bytes(b'junk')
    plant('__MACOSX/BSD400/9999.jpg')
    plant('BSD400/._8068.jpg')
    plant(f'GOPRO_Large/train/{SEQUENCE}/blur_gamma/000047.png')
    checked = check_sets(BENCHMARKS['AIO-5'], scan([tmp_path / 'raw']), workers=2)
    for one in checked:
        key = one.found.image_set.name, one.found.image_set.split
        if key not in tree:
            assert one.verdict() == 'absent'
            continue
        layout, (gt, lq) = tree[key]
        assert (key, one.found.layout.name) == (key, layout)
        assert (key, len(one.pairs[one.roles[0]])) == (key, len(lq or gt))
        assert not one.faults


@pytest.mark.parametrize(
    ('layout', 'folder', 'name'),
    [
        ('raw', 'CDD-11_{}/<role>', '00002'),
        ('MoCE-IR', 'cdd11/{}/<role>', '00002'),
        ('BioIR', 'CDD/{}/input', '<role>_00002'),
    ],
)
def test_cdd11_is_recognised(plant, tmp_path, small_benchmarks, capsys, layout, folder, name):
    for split in ('train', 'test'):
        for role in CDD11_CLASSES:
            path = f'{folder.format(split)}/{name}.png'.replace('<role>', role)
            plant(path)
        plant(f'{folder.format(split).replace("input", "clear")}/00002.png'.replace('<role>', 'clear'))
    small_benchmarks('CDD-11', {('CDD-11', 'train'): ('', ('x', '')), ('CDD-11', 'test'): ('', ('x', ''))})
    assert run('CDD-11', tmp_path) == 0
    output = capsys.readouterr().out
    assert all(f'CDD-11 (test) {role} ' in output for role in CDD11_CLASSES)
    assert output.count(f'  {layout} ') == 22
    for split in ('train', 'test'):
        for role in ('clear', *CDD11_CLASSES):
            assert list(ImageStore(tmp_path / f'out/cdd11/{split}/{role}.lmdb').sizes) == ['00002']


def test_planted_faults_are_found_and_named(plant, tmp_path, capsys, small_benchmarks):
    small_benchmarks('AIO-5', RAW)
    plant_tree(plant, RAW)
    raw = tmp_path / 'raw'
    (raw / 'RainTrainL/rain-10.png').rename(raw / 'RainTrainL/rain-11.png')
    plant('Rain100L/rainy/rain-002.png', size=(24, 30))
    whole = (raw / 'LOL/our485/low/2.png').read_bytes()
    (raw / 'LOL/our485/low/2.png').write_bytes(whole[: len(whole) // 2])
    (raw / 'SOTS/outdoor/hazy/0001_0.9_0.1.jpg').write_bytes(b'')
    image = cv2.imread(str(raw / 'CBSD68/original_png/3096.png'))
    cv2.imwrite(str(raw / 'BSD400/8068.bmp'), image)  # a test image among the training images, in another format
    (raw / 'BSD400/8068.jpg').unlink()
    (raw / 'WED').mkdir()
    (raw / 'exploration_database_and_code/pristine_images/00001.bmp').rename(raw / 'WED/00001.BMP')
    (raw / 'WED/.DS_Store').write_bytes(b'junk')
    plant('LOL/eval15/low/1.jpg', 'another picture')
    assert run('AIO-5', tmp_path, '--check') == 1
    output = capsys.readouterr().out
    for expected in (
        "RainTrainL (train): unmatched: lq without a partner: 'rain-11' (nearest: 'norain-1",
        "RainTrainL (train): unmatched: gt without a partner: 'norain-10' (nearest: 'rain-1",
        'rain-002.png (24, 30) and',
        'norain-002.png (24, 32) (height, width).',
        f'LOL-v1 (train): unreadable: {raw}/LOL/our485/low/2.png.',
        f'SOTS-outdoor (test): unreadable: {raw}/SOTS/outdoor/hazy/0001_0.9_0.1.jpg.',
        f'BSD400 (train): duplicates: {raw}/BSD400/8068.bmp is {raw}/CBSD68/original_png/3096.png of CBSD68 (test).',
        'LOL-v1 (test): twice: ',
    ):
        assert expected in output
    verdicts = {line.split('  ')[0]: line.split()[-1] for line in output.splitlines()[1:14]}
    fine = {
        'WED (train)',
        'RESIDE-beta OTS (train)',
        'GoPro (train)',
        'GoPro (test)',
        'CBSD68 (test)',
        'Kodak24 (test)',
    }
    assert {name for name, verdict in verdicts.items() if verdict == 'ok'} == fine | {'Urban100 (test)'}
    assert not (tmp_path / 'out').exists()
    assert run('AIO-5', tmp_path) == 1
    assert not (tmp_path / 'out').exists()


def test_what_is_good_is_written_on_demand(plant, tmp_path, capsys, small_benchmarks):
    small_benchmarks('AIO-3', RAW)
    plant_tree(plant, RAW)
    (tmp_path / 'raw/RainTrainL/rain-10.png').unlink()
    (tmp_path / 'raw/Urban100/img_001.png').unlink()
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
    assert 'RainTrainL (train): incomplete. To be had at https://' in capsys.readouterr().out
    train = tmp_path / 'out/aio/train'
    assert list(ImageStore(train / 'raintrainl_lq.lmdb').sizes) == list(ImageStore(train / 'raintrainl_gt.lmdb').sizes)
    assert list(ImageStore(train / 'bsd400_wed.lmdb').sizes) == ['00001', '117025', '8068']
    assert not (tmp_path / 'out/aio/test/urban100.lmdb').exists()


def test_an_absent_set_says_where_it_is_to_be_had(plant, tmp_path, capsys):
    plant('BSD400/8068.jpg')
    assert run('AIO-3', tmp_path, '--check') == 1
    output = capsys.readouterr().out
    assert 'WED (train): absent. To be had at https://ece.uwaterloo.ca/~k29ma/exploration/' in output
    assert 'Kodak24 (test): absent (optional). To be had at' in output
    assert output.count('licence: ') == 9


def test_lmdbs_hold_the_files_pair_exactly_and_store_each_ground_truth_once(plant, tmp_path, small_benchmarks):
    small_benchmarks('AIO-5', RAW)
    plant_tree(plant, RAW)
    assert run('AIO-5', tmp_path) == 0
    out = tmp_path / 'out/aio'
    stores = {path.stem: ImageStore(path) for path in [*out.glob('train/*.lmdb'), *out.glob('test/rain*.lmdb')]}
    assert list(stores['ots_lq'].sizes) == ['0025_0.8_0.04', '0025_1_0.2']
    assert list(stores['ots_gt'].sizes) == ['0025']
    assert list(stores['gopro_lq'].sizes) == ['GOPR0372_07_00_000047', 'GOPR0374_11_00_000047']
    source = tmp_path / 'raw/OTS_BETA/hazy/part4/0025_1_0.2.jpg'
    assert stores['ots_lq'].read_bytes('0025_1_0.2') == source.read_bytes()
    for name in ('ots', 'gopro', 'raintrainl', 'lol', 'rain100l'):
        lq, gt = stores[f'{name}_lq'], stores[f'{name}_gt']
        assert len(pair_keys(lq.sizes, gt.sizes, name)) == len(lq.sizes)
        options = {'degradation': 'paired', 'dataroot_lq': str(lq.root), 'dataroot_gt': str(gt.root)}
        dataset = AllInOneDataset({'name': name, 'phase': 'val', 'sources': {'all': options}})
        assert len([dataset[i] for i in range(len(dataset))]) == len(lq.sizes)
        if name != 'ots':
            assert list(lq.sizes) == list(gt.sizes)
    gt = read(tmp_path / 'raw/RainTrainL/norain-10.png')
    assert np.array_equal(stores['raintrainl_gt'].read('rain-10'), gt)


def test_basicsrs_own_dataset_reads_one_to_one_sets(plant, tmp_path, small_benchmarks):
    small_benchmarks('AIO-5', RAW)
    plant_tree(plant, RAW)
    assert run('AIO-5', tmp_path) == 0
    for name, source in {
        'train/raintrainl': 'RainTrainL/norain-1.png',
        'test/rain100l': 'Rain100L/norain-001.png',
        'train/gopro': f'GOPRO_Large/train/{SEQUENCE}/sharp/000047.png',
        'train/lol': 'LOL/our485/high/2.png',
    }.items():
        roots = {f'dataroot_{side}': str(tmp_path / f'out/aio/{name}_{side}.lmdb') for side in ('lq', 'gt')}
        options = {'name': 's', 'type': 'PairedImageDataset', 'phase': 'val', 'scale': 1, **roots}
        dataset = build_dataset(options | {'io_backend': {'type': 'lmdb'}})
        assert np.array_equal(
            np.rint(dataset[0]['gt'].numpy().transpose(1, 2, 0) * 255), read(tmp_path / 'raw' / source)
        )


def test_the_same_command_again_writes_nothing(plant, tmp_path, small_benchmarks, capsys):
    small_benchmarks('AIO-3', RAW)
    plant_tree(plant, RAW)
    assert run('AIO-3', tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*.mdb') if path.name == 'data.mdb'}
    assert run('AIO-3', tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    plant('BSD400/8068.jpg', 'another picture')
    capsys.readouterr()
    assert run('AIO-3', tmp_path) == 2
    assert "bsd400_wed.lmdb exists and holds another '8068'" in capsys.readouterr().err
    assert run('AIO-3', tmp_path, '--overwrite') == 0


def test_sets_in_several_folders_and_copies(plant, tmp_path, capsys):
    for path in ('a/OTS/part1/0025_0.8_0.04.jpg', 'b/OTS/part2/0026_0.8_0.04.jpg', 'b/OTS/part2/0025_0.8_0.04.jpg'):
        plant(path, path.rpartition('/')[2])
    for path in ('a/OTS/clear/0025.png', 'b/OTS/clear/0026.png', 'c/SOTS/outdoor/gt/0025.png'):
        plant(path)
    plant('c/SOTS/outdoor/hazy/0025_0.8_0.2.jpg', 'a/OTS/clear/0025.png')
    sets = [one for one in BENCHMARKS['AIO-3'] if one.name in ('RESIDE-beta OTS', 'SOTS-outdoor')]
    ots, sots = check_sets(sets, scan([tmp_path / 'raw' / name for name in 'abc']), workers=1)
    assert len(ots.pairs['lq']) == 2
    assert ots.notes == ['1 copies of the same images are left aside.']
    assert sots.notes == ['1 scene ids occur in RESIDE-beta OTS too, which is known; the literature keeps both.']
    assert not ots.faults


def test_pixels_shared_by_ots_and_sots_are_a_note(plant, tmp_path):
    for path in ('OTS/part1/0025_0.8_0.04.png', 'SOTS/outdoor/hazy/0001_0.8_0.2.png'):
        plant(path, 'the same')
    for path in ('OTS/clear/0025.png', 'SOTS/outdoor/gt/0001.png'):
        plant(path)
    sets = [one for one in BENCHMARKS['AIO-3'] if one.name in ('RESIDE-beta OTS', 'SOTS-outdoor')]
    ots, _ = check_sets(sets, scan([tmp_path / 'raw']), workers=1)
    assert ots.notes == ['1 images have the pixels of a SOTS-outdoor image; the literature keeps them.']
    assert len(ots.pairs['lq']) == 1
    assert not ots.faults


def test_a_bad_scene_of_cdd11_is_left_out_of_every_class(plant, tmp_path, capsys):
    for role in ('clear', 'low', 'haze'):
        for name in ('00001', '00002', '00003'):
            plant(f'CDD-11_test/{role}/{name}.png')
    (tmp_path / 'raw/CDD-11_test/haze/00002.png').unlink()
    plant('CDD-11_train/clear/00009.png', 'CDD-11_test/clear/00003.png')
    plant('CDD-11_train/low/00009.png')
    assert run('CDD-11', tmp_path, '--allow-partial') == 0
    output = capsys.readouterr().out
    assert "scenes that are not good in every role are left out of all: '00002'" in output
    assert 'CDD-11 (test): unmatched: no images of rain found.' in output
    assert 'CDD-11 (train): duplicates: ' in output
    for role in ('clear', 'low', 'haze'):
        assert list(ImageStore(tmp_path / f'out/cdd11/test/{role}.lmdb').sizes) == ['00001', '00003']
    assert not (tmp_path / 'out/cdd11/train').exists()


def test_a_photograph_on_its_side_has_the_size_it_decodes_to(plant, tmp_path):
    from PIL import Image

    plant('LOL/eval15/high/1.png', size=(24, 32))
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / 'raw/LOL/eval15/low').mkdir()
    Image.new('RGB', (24, 32)).save(tmp_path / 'raw/LOL/eval15/low/1.jpg', exif=exif)
    lol = [one for one in BENCHMARKS['AIO-5'] if (one.name, one.split) == ('LOL-v1', 'test')]
    (checked,) = check_sets(lol, scan([tmp_path / 'raw']), workers=1)
    assert checked.pairs['lq'] == [('1', '1')]
    assert not checked.faults


def test_gopro_crops(plant, tmp_path, small_benchmarks, monkeypatch):
    monkeypatch.setattr(prepare, 'CROP_SIZE', 16)
    monkeypatch.setattr(prepare, 'CROP_OVERLAP', 8)
    small_benchmarks('AIO-5', {key: value for key, value in RAW.items() if key[0] == 'GoPro'})
    plant_tree(plant, {key: value for key, value in RAW.items() if key[0] == 'GoPro'})
    assert run('AIO-5', tmp_path, '--gopro-crops') == 0
    stores = [ImageStore(tmp_path / f'out/aio/train/gopro_crops_{side}.lmdb') for side in ('lq', 'gt')]
    assert list(stores[0].sizes) == list(stores[1].sizes)
    assert len(stores[0].sizes) == 2 * 2 * 3  # frames, rows, columns of 24 x 32 pixels
    frame = read(tmp_path / f'raw/GOPRO_Large/train/{SEQUENCE}/blur/000047.png')
    assert np.array_equal(stores[0].read(f'{SEQUENCE}_000047_s006'), frame[8:, 16:])
    assert (tmp_path / 'out/aio/test/gopro_lq.lmdb').is_dir()
    assert not (tmp_path / 'out/aio/train/gopro_lq.lmdb').exists()


def test_a_720p_frame_gives_the_literatures_eight_crops():
    frame = cv2.imencode('.png', np.zeros((720, 1280, 3), np.uint8))[1].tobytes()
    crops = [decode(data, key) for key, data in prepare.cut('frame', frame, 'frame')]
    assert [crop.shape for crop in crops] == [(512, 512, 3)] * 8
    assert [prepare._starts(size) for size in (1280, 720, 512, 100)] == [[0, 256, 512, 768], [0, 208], [0], [0]]


KILLED = """
    import sys, time
    from pathlib import Path
    from cea_arch.data import lmdb_writer, prepare
    lmdb_writer._BATCH_SIZE = 1
    put = lmdb_writer._put
    def slowly(*args):
        put(*args)
        time.sleep(0.05)
    lmdb_writer._put = slowly
    sys.exit(prepare.main('AIO-3', sys.argv[1:]))
"""


def test_kill_in_the_middle_of_writing_and_the_same_command_again(plant, tmp_path, capsys):
    for number in range(60):
        plant(f'BSD400/{number + 1}.png')
    command = ['--raw', str(tmp_path / 'raw'), '--output', str(tmp_path / 'out'), '--allow-partial']
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(KILLED), *command],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    aside = tmp_path / 'out/aio/train/bsd400_wed.lmdb.tmp'
    deadline = time.monotonic() + 60
    while not (aside / 'data.mdb').is_file() or (aside / 'data.mdb').stat().st_size < 60_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not aside.with_suffix('').exists()

    assert prepare.main('AIO-3', command) == 0
    output = capsys.readouterr().out
    kept = int(output.partition('verified, ')[2].split()[0])
    assert 0 < kept < 60
    assert 'bsd400_wed.lmdb: 60 images, complete and verified' in output
    store = ImageStore(aside.with_suffix(''))
    assert len(store.sizes) == open_lmdb(store.root).stat()['entries'] == 60
    for key in store.sizes:
        assert store.read_bytes(key) == (tmp_path / f'raw/BSD400/{key}.png').read_bytes()
    assert not aside.exists()


def test_real_photographs_the_whole_way(shared_data, tmp_path, capsys):
    raw = tmp_path / 'raw'
    (raw / 'dehaze').mkdir(parents=True)
    (raw / 'BSD400').symlink_to(shared_data / 'bsd400')
    (raw / 'CBSD68').symlink_to(shared_data / 'cbsd68')
    (raw / 'Rain100L').symlink_to(shared_data / 'pairs/derain')
    for side in ('input', 'target'):
        (raw / 'dehaze' / side).symlink_to(shared_data / 'pairs/dehaze' / side)
    assert run('AIO-3', tmp_path, '--check') == 1
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
    output = capsys.readouterr().out
    assert output.count('BSD400 (train) ') == 2
    counts = {path.stem: len(ImageStore(path).sizes) for path in (tmp_path / 'out').rglob('*.lmdb')}
    assert counts == {
        'bsd400_wed': 400,
        'cbsd68': 68,
        **{f'{name}_{side}': 2 for name in ('rain100l', 'sots') for side in ('lq', 'gt')},
    }


def test_mistakes_are_named(plant, tmp_path, capsys, monkeypatch):
    assert prepare.main('AIO-3', ['--raw', 'nowhere']) == 2
    assert "folder 'nowhere' does not exist" in capsys.readouterr().err
    plant('holiday/1.jpg')
    assert run('AIO-3', tmp_path, '--workers', '0') == 2
    assert '--workers must be at least 1, got 0' in capsys.readouterr().err
    assert run('AIO-3', tmp_path, '--allow-partial') == 2
    assert 'no images of its sets found below' in capsys.readouterr().err
    plant('BSD400/1.jpg')
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda _: SimpleNamespace(free=10))
    assert run('AIO-3', tmp_path, '--allow-partial') == 2
    assert 'has 0.0 GB free, the images need' in capsys.readouterr().err


def test_in_order_stays_a_few_items_ahead_and_passes_errors_on():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = in_order(lambda number: number * number, items(), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 8
    assert list(results) == [number * number for number in range(3, 100)]
    with pytest.raises(UserError, match='cannot be decoded'):
        list(in_order(lambda data: decode(data, 'x'), [b''], workers=2))


@pytest.mark.parametrize(('name', 'benchmark'), [('aio3', 'AIO-3'), ('aio5', 'AIO-5'), ('cdd11', 'CDD-11')])
def test_recipes_read_what_the_scripts_write(name, benchmark):
    recipe = (ROOT / f'options/cea_{name}.yml').read_text('utf-8')
    read_there = set(re.findall(r'datasets/(\S+\.lmdb)', recipe))
    written = {f'{one.store.replace("<role>", role)}.lmdb' for one in BENCHMARKS[benchmark] for role in one.roles}
    assert read_there
    assert read_there <= written


@pytest.mark.parametrize('name', ['aio3', 'aio5', 'cdd11'])
def test_scripts_run_from_anywhere(name, tmp_path):
    script = ROOT / f'datasets_prep/prepare_{name}.py'
    done = subprocess.run(
        [sys.executable, str(script), '--raw', 'nowhere'], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "folder 'nowhere' does not exist" in done.stderr


def test_read_benchmark(plant, tmp_path, capsys):
    for number in range(3):
        plant(f'photos/{number}.png')
    options = ['--gt-size', '16', '--rounds', '1']
    assert read_speed_main(['--images', str(tmp_path / 'raw/photos'), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['store', 'files', 'LMDB']
    assert read_speed_main(['--images', 'nowhere']) == 2
    assert "folder 'nowhere' does not exist" in capsys.readouterr().err
