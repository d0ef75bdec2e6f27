"""`cea export`: ONNX files of CEANet."""

import pytest
import torch
from test_ceanet import TINY, lively

from cea_arch.archs.ceanet_arch import CEANet
from cea_arch.checkpoints import write_checkpoint
from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.export import SIZES, TOLERANCE, export_onnx

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = lively(CEANet(**TINY))
    with torch.no_grad():  # a change as large as a restoration's
        net.output.weight.mul_(0.1 / (net(torch.rand(1, 3, 32, 32)) - 0.5).std())
    return net


def test_onnx_gives_the_same_image_at_five_sizes(net, tmp_path, capsys):
    pytest.importorskip('onnxscript', reason='needs the extra: pip install -e ".[export]"')
    runtime = pytest.importorskip('onnxruntime', reason='needs the extra: pip install -e ".[export]"')
    write_checkpoint({'params': net.state_dict(), 'network_g': {'type': 'CEANet', **TINY}}, tmp_path / 'a.pth')
    path = tmp_path / 'a.onnx'
    assert main(['export', str(path), '-m', str(tmp_path / 'a.pth')]) == 0
    assert 'a.onnx: RGB in [0, 1], input lq, output restored; within' in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.onnx', 'a.pth']
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for size in SIZES:
        x = torch.rand(1, 3, *size)
        (found,) = session.run(None, {'lq': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=0, atol=TOLERANCE)
    assert main(['export', str(path), '-m', str(tmp_path / 'a.pth')]) == 2
    assert 'a.onnx exists; --overwrite replaces it.' in capsys.readouterr().err


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript', reason='needs the extra: pip install -e ".[export]"')
    monkeypatch.setattr('cea_arch.export._reader', lambda path: lambda x: x + 1)
    with pytest.raises(UserError, match=r'what was exported differs by .* it is not kept'):
        export_onnx(torch.nn.Conv2d(3, 3, 3, padding=1), tmp_path / 'a.onnx')
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(net, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'expected a name that ends in \.onnx'):
        export_onnx(net, tmp_path / 'a.pt2')
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(UserError, match=r'pip install "cea-arch\[export\]"'):
        export_onnx(net, tmp_path / 'a.onnx')
