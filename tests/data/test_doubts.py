"""The right number of the wrong thing: names and counts of published sets, with something else behind them."""

import dataclasses
import shutil

import cv2
import lmdb
import numpy as np
import pytest

from cea_arch.data import lmdb_writer, prepare
from cea_arch.data.benchmarks import BENCHMARKS, SOTS
from cea_arch.data.check import check_sets
from cea_arch.data.degradations import quantize, synthesize
from cea_arch.data.image_store import ImageStore
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.data.pairing import match_keys, pair_keys
from cea_arch.data.recognise import scan
from cea_arch.errors import UserError
from tests.data.raw_trees import run

COUNT = 6
TASKS = {'Rain100L': 'rain', 'SOTS-outdoor': 'haze', 'GoPro': 'blur', 'LOL-v1': 'low_light'}
PLACES = {
    'Rain100L': ('test/derain/Rain100L/target/{}.png', 'test/derain/Rain100L/input/{}.png'),
    'SOTS-outdoor': ('SOTS/outdoor/gt/{:04}.png', 'SOTS/outdoor/hazy/{:04}_0.8_0.2.png'),
    'GoPro': ('test/deblur/gopro/target/{:06}.png', 'test/deblur/gopro/input/{:06}.png'),
    'LOL-v1': ('LOL/eval15/high/{}.png', 'LOL/eval15/low/{}.png'),
}


@pytest.fixture
def photographs_of_scenes(photographs):
    """Parts of photographs, each of its own scene, RGB."""
    images = [cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1] for data in photographs.values()]
    return [image[top : top + 140, left : left + 190] for image in images for top, left in ((0, 0), (150, 200))]


@pytest.fixture
def pairs_of(photographs_of_scenes, tmp_path):
    """Writes a set of real pairs: ``pairs_of('GoPro', shift=1)`` pairs each picture with the next one's truth."""

    def write(name, shift=0, swap=False):
        for number, clean in enumerate(photographs_of_scenes):
            degraded = quantize(synthesize(clean / 255, [TASKS[name]], np.random.default_rng(number)))
            places = (number + 1, (number + shift) % COUNT + 1)
            for template, key, image in zip(PLACES[name], places, (degraded, clean) if swap else (clean, degraded)):
                path = tmp_path / 'raw' / template.format(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image[..., ::-1])

    return write


def checked(tmp_path, name, split='test', expected=COUNT, trust=False, **changes):
    (image_set,) = [one for one in BENCHMARKS['AIO-5'] if (one.name, one.split) == (name, split)]
    image_set = dataclasses.replace(image_set, **({'expected': expected, 'scenes': None} | changes))
    return check_sets([image_set], scan([tmp_path / 'raw']), workers=1, trust=trust)[0]


@pytest.mark.parametrize('name', PLACES)
def test_real_pairs_are_no_doubt(pairs_of, tmp_path, name):
    pairs_of(name)
    found = checked(tmp_path, name)
    assert found.verdict() == 'ok'
    assert not found.faults


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('shift', [1, 3])
def test_pairs_that_are_shuffled_are_refused_with_examples(pairs_of, tmp_path, name, shift):
    pairs_of(name, shift)
    found = checked(tmp_path, name)
    assert found.verdict() == 'incomplete'
    assert found.pairs['lq'] == []
    (sentence,) = found.faults['doubtful']
    assert sentence.count(' does not show what ') == 3
    assert f' and {COUNT - 3} more' in sentence
    trusted = checked(tmp_path, name, trust=True)
    assert trusted.verdict() == 'ok'
    assert len(trusted.pairs['lq']) == COUNT
    assert trusted.notes[0].startswith('trusted all the same: ')


@pytest.mark.parametrize('name', PLACES)
def test_degraded_and_clean_swapped(pairs_of, tmp_path, name):
    pairs_of(name, swap=True)
    found = checked(tmp_path, name)
    assert found.pairs['lq'] == []
    assert 'degraded and clean seem swapped' in found.faults['doubtful'][0]


def test_one_wrong_pair_is_named_and_left_out(pairs_of, tmp_path):
    pairs_of('LOL-v1')
    low = tmp_path / 'raw/LOL/eval15/low'
    shutil.copyfile(low / '5.png', low / '2.png')
    image = cv2.imread(str(low / '2.png'))
    image[0, 0] ^= 1  # another file, to the letter
    cv2.imwrite(str(low / '2.png'), image)
    found = checked(tmp_path, 'LOL-v1')
    assert [lq for lq, _ in found.pairs['lq']] == ['1', '3', '4', '5', '6']
    assert f'{low}/2.png does not show what' in found.faults['doubtful'][0]
    assert 'high/5.png does' in found.faults['doubtful'][0]


