"""WithCEA: building, freezing, weights in files, merging."""

import copy
import importlib.util
import pickle

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from cea_arch.checkpoints import read_checkpoint
from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.layers import cea_parameters, cea_state_dict, inject_cea
from cea_arch.networks.with_cea import AUTO_TARGETS, WithCEA, merge
from tests.conftest import ROOT
from tests.layers.test_inject import ARCHS, awaken, build, options_of, write_base

NORMED = """
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class Normed(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)) for _ in range(2))
        self.head = nn.Conv2d(dim, 3, 1)

    def forward(self, x):
        y = self.stem(x)
        for block in self.blocks:
            y = y + block(y)
        return x + self.head(y)
"""


@pytest.fixture
def normed(tmp_path):
    """A third-party file's architecture with running statistics; returns its name."""
    (tmp_path / 'normed_arch.py').write_text(NORMED)
    spec = importlib.util.spec_from_file_location('normed_arch', tmp_path / 'normed_arch.py')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield 'Normed'
    del ARCH_REGISTRY._obj_map['Normed']


@pytest.mark.parametrize('kind', ARCHS)
def test_a_frozen_base_stays_and_its_checkpoint_is_small(kind, tmp_path):
    options = options_of(kind, pretrained_base=write_base(tmp_path, kind), freeze_base=True)
    net, other = build_network(options), build_network(options)
    base = build(kind)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(net(x), base.eval()(x))
    awaken(net, steps=2)
    weights = net.base.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in base.state_dict().items())
    stored = net.stored_state()
    assert stored.keys() == cea_state_dict(net).keys()
    assert all(name.startswith('base.') and '.cea.' in name for name in stored)
    expected = net(x)
    assert not torch.equal(expected, other(x))
    other.load_state_dict(stored)
    assert torch.equal(other(x), expected)
    fewer = dict(list(stored.items())[1:])
    with pytest.raises(RuntimeError, match='Missing key'):
        other.load_state_dict(fewer)


def test_third_party_architecture_keeps_its_running_statistics(normed):
    options = {'type': 'WithCEA', 'base': {'type': normed}, 'targets': 'blocks.*.0', 'rank': 2, 'width': 4}
    free, frozen = build_network(options), build_network(options | {'freeze_base': True})
    for net, moves in ((free, True), (frozen, False)):
        before = copy.deepcopy(net.state_dict())
        awaken(net.train(), steps=2)
        moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.endswith('running_mean') for name in moved) is moves
        assert net.training
        assert net.base.training is moves
        assert net.eval().base.training is False
        # the file of a base that came from none holds everything
        assert net.stored_state().keys() == net.state_dict().keys()
    trainable = [p for p in frozen.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in cea_parameters(frozen)}
    assert all(p.requires_grad for p in free.parameters())


def test_with_cea_is_copied_and_pickled(tmp_path):
    net = build_network(options_of('SwinIR', pretrained_base=write_base(tmp_path, 'SwinIR'), freeze_base=True))
    awaken(net, steps=1)
    x = torch.rand(1, 3, 16, 16)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x), net(x))
        assert not copied.train().base.training
        copied.load_state_dict(net.stored_state())


@pytest.mark.parametrize(
    'content',
    [
        lambda state: state,
        lambda state: {'params': state},
        lambda state: {'params': {name: 0 * value for name, value in state.items()}, 'params_ema': state},
        lambda state: {'params': {f'module.{name}': value for name, value in state.items()}},
    ],
    ids=['plain', 'params', 'params_ema', 'module.'],
)
def test_base_weights_as_people_store_them(tmp_path, content):
    net = build_network(options_of('MSRResNet', pretrained_base=write_base(tmp_path, 'MSRResNet', content)))
    expected = build('MSRResNet').state_dict()
    assert all(torch.equal(net.base.state_dict()[name], value) for name, value in expected.items())


def test_base_weights_that_do_not_fit_are_named(tmp_path):
    other = write_base(tmp_path, 'EDSR')
    with pytest.raises(UserError) as caught:
        build_network(options_of('MSRResNet', pretrained_base=other))
    assert str(caught.value) == (
        f'{other} does not fit MSRResNet: of 16 weights, '
        '4 missing (upconv1.weight, upconv1.bias, conv_hr.weight, ...); '
        '4 unexpected (conv_after_body.weight, conv_after_body.bias, upsample.0.weight, ...).'
    )
    wide = {'type': 'MSRResNet'} | ARCHS['MSRResNet'] | {'num_feat': 16}
    with pytest.raises(UserError, match=r'shape \(conv_first\.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\), '):
        WithCEA(wide, pretrained_base=write_base(tmp_path, 'MSRResNet'))
    with pytest.raises(UserError, match=r"file 'nowhere.pth' does not exist"):
        WithCEA(wide, pretrained_base='nowhere.pth')
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(UserError, match='is not a file of weights'):
        WithCEA(wide, pretrained_base=str(tmp_path / 'text.pth'))
    for content in ([1], {'epoch': 3}, nn.Identity()):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(UserError, match=r'x\.pth (is not a file of weights|holds no weights)'):
            WithCEA(wide, pretrained_base=str(tmp_path / 'x.pth'))


