"""Injected networks go through torch.compile, torch.export and the ONNX exporter, at other sizes than traced."""

import warnings

import pytest
import torch

from cea_arch.layers import inject_cea
from cea_arch.networks.with_cea import AUTO_TARGETS, WithCEA
from tests.layers.test_inject import Foreign, awaken, build

SIZES = [(16, 24), (20, 16), (33, 40)]


def injected(kind):
    """A network whose layers are off their zero start."""
    torch.manual_seed(0)
    net = Foreign() if kind == 'Foreign' else build(kind)
    targets = ['stem.1', 'pixels.*', 'tokens'] if kind == 'Foreign' else AUTO_TARGETS[kind]
    inject_cea(net, targets, rank=4)
    awaken(net)
    net.zero_grad()
    return net.eval()


def exported(net):
    size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return torch.export.export(net, (torch.rand(1, 3, *SIZES[0]),), dynamic_shapes=(size,))


@pytest.mark.parametrize('kind', ['Foreign', 'EDSR'])
def test_compile_traces_the_layers_in_one_graph(kind):
    net = injected(kind)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    x = torch.rand(2, 3, 16, 24)
    expected = net(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    actual = compiled(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([p.grad for p in net.parameters() if p.grad is not None], gradients)


@pytest.mark.parametrize('kind', ['EDSR', 'SRVGGNetCompact'])
def test_export_takes_any_size(kind):
    net = injected(kind)
    program = exported(net).module()
    for size in SIZES:
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(program(x), net(x))


def test_a_frozen_with_cea_is_exported_whole(tmp_path):
    base = build('MSRResNet')
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    options = {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 2, 'upscale': 3}
    net = WithCEA(options, rank=4, pretrained_base=str(tmp_path / 'base.pth'), freeze_base=True).eval()
    x = torch.rand(1, 3, *SIZES[1])
    torch.testing.assert_close(exported(net).module()(x), net(x))


@pytest.mark.parametrize('kind', ['MSRResNet', 'RCAN'])
def test_onnx_gives_the_same_image_at_three_sizes(kind, tmp_path):
    pytest.importorskip('onnxscript', reason='needs the extra: pip install -e ".[export]"')
    runtime = pytest.importorskip('onnxruntime', reason='needs the extra: pip install -e ".[export]"')
    net = injected(kind)
    path = tmp_path / 'net.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(exported(net), f=path, input_names=['lq'], output_names=['restored'], verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    for size in SIZES:
        x = torch.rand(1, 3, *size)
        (restored,) = session.run(None, {'lq': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(restored), net(x).detach(), rtol=1e-3, atol=1e-4)
