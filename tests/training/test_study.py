"""``cea study``: CEAIR against the paper's ablations, alike in data and steps."""

import json

import pytest
import torch
import yaml

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.networks import CEAIR
from cea_arch.training import study


def command(folder, opt, *words):
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    return main(['study', '-opt', 'o.yml', *words])


def parameters(options):
    with torch.device('meta'):
        return sum(p.numel() for p in CEAIR(**{key: v for key, v in options.items() if key != 'type'}).parameters())


@pytest.mark.parametrize(
    ('size', 'variants'),
    [
        ('T', [name for name in study.VARIANTS if name not in ('q', 'k', 'v', 'qk', 'qkv')]),
        ('S', [name for name in study.VARIANTS if name not in ('mixer', 'mixed')]),
    ],
)
def test_every_ablation_of_the_paper_is_a_network_and_can_be_matched(size, variants):
    network = {'type': 'CEAIR', 'size': size}
    counts = {name: parameters(network | study.VARIANTS[name]) for name in variants}
    assert counts['none'] < counts['static'] < counts['cea'] == counts['topk'] == counts['no_rank_norm']
    assert counts['r4'] < counts['cea'] < counts['r16']
    matched = [parameters(study.matched(network | study.VARIANTS[name], network, name)) for name in variants]
    assert max(matched) <= 1.02 * min(matched)
    assert study.matched(network | study.VARIANTS['cea'], network, 'cea') == network


def test_widths_that_cannot_be_matched(monkeypatch):
    monkeypatch.setattr(study, 'MOST_DIFFERENCE', 1e-6)
    network = {'type': 'CEAIR', 'size': 'S'}
    with pytest.raises(UserError, match='variant none: no width gives about the 9,711,526 parameters that the option'):
        study.matched(network | study.VARIANTS['none'], network, 'none')


def test_a_study_trains_each_variant_once(workplace, capsys, monkeypatch):
    """Every run is an ordinary training, with its own seed; what is done stays done."""
    folder, opt = workplace
    opt['train']['total_iter'] = 1
    opt['val'] |= {'save_img': False}
    opt['datasets']['val_1']['group'] = opt['datasets']['val_2']['group'] = 'noise'
    words = ['--variants', 'none', 'cea', '--seeds', '3', '--jobs', '2']
    assert command(folder, opt, *words) == 0
    assert capsys.readouterr().err.count('training') == 2
    content = json.loads((folder / 'experiments/run_study/study.json').read_text())
    assert set(content['psnr']) == {'none_s3', 'cea_s3'}
    scores = content['psnr']['cea_s3']
    assert len(content['residuals']['cea'][1]) == len(content['residuals']['cea'][0]) > 0
    assert scores['**mean of noise**'] == pytest.approx((scores['s25'] + scores['s50']) / 2)
    options = yaml.safe_load((folder / 'experiments/run_none_s3/options.yml').read_text())
    assert options['manual_seed'] == 3
    assert options['network_g']['modulate'] == []
    monkeypatch.setattr(study.subprocess, 'run', lambda *args, **options: pytest.fail('trained again'))
    assert command(folder, opt, *words) == 0
    assert capsys.readouterr().out == (folder / 'experiments/run_study/study.md').read_text()


def test_what_cea_does_is_told_by_site():
    torch.manual_seed(0)
    tiny = {'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'cea_width': 8, 'modulate': ['fuse']}
    net = CEAIR(**tiny)
    images = [torch.rand(1, 3, 24, 32), torch.rand(1, 3, 24, 32) * torch.tensor([0.9, 0.2, 0.1])[:, None, None]]
    seen = []  # Y and Y - dY at the first site that runs
    fuse = net.fuse[2]
    fuse.register_forward_hook(lambda module, args, out: seen.append((out, module.conv(torch.cat(args, dim=1)))))
    found = study.residuals(net, images)
    assert list(found) == ['fuse.0.cea', 'fuse.1.cea', 'fuse.2.cea']
    ratios = [((whole - plain).norm() / plain.norm()).item() for whole, plain in seen]
    assert found['fuse.2.cea'][0] == pytest.approx(sum(ratios) / 2, rel=1e-4)
    assert all(-1 < cosine < 0.9999 for _, cosine in found.values())
    assert all(cosine == pytest.approx(1) for _, cosine in study.residuals(net, [images[0]] * 2).values())
    static = study.residuals(CEAIR(**tiny, factors='static'), images)
    assert all(cosine == pytest.approx(1) for _, cosine in static.values())
    assert '| cea | fuse.2.cea | ' in study.residual_table({'cea': (found, found)})


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
        ({'network_g': {'type': 'SRVGGNetCompact'}}, [], 'cea study varies CEAIR; network_g is SRVGGNetCompact.'),
        ({'val': {'val_freq': 1}}, [], 'cea study needs psnr among val.metrics'),
        ({}, ['--set', 'path.pretrain_network_g=o.yml'], 'cea study trains from nothing: path.pretrain_network_g must'),
        (
            {},
            ['--variants', 'qk'],
            "network 'CEAIR' cannot be built: modulate may hold mixer, mixed, ffn, fuse, got 'q'",
        ),
    ],
)
def test_what_cannot_be_studied(workplace, capsys, change, words, message):
    folder, opt = workplace
    assert command(folder, opt | change, *words) == 2
    assert message in capsys.readouterr().err
