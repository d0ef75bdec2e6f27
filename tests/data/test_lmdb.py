"""LMDBs of images: written, read, broken."""

import pickle
import re

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset

from cea_arch.data import image_store
from cea_arch.data.cea_dataset import CEADataset
from cea_arch.data.image_store import ImageStore
from cea_arch.data.lmdb_writer import Written, write_lmdb
from cea_arch.errors import UserError
from tests.data.test_data import lmdb_of, noise, options


def test_lmdb_and_disk_agree(image_folder, tmp_path):
    folder = image_folder('gt', ['a', 'b', 'c'])
    stores = ImageStore(folder), ImageStore(lmdb_of(folder, tmp_path / 'gt.lmdb'))
    assert stores[0].sizes == stores[1].sizes == dict.fromkeys('abc', (48, 64))
    for key in 'abc':
        assert np.array_equal(stores[0].read(key), stores[1].read(key))
        assert np.array_equal(stores[0].read(key), cv2.imread(str(folder / f'{key}.png'))[..., ::-1])


def broken_lmdb(folder, tmp_path, how):
    root = lmdb_of(folder, tmp_path / 'x.lmdb')
    meta = root / 'meta_info.txt'
    if how == 'empty':
        meta.write_text('')
    elif how == 'no data':
        (root / 'data.mdb').unlink()
    elif how == 'bad line':
        meta.write_text('a.png\n')
    elif how == 'missing key':
        meta.write_text(meta.read_text() + 'ghost.png (48,64,3) 1\n')
    elif how == 'cut':
        data = (root / 'data.mdb').read_bytes()
        (root / 'data.mdb').write_bytes(data[: len(data) // 2])
    return root


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('empty', r"'\S+x\.lmdb' holds no images"),
        ('no data', r'not a complete LMDB: data\.mdb is missing'),
        ('bad line', r"line 1 of \S+meta_info\.txt should read like .*, found 'a\.png'"),
        ('missing key', r"'ghost' is listed in meta_info\.txt but absent"),
        ('cut', r'data\.mdb is cut short: \d+ of \d+ bytes'),
    ],
)
def test_broken_lmdbs_are_named(image_folder, tmp_path, how, message):
    root = broken_lmdb(image_folder('gt', ['a', 'b']), tmp_path, how)
    with pytest.raises(UserError, match=message):
        [ImageStore(root).read(key) for key in ('a', 'ghost')]


def test_two_datasets_share_one_lmdb_and_survive_pickling_and_forking(image_folder, tmp_path):
    root = lmdb_of(image_folder('gt', ['a', 'b']), tmp_path / 'gt.lmdb')
    train, val = (CEADataset(options(phase, x=noise(root))) for phase in ('train', 'val'))
    assert train[0]['gt'].shape != val[0]['gt'].shape
    for start in ('fork', 'spawn'):
        loader = torch.utils.data.DataLoader(val, num_workers=1, multiprocessing_context=start)
        assert torch.equal(next(iter(loader))['lq'][0], val[0]['lq'])
    assert torch.equal(pickle.loads(pickle.dumps(val))[1]['lq'], val[1]['lq'])
    assert str(root.resolve()) in image_store._environments


def test_lmdb_holds_the_files_bytes_and_basicsr_reads_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr('cea_arch.data.lmdb_writer._FIRST_MAP_SIZE', 2**15)  # so that the map has to grow
    folders = image_folder('gt', ['a', 'b']), image_folder('lq', ['a', 'b'])
    roots = [lmdb_of(folder, tmp_path / f'{folder.name}.lmdb') for folder in folders]
    assert re.fullmatch(r'a\.png \(48,64,3\) 1\nb\.png \(48,64,3\) 1\n', (roots[0] / 'meta_info.txt').read_text())
    assert ImageStore(roots[0]).read_bytes('a') == (folders[0] / 'a.png').read_bytes()
    image_store.close_lmdb(roots[0])
    paired = {'name': 's', 'type': 'PairedImageDataset', 'dataroot_gt': str(roots[0]), 'dataroot_lq': str(roots[1])}
    dataset = build_dataset(paired | {'phase': 'val', 'scale': 1, 'io_backend': {'type': 'lmdb'}})
    assert dataset[1]['gt'].shape == (3, 48, 64)