def test_modules_are_listed_before_any_target_is_chosen(tmp_path, capsys):
    network = options_of('SwinIR', targets='nothing.yet', pretrained_base='nowhere.pth')
    opt = {'name': 'x', 'model_type': 'CEAModel', 'datasets': {'train': {}}, 'network_g': network}
    (tmp_path / 'o.yml').write_text(yaml.safe_dump(opt))
    assert main(['modules', '-opt', str(tmp_path / 'o.yml')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(1 for name, _ in build('SwinIR').named_modules() if name)
    words = {line[2:].split()[0]: (line[0], *line[2:].split(maxsplit=2)[1:]) for line in lines[:-1]}
    assert words['conv_first'] == ('*', 'Conv2d', 'bchw 3 -> 8')
    assert words['layers.0.residual_group.blocks.1'] == ('*', 'SwinTransformerBlock', 'bnc 8 -> 8')
    assert words['layers'] == (' ', 'ModuleList', 'is a container that is never called: name the modules inside it')
    opt['network_g'] = {'type': 'EDSRR'}
    (tmp_path / 'o.yml').write_text(yaml.safe_dump(opt))
    assert main(['modules', '-opt', str(tmp_path / 'o.yml')]) == 2
    assert "o.yml, line 6: network_g.type: 'EDSRR' is not known. Did you mean 'EDSR'?" in capsys.readouterr().err


def test_networks_of_other_channels_and_sizes():
    grey = {'type': 'RIDNet', 'in_channels': 1, 'mid_channels': 16, 'out_channels': 1, 'num_block': 2}
    grey |= {'rgb_mean': [0.5], 'rgb_std': [1.0]}
    raw = {'type': 'RRDBNet'} | ARCHS['RRDBNet'] | {'num_in_ch': 4}
    assert WithCEA(raw, rank=2)(torch.rand(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"base\.type: 'EDSRR' is not registered"):
        WithCEA({'type': 'EDSRR'})


def test_merging_gives_a_whole_checkpoint(tmp_path, capsys):
    base = write_base(tmp_path, 'MSRResNet')
    options = options_of('MSRResNet', pretrained_base=base, freeze_base=True)
    net = build_network(options)
    awaken(net, steps=2)
    stored = {'params': net.stored_state(), 'params_ema': net.stored_state(), 'network_g': options}
    torch.save(stored, tmp_path / 'cea.pth')
    out = tmp_path / 'out.pth'
    assert main(['merge', base, str(tmp_path / 'cea.pth'), str(out)]) == 0
    assert capsys.readouterr().out == f'{out}: {len(net.state_dict())} weights.\n'
    content = read_checkpoint(out)
    whole = build_network(content['network_g'])  # what the file says is enough
    whole.load_state_dict(content['params_ema'])
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(whole(x), net(x))
    assert main(['merge', base, str(tmp_path / 'cea.pth'), str(out)]) == 2
    assert 'exists already' in capsys.readouterr().err


def test_merging_layers_of_a_network_injected_by_hand(tmp_path):
    net = build('EDSR')
    inject_cea(net, 'body.*', rank=2, width=4)
    torch.save(cea_state_dict(net), tmp_path / 'cea.pth')
    assert merge(write_base(tmp_path, 'EDSR'), str(tmp_path / 'cea.pth'), str(tmp_path / 'out.pth')) == len(
        net.state_dict()
    )
    net.load_state_dict(read_checkpoint(tmp_path / 'out.pth')['params'])


def test_what_cannot_be_merged_is_named(tmp_path):
    net = build_network(options_of('SwinIR', pretrained_base=write_base(tmp_path, 'SwinIR'), freeze_base=True))
    cea, out = tmp_path / 'cea.pth', tmp_path / 'out.pth'
    torch.save({'params': net.stored_state()}, cea)
    with pytest.raises(
        UserError, match=r"does not fit .*EDSR\.pth, which has no module 'layers\.0\.residual_group\.blocks"
    ):
        merge(write_base(tmp_path, 'EDSR'), str(cea), str(out))
    with pytest.raises(UserError, match=r'EDSR\.pth holds more than CEA layers: conv_first\.weight'):
        merge(write_base(tmp_path, 'SwinIR'), write_base(tmp_path, 'EDSR'), str(out))
    assert not list(tmp_path.glob('out*'))


def test_the_docs_tell_the_presets_and_their_option_file_builds():
    text = (ROOT / 'docs' / 'mixing.md').read_text('utf-8')
    rows = [line.split('|')[1:3] for line in text.partition('\n## ')[0].splitlines() if line.startswith('| ')]
    told = {
        kind.strip(): targets.split('`')[1] for kinds, targets in rows if '`' in targets for kind in kinds.split(',')
    }
    assert told == {kind: ' '.join(targets) for kind, targets in AUTO_TARGETS.items()}
    options = yaml.safe_load(text.partition('```yaml')[2].partition('```')[0])['network_g']
    assert options.pop('pretrained_base')
    assert build_network(options).freeze_base
