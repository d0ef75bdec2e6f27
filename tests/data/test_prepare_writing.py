"""What the preparation scripts write: complete, verified, once, and readable by BasicSR."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset

from cea_arch.data import prepare
from cea_arch.data.benchmarks import BENCHMARKS
from cea_arch.data.cea_dataset import CEADataset
from cea_arch.data.check import in_order
from cea_arch.data.image_store import ImageStore, decode, open_lmdb
from cea_arch.data.pairing import pair_keys
from cea_arch.data.read_speed import main as read_speed_main
from cea_arch.errors import UserError
from tests.conftest import ROOT
from tests.data.raw_trees import RAW, SEQUENCE, plant_tree, read, run


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
        dataset = CEADataset({'name': name, 'phase': 'val', 'sources': {'all': options}})
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
    with pytest.raises(UserError, match='the file is empty'):
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
