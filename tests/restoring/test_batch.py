"""`cea restore` of many files: one bad one never ends the others, and what is read and written is what one expects."""

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cea_arch.cli import main
from cea_arch.data.pairing import match_keys
from cea_arch.data.pictures import read_picture
from cea_arch.restoring import command
from tests.conftest import ROOT
from tests.data.mutations import good_files, mutated
from tests.data.picture_files import exif_block, samples, tiff

pytestmark = pytest.mark.usefixtures('one_thread')


def run(model, *words):
    return main(['restore', '-m', model, '--device', 'cpu', *map(str, words)])


def picture(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(samples(3, np.uint8)).save(path, **options)
    return path


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_metadata_of_wrong_types_ends_nothing(model, tmp_path):
    gps = exif_block([(34853, 4, 1, (8 + 2 + 12 + 4).to_bytes(4, 'little'))])
    gps += exif_block([(0, 2, 8, (200).to_bytes(4, 'little'))])[8:]
    for name, block in (
        ('b', gps),
        ('c', exif_block([(282, 2, 4, b'abc\0'), (700, 2, 4, b'xmp\0')])),
        ('d', b'no EXIF'),
    ):
        picture(tmp_path / f'in/{name}.jpg', exif=b'Exif\0\0' + block)
    text = [(282, 's', 0, b'many', True), (700, 's', 0, b'text', True), (34675, 's', 0, b'text', True)]
    (tmp_path / 'in/e.tif').write_bytes(tiff(samples(3, np.uint8), photometric='rgb', extratags=text))
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out') == 0
    assert names(tmp_path / 'out') == names(tmp_path / 'in')


def test_what_nobody_foresaw_is_one_files_failure(model, tmp_path, capsys, monkeypatch):
    for name in 'abc':
        picture(tmp_path / f'in/{name}.png')

    def read(path):
        if path.name == 'b.png':
            raise KeyError('unforeseen')
        return read_picture(path)

    monkeypatch.setattr(command, 'read_picture', read)
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out') == 1
    said = capsys.readouterr()
    assert said.err.count(f"{tmp_path}/in/b.png: KeyError: 'unforeseen' (--debug shows where)") == 1
    assert 'Traceback' not in said.err
    assert names(tmp_path / 'out') == ['a.png', 'c.png']
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out', '--overwrite', '--debug') == 1
    assert 'Traceback' in capsys.readouterr().err


def test_a_batch_of_good_and_damaged_files_of_all_kinds(model, tmp_path, capsys):
    pytest.importorskip('imagecodecs', reason='some of them are written by it')
    rng, suffix = np.random.default_rng(0), {'jpeg': 'jpg', 'tiff': 'tif'}
    (tmp_path / 'in').mkdir()
    for number, (kind, data) in enumerate(4 * list(good_files().items())):
        first = kind.partition('-')[0]
        content = data if number < 15 else mutated(data, rng)
        (tmp_path / 'in' / f'{number}_{kind}.{suffix.get(first, first)}').write_bytes(content)
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out') == 1
    said = capsys.readouterr()
    done = len(names(tmp_path / 'out'))
    assert 15 <= done < 60
    assert f'{done} restored to {tmp_path}/out, {60 - done} failed (cpu).' in said.out
    failed = set(names(tmp_path / 'in')) - set(names(tmp_path / 'out'))
    assert {said.err.count(f'/in/{name}: ') for name in failed} == {1}


def test_what_cannot_be_taken_along_is_said_with_the_file(model, tmp_path, capsys):
    pages = np.stack([samples(3, np.uint8)] * 2)
    (tmp_path / 'pages.tif').write_bytes(tiff(pages, photometric='rgb'))
    picture(tmp_path / 'a.jpg', comment=b'said', dpi=(300, 300), icc_profile=b'profile')
    assert run(model, tmp_path / 'pages.tif', '-o', tmp_path / 'out') == 0
    assert 'pages.tif: page 1 of 2 is taken alone.' in capsys.readouterr().err
    assert run(model, tmp_path / 'a.jpg', '-o', tmp_path / 'out', '--ext', 'bmp') == 0
    assert 'a.bmp: without colour profile, comment or IPTC, which BMP cannot hold.' in capsys.readouterr().err


def test_names_as_long_as_file_systems_take(model, tmp_path):
    for name in ('x' * 251, '照' * 83):
        picture(tmp_path / f'in/{name}.png')
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out') == 0
    assert names(tmp_path / 'out') == names(tmp_path / 'in')


def test_what_programs_keep_for_themselves_is_no_picture_and_links_are_followed(model, tmp_path):
    picture(tmp_path / 'elsewhere/d.png')
    for name in ('a', '.Trash-1000/a', '.thumbnails/a', '.ipynb_checkpoints/a', '@eaDir/a', '__MACOSX/a', 'sub/b'):
        picture(tmp_path / f'in/{name}.png')
    (tmp_path / 'in/linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'in/sub/round').symlink_to(tmp_path / 'in')
    assert run(model, tmp_path / 'in', '-r', '-o', tmp_path / 'out') == 0
    assert names(tmp_path / 'out') == ['a.png', 'linked/d.png', 'sub/b.png']


def test_a_second_run_does_not_restore_the_results_of_the_first(model, tmp_path, capsys, monkeypatch):
    for name in ('a.png', 'a.jpg', 'sub/b.png'):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert run(model, tmp_path, '-r', '-o', 'out') == 0
    first = names(tmp_path)
    assert run(model, '.', '-r', '-o', tmp_path / 'out', '--overwrite') == 0
    assert names(tmp_path) == first
    assert run(model, 'sub', '-o', 'sub', '--suffix', '_r', '--compare') == 0
    capsys.readouterr()
    assert run(model, 'sub', '-o', 'sub', '--suffix', '_r', '--compare', '--overwrite') == 0
    said = capsys.readouterr().out
    assert '2 results of earlier runs were passed over.' in said
    assert '1 restored to sub' in said
    assert names(tmp_path / 'sub') == ['b.png', 'b_r.png', 'b_r_compare.png']


def test_comparisons_of_pictures_that_differ_in_their_extension_alone(model, tmp_path, capsys):
    for name in ('a.png', 'a.jpg', 'b.png'):
        picture(tmp_path / 'in' / name)
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out', '--compare') == 0
    assert names(tmp_path / 'out') == [
        'a.jpg',
        'a.png',
        'a_jpg_compare.png',
        'a_png_compare.png',
        'b.png',
        'b_compare.png',
    ]
    picture(tmp_path / 'in/b_compare.png')
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'two', '--compare', '--overwrite') == 1
    assert 'b_compare.png is written already, for' in capsys.readouterr().err


def test_an_original_of_another_format_is_no_result(model, tmp_path, capsys):
    for name in ('a.png', 'a.jpg'):
        picture(tmp_path / name)
    before = (tmp_path / 'a.png').read_bytes()
    assert run(model, tmp_path, '-o', tmp_path, '--ext', 'png') == 1
    assert 'passed over' not in capsys.readouterr().out
    assert (tmp_path / 'a.png').read_bytes() == before


def test_what_cannot_be_looked_at_ends_nothing(model, tmp_path, capsys):
    picture(tmp_path / 'in/a.png')
    (tmp_path / 'in/lost.png').symlink_to(tmp_path / 'nowhere.png')
    words = [tmp_path / 'in/a.png', tmp_path / ('z' * 300 + '.png'), tmp_path / 'in']
    assert run(model, *words, '-r', '-o', tmp_path / 'out') == 1
    said = capsys.readouterr().err
    assert 'z.png: File name too long.' in said
    assert f'{tmp_path}/in/lost.png cannot be read: no permission, or a link to nowhere.' in said
    assert names(tmp_path / 'out') == ['a.png']


def test_names_that_the_terminal_cannot_show(model, tmp_path):
    picture(tmp_path / '照.png')
    command = [sys.executable, '-m', 'cea_arch.cli', 'restore', str(tmp_path / '照.png'), '--list', '-o', str(tmp_path)]
    environment = os.environ | {'PYTHONIOENCODING': 'ascii:strict'}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100, check=False)
    assert done.returncode == 1
    assert '\\u7167.png exists; --overwrite replaces it.' in done.stderr