def test_lmdb_writer_refuses(image_folder, tmp_path):
    data = (image_folder('gt', ['a']) / 'a.png').read_bytes()
    with pytest.raises(UserError, match=r'must end in \.lmdb'):
        write_lmdb([('a', data)], tmp_path / 'x')
    with pytest.raises(UserError, match="'a' is there twice"):
        write_lmdb([('a', data), ('a', data)], tmp_path / 'x.lmdb')
    with pytest.raises(UserError, match="image 'a' is not a readable image"):
        write_lmdb([('a', data[:-50])], tmp_path / 'x.lmdb')
    for key in ('', 'a\nb', 'é' * 256):
        with pytest.raises(UserError, match='must be one line of 1 to 511 bytes'):
            write_lmdb([(key, data)], tmp_path / 'x.lmdb')
    with pytest.raises(UserError, match='no images to write'):
        write_lmdb([], tmp_path / 'x.lmdb')
    assert not (tmp_path / 'x.lmdb').exists()


def test_lmdb_writer_leaves_an_existing_lmdb_alone(image_folder, tmp_path):
    a, b = ((image_folder('gt', ['a', 'b']) / f'{key}.png').read_bytes() for key in 'ab')
    root = tmp_path / 'x.lmdb'
    assert write_lmdb([('a', a)], root) == Written(images=1, kept=0)
    before = (root / 'data.mdb').stat()
    assert write_lmdb([('a', a)], root) == Written(images=1, kept=1)
    assert (root / 'data.mdb').stat() == before
    with pytest.raises(UserError, match=r"exists and holds another 'a'"):
        write_lmdb([('a', b)], root)
    with pytest.raises(UserError, match=r'exists and holds 1 images, not 0'):
        write_lmdb([], root)
    assert write_lmdb([('b', b)], root, overwrite=True) == Written(images=1, kept=0)
    assert list(ImageStore(root).sizes) == ['b']


def test_an_interrupted_lmdb_goes_on(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr('cea_arch.data.lmdb_writer._BATCH_SIZE', 1)
    files = [(path.stem, path.read_bytes()) for path in sorted(image_folder('gt', ['a', 'b', 'ü', 'old']).iterdir())]
    root = tmp_path / 'x.lmdb'

    def interrupted():
        yield from files[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(interrupted(), root)
    assert not root.exists()
    wanted = [file for file in files if file[0] != 'old']
    assert write_lmdb(wanted, root) == Written(images=3, kept=2)
    store = ImageStore(root)
    assert list(store.sizes) == ['a', 'b', 'ü']
    assert [(key, store.read_bytes(key)) for key in store.sizes] == wanted
    with image_store.open_lmdb(root).begin() as transaction:
        assert transaction.stat()['entries'] == 3


def test_lmdb_verification_finds_what_reads_back_wrong(image_folder, tmp_path, monkeypatch):
    data = (image_folder('gt', ['a']) / 'a.png').read_bytes()

    def put_wrong(environment, batch):
        with environment.begin(write=True) as transaction:
            transaction.put(b'a', b'wrong')

    monkeypatch.setattr('cea_arch.data.lmdb_writer._put', put_wrong)
    with pytest.raises(UserError, match="'a' reads back other than it was written"):
        write_lmdb([('a', data)], tmp_path / 'x.lmdb')
    assert not (tmp_path / 'x.lmdb').exists()
    monkeypatch.setattr('cea_arch.data.lmdb_writer._put', lambda environment, batch: None)
    monkeypatch.setattr('cea_arch.data.lmdb_writer._read_back', lambda environment, batch, destination: None)
    with pytest.raises(UserError, match='0 of 1 images are there'):
        write_lmdb([('b', data)], tmp_path / 'x.lmdb')
