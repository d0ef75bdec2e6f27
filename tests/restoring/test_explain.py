"""`cea explain`: sheets, tables, distances."""

import cv2
import numpy as np
import pytest
import torch

from cea_arch.checkpoints import write_checkpoint
from cea_arch.cli import main
from cea_arch.networks import CEAIR
from cea_arch.restoring.explain import distances, effective, explain, observe
from cea_arch.restoring.fitting import Fit
from tests.networks.test_cea_ir import TINY, lively

pytestmark = pytest.mark.usefixtures('one_thread')
OPTIONS = {'type': 'CEAIR', **TINY}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    net = lively(CEAIR(**TINY))
    write_checkpoint({'params': net.state_dict(), 'network_g': OPTIONS}, tmp_path / 'a.pth')
    return net.eval()


@pytest.fixture
def pictures(tmp_path, photograph):
    for group, cut in (('light', photograph[:64, :96]), ('dark', photograph[100:164, 100:180] // 5)):
        (tmp_path / group).mkdir()
        for number in range(2):
            cv2.imwrite(str(tmp_path / group / f'{group}{number}.png'), cut[number * 8 :, ::-1])
    return tmp_path


def test_sheets_tables_and_distances(model, pictures, capsys):
    words = ['-m', str(pictures / 'a.pth'), '-o', str(pictures / 'out'), '--device', 'cpu']
    inputs = [str(pictures / 'light'), str(pictures / 'dark')]
    assert main(['explain', *inputs, *words]) == 0
    said = capsys.readouterr().out
    assert said.count('| layer | size | components used | rank of dW | result without it |') == 4
    assert '4 pictures, 2 kinds (light, dark)' in said
    names = {path.name for path in (pictures / 'out').iterdir()}
    assert names == {f'{name}_explained.png' for name in ('light0', 'light1', 'dark0', 'dark1')} | {'distances.png'}
    sheet = cv2.imread(str(pictures / 'out/light0_explained.png'))
    assert sheet.shape[1] > 1600
    assert len(np.unique(sheet)) > 100
    assert main(['explain', *inputs, *words]) == 2
    assert 'exists; --overwrite replaces it.' in capsys.readouterr().err
    assert main(['explain', inputs[0], *words, '--overwrite', '--synthetic', '--sheets', '0']) == 0
    said = capsys.readouterr().out
    assert '12 pictures, 6 kinds (low_light, rain, snow, haze, blur, noise)' in said
    assert '| layer |' not in said
    assert main(['explain', inputs[0], *words, '--keep', '2']) == 2
    assert '--keep compares with the picture as it was: it needs --synthetic.' in capsys.readouterr().err


def test_what_fewer_components_cost(model, pictures, capsys):
    words = ['explain', str(pictures / 'light/light0.png'), '-m', str(pictures / 'a.pth'), '-o', str(pictures / 'out')]
    assert main([*words, '--synthetic', '--sheets', '0', '--keep', '8', '1', '--device', 'cpu']) == 0
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    rows = [row for row in rows if len(row) == 8 and row[0] != '| kept']
    table = {row[0].removeprefix('| '): [float(cell.rstrip(' |')) for cell in row[1:]] for row in rows}
    ways = ('{} strongest of each picture', '{} strongest of all', 'dW of rank {}')
    assert list(table) == ['all', 'none', *(way.format(n) for n in (8, 1) for way in ways)]
    for way in ways:
        assert table[way.format(8)] == pytest.approx([0] * 7, abs=0.011)
    assert any(table['none'])
    assert any(table['1 strongest of all'])


def test_equal_names_in_two_folders_and_names_that_are_too_long(model, pictures, capsys):
    for folder in ('light', 'dark'):
        (pictures / folder / f'{folder}1.png').unlink()
        (pictures / folder / f'{folder}0.png').rename(pictures / folder / 'x.png')
    words = ['-m', str(pictures / 'a.pth'), '-o', str(pictures / 'out'), '--device', 'cpu']
    assert main(['explain', str(pictures / 'light'), str(pictures / 'dark'), *words]) == 0
    names = {path.name for path in (pictures / 'out').iterdir()}
    assert names == {'light_x_explained.png', 'dark_x_explained.png', 'distances.png'}
    (pictures / 'light/x.png').rename(long := pictures / f'{"n" * 248}.png')
    capsys.readouterr()
    assert main(['explain', str(long), *words]) == 2
    assert 'cannot be written: File name too long' in capsys.readouterr().err


def test_what_is_there_stops_at_once_and_a_damaged_picture_stops_nothing(model, pictures, capsys):
    (pictures / 'light/light0.jpg').write_bytes((pictures / 'light/light0.png').read_bytes())
    (pictures / 'light/light1.png').write_bytes(b'')
    words = ['explain', str(pictures / 'light'), '-m', str(pictures / 'a.pth'), '--device', 'cpu', '-o']
    assert main([*words, str(pictures / 'out')]) == 1
    said = capsys.readouterr()
    assert 'light1.png' in said.err
    assert '2 pictures, 1 kinds (light)' in said.out
    assert len({*(pictures / 'out').iterdir()}) == 3  # a sheet each, though their names differ by the suffix alone
    (pictures / 'out/distances.png').unlink()
    (pictures / 'light/light1.png').unlink()
    assert main([*words, str(pictures / 'out'), '--sheets', '0']) == 0  # what it would not write is in nobody's way
    assert main([*words, str(pictures / 'out'), '--sheets', '0']) == 2
    said = capsys.readouterr()
    assert 'distances.png exists; --overwrite replaces it.' in said.err
    assert said.out.count('cosine distance') == 1
    assert main([*words, str(pictures / 'light/light0.jpg')]) == 2
    assert 'light0.jpg: expected a folder, but there is a file.' in capsys.readouterr().err


def test_figures_of_a_layer(model):
    x = torch.rand(1, 3, 24, 32)
    restored, seen = observe(model, Fit(), x)
    layers = explain(model, Fit(), x, restored, seen)
    assert list(layers) == list(seen)
    name = 'fuse.0.cea'
    site = model.get_submodule(name)
    with torch.no_grad():
        site.project = lambda projection, features: projection(features)
        change = (model(x).clamp(0, 1) - restored).square().mean().sqrt() * 255
    assert layers[name].change == pytest.approx(change.item(), rel=1e-4)
    product = seen[name].bases.T @ seen[name].directions
    energies = torch.linalg.svdvals(product).square()
    assert layers[name].rank == pytest.approx(effective(energies), rel=1e-4)
    assert 1 <= layers[name].rank <= layers[name].used * 8


def test_measures():
    assert effective(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective(torch.tensor([2.0, 2, 2, 2])) == pytest.approx(4)

    class Rows:
        def __init__(self, *rows):
            self.bases = torch.tensor(rows)

    found = distances([{'a': Rows([1.0, 0.0])}, {'a': Rows([0.0, 3.0])}, {'a': Rows([5.0, 0.0])}], 'bases')
    np.testing.assert_allclose(found, [[0, 1, 0], [1, 0, 1], [0, 1, 0]], atol=1e-6)


def test_what_cannot_be_explained(model, pictures, capsys):
    words = ['explain', str(pictures / 'light'), '-o', str(pictures / 'out')]
    assert main([*words, '-m', str(pictures / 'a.pth'), '--layer', 'fuse.9.cea']) == 2
    assert "no CEA layer 'fuse.9.cea'. Did you mean 'fuse." in capsys.readouterr().err
    plain = CEAIR(**TINY | {'modulate': []})
    write_checkpoint({'params': plain.state_dict(), 'network_g': OPTIONS | {'modulate': []}}, pictures / 'b.pth')
    assert main([*words, '-m', str(pictures / 'b.pth')]) == 2
    assert 'holds a network without CEA layers' in capsys.readouterr().err
    assert main(['explain', str(pictures / 'none.png'), '-o', str(pictures / 'out')]) == 2
    assert 'none.png' in capsys.readouterr().err
    assert not (pictures / 'out').exists()


@pytest.mark.parametrize('factors', ['static', 'pooled'])
def test_factors_without_probes_have_no_maps_of_them(factors, pictures, capsys):
    options = OPTIONS | {'factors': factors}
    net = lively(CEAIR(**TINY, factors=factors))
    write_checkpoint({'params': net.state_dict(), 'network_g': options}, pictures / 'c.pth')
    picture = str(pictures / 'light/light0.png')
    assert main(['explain', picture, '-m', str(pictures / 'c.pth'), '-o', str(pictures / 'out')]) == 0
    assert cv2.imread(str(pictures / 'out/light0_explained.png')).shape[1] < 1300