def test_a_tilde_that_the_shell_leaves(model, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / 'a.png')
    assert run(model, '~/a.png', '--output=~/x') == 0
    assert names(tmp_path) == ['a.png', 'x/a.png']


def test_a_list_writes_nothing(model, tmp_path, capsys):
    picture(tmp_path / 'in/a.png')
    picture(tmp_path / 'in/b.jpg')
    (tmp_path / 'in/c.png').write_bytes(b'none')
    picture(tmp_path / 'out/b.jpg')
    before = names(tmp_path)
    assert run(model, tmp_path / 'in', '-o', tmp_path / 'out', '--list') == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f'{tmp_path}/in/a.png (40 x 24) -> {tmp_path}/out/a.png',
        '1 would be restored, 0 results of earlier runs passed over, 2 mistakes.',
    ]
    assert f'{tmp_path}/out/b.jpg exists; --overwrite replaces it.' in said.err
    assert f'{tmp_path}/in/c.png: not a picture of' in said.err
    assert names(tmp_path) == before


def test_composed_and_decomposed_names_are_pairs():
    composed = ['Zoë', 'Ärger/é', 'plain']
    decomposed = [unicodedata.normalize('NFD', name) for name in composed]
    found = match_keys(decomposed, composed)
    assert sorted(found.pairs) == sorted(zip(decomposed, composed))
    assert not found.lonely
    assert not found.unused
    both = ['é', unicodedata.normalize('NFD', 'é')]  # two files where the file system tells them apart
    assert match_keys(both, both).pairs == [(name, name) for name in sorted(both)]


def test_processes_of_a_launcher_share_the_pictures(model, tmp_path):
    for number in range(5):
        picture(tmp_path / f'in/{number}.png')
    (tmp_path / 'in/bad.png').write_bytes(b'none')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'cea_arch.cli']
    words = ['restore', str(tmp_path / 'in'), '-o', str(tmp_path / 'out'), '-m', model, '--device', 'cpu']
    done = subprocess.run(
        launch + words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}, timeout=300
    )
    assert done.stdout.splitlines()[-1] == f'5 restored to {tmp_path}/out, 1 failed (cpu).'
    assert done.stderr.count('bad.png: not a picture of') == 1
    assert done.returncode == 1
    assert names(tmp_path / 'out') == [f'{number}.png' for number in range(5)]