def test_pairs_of_which_no_picture_shows_the_other_are_a_fault_but_kept(pairs_of, tmp_path, photographs_of_scenes):
    pairs_of('LOL-v1')
    for number, image in enumerate(photographs_of_scenes):
        path = tmp_path / f'raw/LOL/eval15/low/{number + 1}.png'
        cv2.imwrite(str(path), np.random.default_rng(number).integers(0, 40, image.shape).astype(np.uint8))
    found = checked(tmp_path, 'LOL-v1')
    assert found.counts['doubtful'] == COUNT
    assert 'low/1.png does not show what' in found.faults['doubtful'][0]
    assert ', but ' not in found.faults['doubtful'][0]
    assert found.verdict() == 'incomplete'
    assert len(found.pairs['lq']) == COUNT  # written on demand, --allow-partial


def test_sots_indoor_is_not_outdoor(plant, tmp_path):
    for scene in (1400, 1401, 1402):
        plant(f'test/dehaze/target/{scene}.png', str(scene), size=(40, 50))
        for number in range(1, 4):
            plant(f'test/dehaze/input/{scene}_{number}.png', str(scene), size=(40, 50), version=number)
    assert SOTS.scenes == 492
    found = checked(tmp_path, 'SOTS-outdoor', expected=9, scenes=8)
    assert found.faults['doubtful'] == ['9 pairs of 3 scenes, where 8 scenes are expected: another set']
    assert found.verdict() == 'incomplete'
    assert found.pairs['lq'] == []
    assert checked(tmp_path, 'SOTS-outdoor', expected=9, scenes=3).verdict() == 'ok'


def test_grey_pictures_where_colour_is_expected(plant, tmp_path):
    for number in range(COUNT):
        file = plant(f'CBSD68/{number}.png')
        image = cv2.imread(str(file))
        image[:] = image[..., :1] if number else image  # one may be
        cv2.imwrite(str(file), image)
    found = checked(tmp_path, 'CBSD68')
    assert found.faults['doubtful'][0].startswith(
        f'{COUNT - 1} of {COUNT} pictures are grey, where colour is expected: '
    )
    assert found.pairs['gt'] == []


def test_copies_do_not_fill_up_a_count(plant, tmp_path):
    for number in range(1, COUNT):
        file = plant(f'Kodak24/kodim{number:02}.png')
    shutil.copyfile(file, file.with_name(f'{file.stem}(1).png'))
    for hidden in ('.ipynb_checkpoints/kodim06-checkpoint.png', '.Trash-1000/files/kodim06.png'):
        plant(f'Kodak24/{hidden}')
    found = checked(tmp_path, 'Kodak24')
    assert 'kodim05.png and' in found.faults['doubtful'][0]
    assert 'are the same picture' in found.faults['doubtful'][0]
    assert len(found.pairs['gt']) == COUNT - 1
    assert found.verdict() == 'incomplete'


def test_cuts_of_training_pictures_are_named_and_not_forbidden(photographs, tmp_path):
    for number, data in enumerate(photographs.values()):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
        for path, part in ((f'BSD400/{number}.png', image), (f'CBSD68/{number}.png', image[37:237, 51:280])):
            if number < 2 or path.startswith('BSD'):
                (tmp_path / 'raw' / path).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / 'raw' / path), part)
    sets = [
        dataclasses.replace(one, expected=n)
        for one in BENCHMARKS['AIO-3']
        for n in (3, 2)
        if one.name in ('BSD400', 'CBSD68')
    ]
    train, test = check_sets([sets[0], sets[3]], scan([tmp_path / 'raw']), workers=1)
    assert (train.verdict(), test.verdict()) == ('ok', 'ok')
    assert train.notes[0].startswith('2 images share a part, to the pixel, with images of CBSD68 (test)')
    raw = tmp_path / 'raw'
    assert f'{raw}/BSD400/0.png and {raw}/CBSD68/0.png' in train.notes[0]


def test_the_targets_of_rain100l_are_found_among_the_training_pictures(shared_data):
    known = dict(
        line.split()[:2]
        for line in (shared_data / 'rain100l_test_bsd_overlap.txt').read_text().splitlines()
        if line.startswith('norain')
    )
    from cea_arch.data.contents import look_at
    from cea_arch.data.image_store import decode

    def places(path, part=np.s_[:]):
        return look_at(decode(path.read_bytes(), str(path))[part], with_places=True).places

    targets = [path for path in sorted((shared_data / 'pairs/rain100l/target').iterdir()) if path.name in known][:8]
    assert len(targets) == 8
    cut = [places(path, np.s_[20:300, 33:400]) for path in targets]
    whole = [places(shared_data / known[path.name]) for path in targets]
    shared = np.array([[len(np.intersect1d(a, b)) for a in cut] for b in whole])
    same = np.array([[known[a.name] == known[b.name] for a in targets] for b in targets])
    assert shared[same].min() >= 40
    assert shared[~same].max() == 0


