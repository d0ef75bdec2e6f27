"""Files of CEAIR and of injected networks, loaded by spandrel."""

import pytest
import torch

from cea_arch.checkpoints import write_checkpoint
from cea_arch.errors import UserError
from cea_arch.networks import CEAIR
from cea_arch.networks.with_cea import WithCEA
from cea_arch.restoring.fitting import Fit
from tests.layers.test_inject import ARCHS, options_of
from tests.networks.test_cea_ir import TINY

spandrel = pytest.importorskip('spandrel', reason='needs the extra: pip install -e ".[spandrel]"')
ours = pytest.importorskip('cea_arch.interop.spandrel')
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:the weights do not tell')]
SIZES = ((16, 24), (33, 40), (64, 47), (17, 90), (32, 32))
NO_CHANGE = Fit()


@pytest.fixture(autouse=True)
def _installed():
    ours.install()
    ours.install()


def write(net, options, path):
    write_checkpoint({'params_ema': net.state_dict(), 'params': net.state_dict(), 'network_g': options}, path)
    return str(path)


def alive(net):
    """Put what starts at zero off it, so that every part acts."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not p.any():
                p.normal_(std=0.03 if name.endswith('gamma') else 0.3)
    return net.eval()


def injected(kind, **more):
    """An injected network and its options; spandrel takes RRDBNet with 32 growing channels alone."""
    base = {'type': kind} | ARCHS[kind] | ({'num_grow_ch': 32} if kind == 'RRDBNet' else {})
    options = options_of(kind, base=base, **more)
    return alive(WithCEA(**{name: value for name, value in options.items() if name != 'type'})), options


def check(descriptor, net, fit=NO_CHANGE, multiple=1):
    for height, width in SIZES:
        x = torch.rand(1, 3, -(-height // multiple) * multiple, -(-width // multiple) * multiple)
        with torch.no_grad():
            expected = fit.run(net, x).clamp(0, 1)
        torch.testing.assert_close(descriptor(x).clone(), expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.01


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('size', ['T', 'S', 'base'])
def test_cea_ir_of_named_sizes(size, suffix, tmp_path, recwarn):
    if size == 'base' and suffix == '.pth':
        pytest.skip('large; one format is enough')
    options = {'size': size}
    net = alive(CEAIR(**options))
    with torch.no_grad():  # a change as large as a restoration's, around grey
        net.output.weight.mul_(0.1 / (net(torch.rand(1, 3, 32, 32)) - 0.5).std())
    found = spandrel.ModelLoader().load_from_file(write(net, {'type': 'CEAIR', **options}, tmp_path / f'a{suffix}'))
    assert (found.architecture.id, found.scale, found.purpose) == ('CEAIR', 1, 'Restoration')
    assert (found.input_channels, found.output_channels, found.size_requirements.multiple_of) == (3, 3, 8)
    assert found.tags == [size, 'CEA']
    assert (found.supports_half, found.supports_bfloat16) == (True, True)
    assert not [w for w in recwarn if 'do not tell' in str(w.message)]
    check(found, net, Fit(8))
    x = torch.rand(1, 3, 33, 40)
    exact = found(x).clone()
    assert (found.half()(x.half()) - exact).abs().max() < 1e-2


@pytest.mark.parametrize(
    'options',
    [
        {'cea_width': 8},
        {'cea_width': 16, 'modulate': ['mixer', 'ffn', 'fuse'], 'pooled_scale': False, 'bias': False},
        {'modulate': ['mixer'], 'ffn_expansion_factor': 2.66, 'rank': 5, 'cea_stages': ['encoder', 'refinement']},
        {'factors': 'pooled', 'num_dec_blocks': [1, 2, 3], 'num_refinement_blocks': 2},
        {'factors': 'static', 'num_blocks': [2, 1, 3, 1]},
        {'block': 'attention', 'modulate': ['q', 'k', 'ffn'], 'up_kernel': 3, 'heads': [1, 1, 2, 4]},
        {'block': 'attention', 'modulate': ['v'], 'factors': 'pooled', 'ffn_expansion_factor': 2.66},
        {'modulate': []},
    ],
    ids=str,
)
def test_cea_ir_by_its_shapes(options):
    net = alive(CEAIR(**TINY | {'cea_heads': 4, 'cea_strides': [2, 2, 2, 2]} | options))
    found = spandrel.MAIN_REGISTRY.load(net.state_dict())
    check(found, net, Fit(8))


def test_the_heads_that_no_shape_tells_are_read_from_the_file(tmp_path):
    options = {'type': 'CEAIR', **TINY, 'cea_heads': 2, 'cea_width': 16}
    net = alive(CEAIR(**TINY, cea_heads=2, cea_width=16))
    path = write(net, options, tmp_path / 'a.pth')
    with pytest.warns(
        UserWarning, match='heads, strides, routing and RankNorm of CEAIR: 4, 2, signed and true are taken'
    ):
        spandrel.ModelLoader().load_from_file(path)
    check(ours.load(path), net, Fit(8))


@pytest.mark.parametrize(
    ('kind', 'scale', 'base'), [('SwinIR', 1, 'SwinIR'), ('RRDBNet', 2, 'ESRGAN'), ('SRVGGNetCompact', 2, 'Compact')]
)
@pytest.mark.parametrize('factors', ['dynamic', 'static'])
def test_injected_networks_whose_base_spandrel_knows(kind, scale, base, factors, tmp_path):
    net, options = injected(kind, factors=factors)
    found = spandrel.ModelLoader().load_from_file(write(net, options, tmp_path / 'a.pth'))
    assert (found.architecture.id, found.scale) == ('WithCEA', scale)
    assert found.purpose == ('SR' if scale > 1 else 'Restoration')
    assert base in found.tags[-2]
    assert found.tags[-1] == 'CEA'
    weights = {name.removeprefix('base.'): v for name, v in net.state_dict().items() if '.cea.' not in name}
    plain = spandrel.MAIN_REGISTRY.load(weights)
    assert plain.architecture.id == base
    assert plain.size_requirements == found.size_requirements
    assert plain.supports_half == found.supports_half
    # at sizes that RRDBNet does not take, spandrel continues pictures in its own way
    check(found, net, Fit({'SwinIR': 8}.get(kind, 1), scale), 4 if kind == 'RRDBNet' else 1)


def test_a_base_of_the_library_alone_is_loaded_by_our_own_call(tmp_path):
    net, options = injected('EDSR')
    path = write(net, options, tmp_path / 'a.pth')
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_file(path)
    found = ours.load(path)
    assert found.scale == 2
    assert found.supports_half
    check(found, net, Fit(1, 2))


def test_our_own_call_says_what_the_base_needs(tmp_path):
    net, options = injected('SwinIR')
    found = ours.load(write(net, options, tmp_path / 'a.pth'))
    weights = {name.removeprefix('base.'): v for name, v in net.state_dict().items() if '.cea.' not in name}
    plain = spandrel.MAIN_REGISTRY.load(weights)
    assert (found.supports_half, found.supports_bfloat16) == (plain.supports_half, plain.supports_bfloat16)
    assert found.size_requirements == spandrel.SizeRequirements(plain.size_requirements.minimum, 8)


class Particular(torch.nn.Module):
    """Takes 32 pixels at least, and float32 alone."""

    def forward(self, x):
        if min(x.shape[-2:]) < 32:
            raise ValueError('too small')
        return x @ torch.eye(x.shape[-1])


def test_a_base_that_nobody_knows_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, 'load_network', lambda *_: Particular())
    monkeypatch.setattr('cea_arch.restoring.fitting.PROBE_SIDES', (45, 53))
    found = ours.load('a.pth')
    assert (found.size_requirements.minimum, found.supports_half, found.supports_bfloat16) == (32, False, False)


def test_what_cannot_be_loaded_says_why():
    net, _ = injected('SwinIR')
    alone = {name: value for name, value in net.state_dict().items() if '.cea.' in name}
    with pytest.raises(UserError, match='CEA layers alone; `cea merge'):
        spandrel.MAIN_REGISTRY.load(alone)
    net, _ = injected('RRDBNet', targets='body.*.rdb1')
    with pytest.raises(spandrel.UnsupportedModelError, match=r"CEA layers in spandrel's ESRGAN: .*body\.0\.rdb1"):
        spandrel.MAIN_REGISTRY.load(net.state_dict())
    weights = CEAIR(**TINY).state_dict()
    weights['down.0.conv.weight'] = weights['down.0.conv.weight'][:1]
    with pytest.raises(UserError, match=r'do not fit CEAIR: .* of another shape'):
        spandrel.MAIN_REGISTRY.load(weights)
