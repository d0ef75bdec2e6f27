"""Injected networks go through torch.compile, torch.export and the ONNX exporter, at other sizes than traced."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch

from cea_arch.layers import inject_cea
from cea_arch.networks import CEAIR
from cea_arch.networks.with_cea import AUTO_TARGETS, WithCEA
from tests.conftest import ROOT
from tests.layers.test_inject import awaken, build
from tests.layers.test_sites import Foreign
from tests.networks.test_cea_ir import TINIES, lively

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


ORDERS = """
import sys
import torch
from torch import nn
from cea_arch.layers import inject_cea, remove_cea

late = sys.argv[1] == 'late'  # dynamo is imported, and plain networks compiled, before anything is injected
x = torch.rand(2, 3, 16, 24)


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.tokens = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x):
        return self.tokens(self.act(self.conv(x)).flatten(2).transpose(1, 2))


def compiled(net):
    return torch.compile(net, backend='aot_eager', fullgraph=True)


def injected(net):
    inject_cea(net, ['conv', 'tokens'], rank=2, heads=1)
    for name, parameter in net.named_parameters():
        if '.cea.' in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def same(net, run):
    net.zero_grad()
    expected = net(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    actual = run(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, gradients)


assert 'torch._dynamo' not in sys.modules
if not late:
    injected(Host())
plain = Host()
run_plain = compiled(plain)
same(plain, run_plain)
first = injected(Host())
same(plain, run_plain)  # again, before the other one is compiled
run_first = compiled(first)
same(first, run_first)
same(plain, run_plain)
same(injected(plain), run_plain)
remove_cea(plain)
same(plain, run_plain)
same(first, run_first)
"""


@pytest.mark.parametrize('order', ['early', 'late'])
def test_networks_of_one_class_compiled_before_and_after(order):
    """With layers and without, in any order; in a process of its own, in which nothing is compiled yet."""
    command = [sys.executable, '-W', 'ignore', '-c', ORDERS, order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class Host(torch.nn.Module):
    """A convolution with a norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.act = torch.nn.ReLU()
        self.tokens = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.tokens(self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2))


def quantise(net):
    return torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)


def fuse(net):
    return torch.ao.quantization.fuse_modules(net, [['conv', 'norm', 'act']])


def replace(net):
    net.tokens = torch.nn.Linear(8, 8)
    return net


@pytest.mark.filterwarnings('ignore')  # torch's own words on its older quantisation
@pytest.mark.parametrize('change', [quantise, fuse, replace])
def test_a_host_that_loses_a_layer_refuses_to_run(change):
    net, x = Host().eval(), torch.rand(2, 3, 6, 7)
    inject_cea(net, ['conv', 'tokens'], rank=2, heads=1)
    expected = net(x)
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)
    changed = change(net)
    with pytest.raises(ValueError, match='was replaced by another one, as quantising and fusing do'):
        changed(x)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', ['Foreign', 'T', 'attention'])
def test_a_trace_of_one_image_takes_any_batch(kind):
    torch.manual_seed(0)
    net = injected(kind) if kind == 'Foreign' else lively(CEAIR(**TINIES[kind])).eval()
    traced = torch.jit.trace(net, torch.rand(1, 3, 24, 32), check_trace=False)
    for batch in (1, 2, 4):
        x = torch.rand(batch, 3, 24, 32)
        torch.testing.assert_close(traced(x), net(x))


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
