"""Raw sets are recognised in every layout, and every planted fault is found and named."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import pytest

from cea_arch.data import prepare
from cea_arch.data.benchmarks import BENCHMARKS, CDD11_CLASSES
from cea_arch.data.check import check_sets
from cea_arch.data.image_store import ImageStore
from cea_arch.data.recognise import scan
from tests.data.raw_trees import AIRNET, DFPIR, KAGGLE, MOCE, PROMPTIR, RAW, SEQUENCE, plant_tree, run

TREES = {'raw': RAW, 'promptir': PROMPTIR, 'moce': MOCE, 'dfpir': DFPIR, 'kaggle': KAGGLE, 'airnet': AIRNET}


@pytest.mark.parametrize('tree', TREES.values(), ids=TREES)
def test_layouts_are_recognised(plant, tmp_path, tree):
    plant_tree(plant, tree)
    for junk in ('.DS_Store', 'Thumbs.db', 'GOPRO_Large/readme.txt'):
        (tmp_path / 'raw' / junk).parent.mkdir(exist_ok=True)
        (tmp_path / 'raw' / junk).write_bytes(b'junk')
    plant('__MACOSX/BSD400/9999.jpg')
    plant('BSD400/._8068.jpg')
    plant('BSD400/.ipynb_checkpoints/8068-checkpoint.jpg')
    plant('@eaDir/BSD400/9998.jpg')
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


@pytest.mark.parametrize('below', ['.', 'SOTS', 'SOTS/outdoor', 'SOTS/outdoor/gt'])
def test_a_set_is_recognised_from_a_level_too_high_or_too_low(plant, tmp_path, below):
    plant('deep/down/SOTS/outdoor/gt/0001.png')
    plant('deep/down/SOTS/outdoor/hazy/0001_0.8_0.2.jpg', 'deep/down/SOTS/outdoor/gt/0001.png', version=1)
    (sots,) = [one for one in BENCHMARKS['AIO-3'] if one.name == 'SOTS-outdoor']
    (found,) = check_sets([sots], scan([tmp_path / 'raw/deep/down' / below]), workers=1)
    assert len(found.pairs['lq']) == (0 if below.endswith('gt') else 1)
    assert found.found.layout.name == 'MoCE-IR, raw'


def test_a_link_that_is_walked_first_does_not_hide_the_real_folder(plant, tmp_path):
    plant('z/CBSD68/3096.png')
    (tmp_path / 'raw/a').symlink_to(tmp_path / 'raw/z/CBSD68')
    places = scan([tmp_path / 'raw'])
    assert [place.rpartition('raw/')[2] for place in places.images] == ['z/CBSD68/']


def test_the_release_is_said(plant, tmp_path):
    for name, version in (('target', 0), ('input', 1)):
        plant(f'test/derain/Rain100L/{name}/1.png', 'same', version=version)
    (rain,) = [one for one in BENCHMARKS['AIO-3'] if one.name == 'Rain100L']
    assert rain.releases.keys() == {200}
    rain = replace(rain, expected=0, releases={1: 'another release'})
    (found,) = check_sets([rain], scan([tmp_path / 'raw']), workers=1)
    assert (found.verdict(), found.notes) == ('more', ['1 pairs: this is another release.'])


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
            plant(path, split, version=1)
        plant(f'{folder.format(split).replace("input", "clear")}/00002.png'.replace('<role>', 'clear'), split)
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
    plant('Rain100L/rainy/rain-002.png', 'Rain100L/norain-002.png', size=(24, 30), version=1)
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


def test_sets_in_several_folders_and_copies(plant, tmp_path, capsys):
    for path in ('a/OTS/part1/0025_0.8_0.04.jpg', 'b/OTS/part2/0026_0.8_0.04.jpg', 'b/OTS/part2/0025_0.8_0.04.jpg'):
        plant(path, path.rpartition('/')[2][:4], version=1)
    for path in ('a/OTS/clear/0025.png', 'b/OTS/clear/0026.png'):
        plant(path, path[-8:-4])
    plant('c/SOTS/outdoor/gt/0025.png')
    plant('c/SOTS/outdoor/hazy/0025_0.8_0.2.jpg', 'c/SOTS/outdoor/gt/0025.png', version=1)
    sets = [one for one in BENCHMARKS['AIO-3'] if one.name in ('RESIDE-beta OTS', 'SOTS-outdoor')]
    ots, sots = check_sets(sets, scan([tmp_path / 'raw' / name for name in 'abc']), workers=1)
    assert len(ots.pairs['lq']) == 2
    assert ots.notes == ['1 copies of the same images are left aside.']
    assert sots.notes == ['1 scene ids occur in RESIDE-beta OTS too, which is known; the literature keeps both.']
    assert not ots.faults


def test_pixels_shared_by_ots_and_sots_are_a_note(plant, tmp_path):
    for path in ('OTS/part1/0025_0.8_0.04.png', 'SOTS/outdoor/hazy/0001_0.8_0.2.png'):
        plant(path, 'the same', version=1)
    plant('OTS/clear/0025.png', 'the same')
    plant('SOTS/outdoor/gt/0001.png', 'the same', version=-1)
    sets = [one for one in BENCHMARKS['AIO-3'] if one.name in ('RESIDE-beta OTS', 'SOTS-outdoor')]
    ots, _ = check_sets(sets, scan([tmp_path / 'raw']), workers=1)
    assert ots.notes == ['1 images have the pixels of one of SOTS-outdoor (test); the literature keeps them.']
    assert len(ots.pairs['lq']) == 1
    assert not ots.faults


def test_a_bad_scene_of_cdd11_is_left_out_of_every_class(plant, tmp_path, capsys):
    for role in ('clear', 'low', 'haze'):
        for name in ('00001', '00002', '00003'):
            plant(f'CDD-11_test/{role}/{name}.png', name, version=role != 'clear')
    (tmp_path / 'raw/CDD-11_test/haze/00002.png').unlink()
    plant('CDD-11_train/clear/00009.png', '00003')
    plant('CDD-11_train/low/00009.png', '00003', version=2)
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
    upright = Image.open(tmp_path / 'raw/LOL/eval15/high/1.png').point(lambda value: value // 4)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'raw/LOL/eval15/low/1.jpg', exif=exif)
    lol = [one for one in BENCHMARKS['AIO-5'] if (one.name, one.split) == ('LOL-v1', 'test')]
    (checked,) = check_sets(lol, scan([tmp_path / 'raw']), workers=1)
    assert checked.pairs['lq'] == [('1', '1')]
    assert not checked.faults


def test_mistakes_are_named(plant, tmp_path, capsys, monkeypatch):
    assert prepare.main('AIO-3', ['--raw', 'nowhere']) == 2
    assert "folder 'nowhere' does not exist" in capsys.readouterr().err
    plant('holiday/1.jpg')
    assert run('AIO-3', tmp_path, '--workers', '0') == 2
    assert '--workers must be at least 1, got 0' in capsys.readouterr().err
    assert run('AIO-3', tmp_path, '--allow-partial') == 2
    assert 'there is nothing good of its sets below' in capsys.readouterr().err
    plant('BSD400/1.jpg')
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda _: SimpleNamespace(free=10))
    assert run('AIO-3', tmp_path, '--allow-partial') == 2
    assert 'has 0.000 GB free, what is still to be written needs some' in capsys.readouterr().err


def test_why_a_set_is_absent(plant, tmp_path, capsys):
    raw = tmp_path / 'raw'
    plant('SOTS/outdor/hazy/0001_0.8_0.2.jpg')
    plant(f'GOPRO_Large/train/{SEQUENCE}/blur_gamma/000047.png')
    (raw / 'Rain100L.zip').write_bytes(b'PK')
    (raw / 'CBSD68').mkdir()
    (raw / 'CBSD68/3096.png').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    assert run('AIO-5', tmp_path, '--check') == 1
    said = capsys.readouterr().out
    assert (
        f'{raw}/SOTS/outdor/hazy holds 1 images that fit no set; nearest: SOTS-outdoor (test), looked for in ' in said
    )
    assert (
        f'{SEQUENCE}/blur_gamma holds 1 images that fit no set; the papers use the frames of blur, not these.' in said
    )
    assert f'{raw}/Rain100L.zip is an archive: unpack it.' in said
    assert 'CBSD68 (test): note: 1 files are pointers of Git LFS: `git lfs pull` fetches the images.' in said


def test_folders_named_by_hand_and_all_faults_in_a_file(plant, tmp_path, capsys):
    for number in range(9):
        plant(f'mine/clean/{number}.png', str(number))
        if number < 2:
            plant(f'mine/dark/{number}.png', str(number), version=3)
    words = ['--set', 'LOL-v1 (test)', f'{tmp_path}/raw/mine/clean', f'{tmp_path}/raw/mine/dark']
    assert run('AIO-5', tmp_path, '--check', *words, '--details', str(tmp_path / 'all.tsv')) == 1
    assert 'LOL-v1 (test)            by hand  2' in capsys.readouterr().out
    lines = (tmp_path / 'all.tsv').read_text().splitlines()
    assert lines == [f'LOL-v1 (test)\tunmatched\t{tmp_path}/raw/mine/clean/{number}.png' for number in range(2, 9)]
    for words, message in (
        (['LOL-v1', 'a', 'b'], 'is no one set of AIO-5. It is one of LOL-v1 (train), LOL-v1 (test).'),
        (['LOL (test)', 'a', 'b'], "Did you mean 'LOL-v1 (test)'?"),
        (['CBSD68', 'a', 'b'], 'its folders are those of gt.'),
        (['SOTS-outdoor', 'nowhere', 'nowhere'], "folder 'nowhere' does not exist"),
    ):
        assert run('AIO-5', tmp_path, '--check', '--set', *words) == 2
        assert message in capsys.readouterr().err
