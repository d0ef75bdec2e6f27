"""``cea study``: CEANet against its contrasts, alike in data, steps and parameters."""

import json

import pytest
import torch
import yaml
from torch import nn

from cea_arch import study
from cea_arch.archs.ceanet_arch import CEANet
from cea_arch.cli import main
from cea_arch.errors import UserError


def command(folder, opt, *words):
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    return main(['study', '-opt', 'o.yml', *words])


@pytest.mark.parametrize('size', ['T', 'S'])
def test_variants_have_about_the_same_number_of_parameters(size):
    networks = study.matched({'type': 'CEANet', 'size': size}, list(study.VARIANTS))
    counts = {}
    for name, options in networks.items():
        net = CEANet(**{key: value for key, value in options.items() if key != 'type'})
        counts[name] = sum(p.numel() for p in net.parameters())
        assert hasattr(net.refinement[0], 'cea') == (name != 'none')
    assert networks['cea'] == {'type': 'CEANet', 'size': size}
    assert max(counts.values()) <= 1.02 * min(counts.values())


@pytest.mark.parametrize('variant', study.VARIANTS)
def test_variants_start_as_the_network_without_cea_layers(variant):
    torch.manual_seed(0)
    bare = CEANet(size='T', cea_stages=[])
    for weight in bare.parameters():  # away from the identity that a fresh network is
        nn.init.normal_(weight, weight.mean().item(), 0.1)
    options = study.matched({'type': 'CEANet', 'size': 'T'}, [variant])[variant]
    net = CEANet(**{key: value for key, value in options.items() if key != 'type'})
    weights = bare.state_dict() | {'latent.0.cea.gamma': torch.ones(128)}  # a CEA layer of the start is left out
    net.load_state_dict(study.started(options, weights, 'bare.pth', seed=1))
    x = torch.rand(1, 3, 40, 24)
    assert (bare(x) - x).abs().mean() > 0.01
    torch.testing.assert_close(net(x), bare(x))
    net(x).square().sum().backward()
    assert net.refinement[0].ffn.project_out.weight.grad[:, -1].abs().sum() > 0  # what is new learns


@pytest.mark.parametrize(
    ('other', 'complaint'),
    [
        ({'ffn_expansion_factor': 4.0}, 'of another shape'),
        ({'size': 'S'}, 'of another shape'),
    ],
)
def test_a_start_of_another_network_is_refused(other, complaint):
    weights = CEANet(**{'size': 'T'} | other).state_dict()
    with pytest.raises(UserError, match=f'does not fit CEANet without CEA layers: .* {complaint}'):
        study.started({'type': 'CEANet', 'size': 'T'}, weights, 'net.pth', seed=0)


def test_widths_that_cannot_be_matched(monkeypatch):
    monkeypatch.setattr(study, 'MOST_DIFFERENCE', 1e-6)
    with pytest.raises(UserError, match='variant none: no width gives about the 796,483 parameters that CEA has'):
        study.matched({'type': 'CEANet', 'size': 'T'}, ['none'])


def test_a_study_trains_each_variant_once(workplace, capsys, monkeypatch):
    """Every run is an ordinary training, with its own seed; what is done stays done."""
    folder, opt = workplace
    opt['train']['total_iter'] = 1
    opt['val'] |= {'save_img': False}
    opt['datasets']['val_1']['group'] = opt['datasets']['val_2']['group'] = 'noise'
    bare = {key: value for key, value in opt['network_g'].items() if key != 'type'} | {'cea_stages': []}
    torch.save({'params': CEANet(**bare).state_dict()}, folder / 'bare.pth')
    opt['path'] = {'pretrain_network_g': 'bare.pth'}
    words = ['--variants', 'none', 'cea', '--seeds', '3', '--jobs', '2']
    assert command(folder, opt, *words) == 0
    assert capsys.readouterr().err.count('training') == 2
    content = json.loads((folder / 'experiments/run_study/study.json').read_text())
    assert set(content['psnr']) == {'none_s3', 'cea_s3'}
    scores = content['psnr']['cea_s3']
    assert scores['**mean of noise**'] == pytest.approx((scores['s25'] + scores['s50']) / 2)
    options = yaml.safe_load((folder / 'experiments/run_none_s3/options.yml').read_text())
    assert options['manual_seed'] == 3
    assert options['network_g']['cea_stages'] == []
    monkeypatch.setattr(study.subprocess, 'run', lambda *args, **options: pytest.fail('trained again'))
    assert command(folder, opt, *words) == 0
    assert capsys.readouterr().out == (folder / 'experiments/run_study/study.md').read_text()


def test_the_table_pairs_seeds():
    results = {('none', 0): 20.0, ('none', 1): 22.0, ('none', 2): 24.0, ('cea', 0): 21.0, ('cea', 1): 24.0}
    text = study.table({key: {'rain': value} for key, value in results.items()}, {'none': 1000, 'cea': 999})
    assert text.splitlines()[:5] == [
        '| variant | parameters | seeds | rain |',
        '|---|---:|---:|---:|',
        '| none | 1,000 | 3 | 22.00 ± 2.00 |',
        '| cea | 999 | 2 | 22.50 ± 2.12 |',
        '| cea - none | | 2 | +1.50 ± 0.71 |',
    ]


def test_a_training_that_fails_is_named(workplace, capsys):
    folder, opt = workplace
    opt['train'] |= {'total_iter': 3, 'max_skipped': 1}
    opt['train']['optim_g'] = {'type': 'SGD', 'lr': 1e30}
    assert command(folder, opt, '--variants', 'cea', '--seeds', '0') == 1
    assert 'run_cea_s0 failed; see experiments/run_study/run_cea_s0.log' in capsys.readouterr().err
    assert 'in a row had a gradient that is not finite' in (folder / 'experiments/run_study/run_cea_s0.log').read_text()


@pytest.mark.parametrize(
    ('change', 'words', 'message'),
    [
        ({}, ['--variants', 'statc'], "variant 'statc' is not known. Did you mean 'static'?"),
        ({'network_g': {'type': 'SRVGGNetCompact'}}, [], 'cea study varies CEANet; network_g is SRVGGNetCompact.'),
        ({'val': {'val_freq': 1}}, [], 'cea study needs psnr among val.metrics'),
    ],
)
def test_what_cannot_be_studied(workplace, capsys, change, words, message):
    folder, opt = workplace
    assert command(folder, opt | change, *words) == 2
    assert message in capsys.readouterr().err