def test_two_sets_with_pictures_of_one_name_stay_apart(plant, tmp_path):
    plant('BSD400/00001.jpg')
    plant('WED/00001.bmp')
    plant('WED/00002.bmp')
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
    store = ImageStore(tmp_path / 'out/aio/train/bsd400_wed.lmdb')
    assert list(store.sizes) == ['BSD400/00001', 'WED/00001', 'WED/00002']
    assert store.read_bytes('WED/00001') == (tmp_path / 'raw/WED/00001.bmp').read_bytes()


@pytest.mark.parametrize(
    ('lq', 'gt', 'pairs'),
    [
        ([f'{scene}_{k}' for scene in range(1, 41) for k in range(1, 15)], [str(n) for n in range(1, 15)], 14 * 14),
        ([f'{scene}_{k}' for scene in range(1, 41) for k in range(1, 15)], [str(n) for n in range(1, 41)], 40 * 14),
        ([f'{n:04}x4' for n in range(1, 30)], ['0004'], 1),
        ([f'{n:04}x4' for n in range(1, 30)], [f'{n:04}' for n in range(1, 30)], 29),
        ([f'v2_{n:05}' for n in range(1, 9)], [str(n) for n in range(1, 9)], 8),
    ],
)
def test_one_scene_has_one_target(lq, gt, pairs):
    found = match_keys(lq, gt)
    assert len(found.pairs) == pairs
    assert all(one.split('_')[0].lstrip('v0').split('x')[0] in ('2', other.lstrip('0')) for one, other in found.pairs)
    if len(found.pairs) < len(lq):
        with pytest.raises(UserError, match='images without a partner'):
            pair_keys(lq, gt, 'mine')


def test_two_rules_that_differ_are_refused_and_both_shown():
    assert match_keys(['1_x2', '2_x1'], ['1', '2']).pairs == [('1_x2', '1'), ('2_x1', '2')]
    assert match_keys(['a_1', 'b_1'], ['a_1', 'b_1']).conflict == ''
    lq, gt = ['7_3'], ['7', '3']
    assert match_keys(lq, gt).conflict == "'7_3' may belong to '7', or to '3'"
    with pytest.raises(UserError, match="mine: '7_3' may belong to '7', or to '3': name the images so"):
        pair_keys(lq, gt, 'mine')


def images(count=4):
    return [(f'{n}', cv2.imencode('.png', np.full((8, 9, 3), n, np.uint8))[1].tobytes()) for n in range(count)]


def test_a_finished_store_without_its_list_gets_it_again(tmp_path):
    write_lmdb(images(), tmp_path / 'a.lmdb')
    meta = (tmp_path / 'a.lmdb/meta_info.txt').read_text()
    (tmp_path / 'a.lmdb/meta_info.txt').unlink()
    assert write_lmdb(images(), tmp_path / 'a.lmdb').kept == 4
    assert (tmp_path / 'a.lmdb/meta_info.txt').read_text() == meta


@pytest.mark.parametrize(
    'damage', [lambda f: f.write_bytes(f.read_bytes()[:9000]), lambda f: f.write_bytes(bytes(20000))]
)
def test_a_store_that_was_cut_short_is_begun_anew(tmp_path, damage):
    write_lmdb(images(200), tmp_path / 'a.lmdb')
    (tmp_path / 'a.lmdb').rename(tmp_path / 'a.lmdb.tmp')
    damage(tmp_path / 'a.lmdb.tmp/data.mdb')
    with pytest.warns(UserWarning, match=r'a\.lmdb\.tmp is damaged, and is written anew'):
        written = write_lmdb(images(200), tmp_path / 'a.lmdb')
    assert (written.images, written.kept) == (200, 0)
    damage(tmp_path / 'a.lmdb/data.mdb')
    with pytest.raises(UserError, match=r'cut short|is no LMDB'):
        write_lmdb(images(200), tmp_path / 'a.lmdb')


def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(plant, tmp_path, monkeypatch, capsys):
    for number in range(COUNT):
        plant(f'BSD400/{number}.png')
    put = lmdb_writer._put

    def full(environment, batch):
        raise lmdb.DiskError('mdb_txn_commit: No space left on device')

    monkeypatch.setattr(lmdb_writer, '_put', full)
    assert run('AIO-3', tmp_path, '--allow-partial') == 2
    said = capsys.readouterr().err
    assert 'bsd400_wed.lmdb.tmp cannot be written: No space left on device. What it holds is kept.' in said
    assert 'Traceback' not in said
    monkeypatch.setattr(lmdb_writer, '_put', put)
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
    monkeypatch.setattr(prepare, 'check_sets', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run('AIO-3', tmp_path, '--allow-partial') == 130


def test_what_is_written_already_needs_no_space(plant, tmp_path, monkeypatch):
    for number in range(COUNT):
        plant(f'BSD400/{number}.png')
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert run('AIO-3', tmp_path, '--allow-partial') == 0
