"""`cea export`: files of CEAIR and injected networks for onnxruntime and torch.export."""

import zipfile

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from cea_arch.checkpoints import read_checkpoint, write_checkpoint
from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.interop.export import FORMATS, SIZES, TOLERANCE, TOLERANCE_HALF, export_network
from cea_arch.layers import CEABlock
from cea_arch.networks import CEAIR
from cea_arch.networks.from_file import load_network
from cea_arch.networks.with_cea import WithCEA
from tests.conftest import ROOT
from tests.layers.test_inject import options_of
from tests.networks import test_cea_ir
from tests.networks.test_cea_ir import lively

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = test_cea_ir.TINY | {'cea_stages': ['latent'], 'modulate': ['mixed', 'fuse']}  # exporters take a second a layer


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = lively(CEAIR(**TINY))
    with torch.no_grad():  # a change as large as a restoration's
        net.output.weight.mul_(0.1 / (net(torch.rand(1, 3, 32, 32)) - 0.5).std())
    return net


@pytest.fixture
def block(monkeypatch):
    """A small network of the parts that CEAIR is made of, which the command takes for the one in its file."""
    net = lively(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CEABlock(8, 2), nn.Conv2d(8, 3, 3, padding=1)))
    monkeypatch.setattr('cea_arch.interop.export.load_network', lambda *_: net)
    return net


def holds_paths(file):
    """Whether a file holds a path of the machine that wrote it, in any of its parts."""
    parts = [file.read_bytes()]
    if file.suffix == '.pt2':
        with zipfile.ZipFile(file) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    marks = [str(ROOT).encode(), b'site-packages', b'.py"', b'.py\\"']
    return [mark for mark in marks for part in parts if mark in part]


def check(read, net, dtype, tolerance):
    for batch, size in zip((1, 2, 4, 3, 1), SIZES):
        x = torch.rand(batch, 3, *size)
        torch.testing.assert_close(read(x.to(dtype)).float(), net(x).detach(), rtol=0, atol=tolerance)


def read_onnx(path):
    runtime = pytest.importorskip('onnxruntime', reason='needs the extra: pip install -e ".[export]"')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'lq': x.numpy()})[0])


def test_cea_ir_as_onnx_gives_the_same_image_at_five_sizes(net, tmp_path, capsys):
    pytest.importorskip('onnxscript', reason='needs the extra: pip install -e ".[export]"')
    write_checkpoint({'params': net.state_dict(), 'network_g': {'type': 'CEAIR', **TINY}}, tmp_path / 'a.pth')
    path = tmp_path / 'a.onnx'
    assert main(['export', str(path), '-m', str(tmp_path / 'a.pth')]) == 0
    assert 'a.onnx: RGB in [0, 1], float32, input lq, output restored; within' in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.onnx', 'a.pth']
    check(read_onnx(path), net, torch.float32, TOLERANCE)
    if int(cv2.__version__.partition('.')[0]) >= 5:  # before, it takes no file of free size
        reader, x = cv2.dnn.readNetFromONNX(str(path)), torch.rand(1, 3, 33, 40)
        reader.setInput(x.numpy())
        assert np.abs(reader.forward() - net(x).detach().numpy()).max() < TOLERANCE
    assert holds_paths(path) == []
    assert b'pkg.torch' not in path.read_bytes()
    assert main(['export', str(path), '-m', str(tmp_path / 'a.pth')]) == 2
    assert 'a.onnx exists; --overwrite replaces it.' in capsys.readouterr().err


@pytest.mark.parametrize('suffix', ['.onnx', '.pt2'])
@pytest.mark.parametrize(('words', 'dtype'), [([], torch.float32), (['--fp16'], torch.float16)])
def test_both_formats_in_both_precisions(block, tmp_path, capsys, suffix, words, dtype):
    if suffix == '.onnx':
        pytest.importorskip('onnxscript', reason='needs the extra: pip install -e ".[export]"')
    path = tmp_path / f'a{suffix}'
    assert main(['export', str(path), '-m', 'a.pth', *words]) == 0
    assert f'RGB in [0, 1], {str(dtype).removeprefix("torch.")}' in capsys.readouterr().out
    assert holds_paths(path) == []
    read = read_onnx(path) if suffix == '.onnx' else torch.export.load(path).module()
    check(read, block, dtype, TOLERANCE_HALF if words else TOLERANCE)


class OfOneWidth(nn.Module):
    """Asks in Python for the width of pictures, as SwinIR does to lay out its windows."""

    def forward(self, x):
        return x * 0.9 if x.shape[-1] == 48 else x


def test_networks_that_enlarge_or_want_multiples(tmp_path):
    def make(kind):
        torch.manual_seed(0)
        options = options_of(kind)
        del options['type']
        return lively(WithCEA(**options))

    found = export_network(make('RRDBNet'), tmp_path / 'a.pt2')
    assert found.error <= TOLERANCE
    assert found.any_batch
    assert found.sizes == [(18, 24), (34, 40), (64, 48), (20, 90), (18, 32)]
    program = torch.export.load(tmp_path / 'a.pt2').module()
    assert program(torch.rand(1, 3, 10, 14)).shape == (1, 3, 20, 28)
    with pytest.raises(UserError, match='cannot be exported for pictures of any size: '):
        export_network(OfOneWidth(), tmp_path / 'b.pt2')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pt2']


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, '.pt2', (FORMATS['.pt2'][0], lambda path: lambda x: x + 1))
    with pytest.raises(UserError, match=r'what was exported differs by .*, over 1.0e-04; it is not kept'):
        export_network(torch.nn.Conv2d(3, 3, 3, padding=1), tmp_path / 'a.pt2')
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_in_half_precision(net, tmp_path, capsys):
    pytest.importorskip('safetensors', reason='needs the extra: pip install -e ".[safetensors]"')
    training = {name: value * 0 for name, value in net.state_dict().items()}
    options = {'type': 'CEAIR', **TINY}
    content = {'params': training, 'params_ema': net.state_dict(), 'network_g': options, 'iter': 7}
    write_checkpoint(content, tmp_path / 'a.pth')
    path = tmp_path / 'a.safetensors'
    words = ['export', str(path), '-m', str(tmp_path / 'a.pth'), '--fp16']
    assert main(words) == 0
    assert 'a.safetensors: RGB in [0, 1], float16; within' in capsys.readouterr().out
    content = read_checkpoint(path)
    assert content['iter'] == 7
    assert content['network_g'] == options
    assert {value.dtype for value in content['params'].values()} == {torch.float16}
    x = torch.rand(1, 3, 20, 17)
    torch.testing.assert_close(load_network(path)(x), net(x), rtol=0, atol=TOLERANCE_HALF)
    torch.save({f'module.{name}': value for name, value in CEAIR(size='T').state_dict().items()}, tmp_path / 'b.pth')
    assert main(['export', str(tmp_path / 'b.safetensors'), '-m', str(tmp_path / 'b.pth')]) == 0
    assert 'b.safetensors: RGB in [0, 1], float32; within 0.0e+00' in capsys.readouterr().out
    assert main(words) == 2
    assert 'a.safetensors exists; --overwrite replaces it.' in capsys.readouterr().err


def test_mistakes_are_named(block, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'expected a name that ends in \.onnx, \.pt2 or \.safetensors'):
        export_network(block, tmp_path / 'a.pth')
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[export\]"'):
        export_network(block, tmp_path / 'a.onnx')
