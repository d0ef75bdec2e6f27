"""``cea study``: networks against the paper's ablations, alike in data and steps."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.networks import CEAIR
from cea_arch.training import study, study_variants
from cea_arch.training.options import read_options
from cea_arch.training.study_variants import OF_CEAIR, find_variants, matched
from tests.conftest import ROOT


def command(folder, opt, *words):
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    return main(['study', '-opt', 'o.yml', *words])


def parameters(options):
    with torch.device('meta'):
        return sum(p.numel() for p in CEAIR(**{key: v for key, v in options.items() if key != 'type'}).parameters())


@pytest.mark.parametrize(
    ('size', 'variants'),
    [
        ('T', [name for name in OF_CEAIR if name not in ('q', 'k', 'v', 'qk', 'qkv')]),
        ('S', ['none', 'q', 'qkv', 'static', 'topk', 'no_rank_norm', 'r2', 'r4', 'r16', 'cea']),
    ],
)
def test_every_ablation_of_the_paper_is_a_network_and_can_be_matched(size, variants):
    network = {'type': 'CEAIR', 'size': size}
    opt = {'network_g': network}
    counts = {name: parameters(network | OF_CEAIR[name]) for name in variants}
    assert counts['none'] < counts['static'] < counts['cea'] == counts['topk'] == counts['no_rank_norm']
    assert counts['r2'] < counts['r4'] < counts['cea'] < counts['r16']
    found = find_variants(opt, variants, match=True)
    assert [one.name for one in found] == variants
    assert max(one.parameters for one in found) <= 1.02 * min(one.parameters for one in found)
    assert [one.network for one in found if one.name == 'cea'] == [network]


def test_widths_that_cannot_be_matched(monkeypatch):
    monkeypatch.setattr(study_variants, 'MOST_DIFFERENCE', 1e-6)
    network = {'type': 'CEAIR', 'size': 'S'}
    with pytest.raises(UserError, match='variant none: no width gives about the 9,711,526 parameters that the option'):
        matched(network | OF_CEAIR['none'], {'network_g': network}, 'none')


HOST = {'type': 'WithCEA', 'base': {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_block': 4}}


def test_variants_of_a_host():
    opt = {'network_g': HOST, 'study': {'width': 'num_feat', 'variants': {'mine': {'type': 'CEAIR', 'size': 'T'}}}}
    found = {one.name: one for one in find_variants(opt, ['none', 'none*1.5', 'static', 'mine', 'cea'], match=True)}
    assert list(found) == ['none', 'none_x1.5', 'static', 'mine', 'cea']
    assert found['none'].network == HOST['base'] | {'num_feat': 18}
    assert found['none'].parameters == found['none_x1.5'].parameters
    assert found['none_x1.5'].longer == 1.5
    assert found['static'].network['factors'] == 'static'
    assert found['static'].network['base']['num_feat'] % 4 == 0  # as its heads want
    assert found['mine'].network == {'type': 'CEAIR', 'size': 'T'}
    assert found['cea'].network == HOST
    whole = found['cea'].parameters
    assert all(abs(found[name].parameters - whole) < 0.3 * whole for name in ('none', 'static'))
    del opt['study']['width']
    with pytest.raises(UserError, match=r'variant none: --match needs study\.width, the name of an option of the base'):
        find_variants(opt, ['none'], match=True)
    opt['network_g'] = {'type': 'RIDNet', 'in_channels': 3, 'mid_channels': 8, 'out_channels': 3}
    assert [one.name for one in find_variants(opt, ['cea', 'mine'], match=False)] == ['cea', 'mine']
    with pytest.raises(UserError, match=r"variant 'none' is not known\..* Known: cea, mine"):
        find_variants(opt, ['none'], match=False)


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
    runs = {run['variant']: run for run in content['runs']}
    assert {name: run['seed'] for name, run in runs.items()} == {'none': 3, 'cea': 3}
    scores = runs['cea']['psnr']
    assert len(runs['cea']['residuals']) > 0
    assert runs['cea']['core_seconds'] > 0
    assert set(runs['cea']['ablated']) == {'s25', 's50', 'mean'}
    assert 'residuals' not in runs['none']
    assert scores['**mean of noise**'] == pytest.approx((scores['s25'] + scores['s50']) / 2)
    assert content['variants']['none']['steps'] == 1
    options = yaml.safe_load((folder / 'experiments/run_none_s3/options.yml').read_text())
    assert options['manual_seed'] == 3
    assert options['network_g']['modulate'] == []
    monkeypatch.setattr(study.subprocess, 'Popen', lambda *args, **options: pytest.fail('trained again'))
    assert command(folder, opt, *words) == 0
    written = (folder / 'experiments/run_study/study.md').read_text()
    assert capsys.readouterr().out == written
    # and is not taken for what other options would have trained
    opt['datasets']['train']['gt_size'] += 8
    assert command(folder, opt, *words) == 2
    said = capsys.readouterr().err
    assert 'run_none_s3 was begun with other options: datasets.train.gt_size: 24 (was 16). Give this study a' in said
    opt['datasets']['train']['gt_size'] -= 8
    # what other calls have trained stays in the tables
    assert command(folder, opt, '--variants', 'cea', '--seeds', '3') == 0
    assert '| none | ' in capsys.readouterr().out
    assert main(['report', str(folder / 'experiments/run_study/study.json')]) == 0
    assert capsys.readouterr().out == (folder / 'experiments/run_study/study.md').read_text()


def test_a_study_of_a_network_in_a_file_of_ones_own(workplace, capsys):
    folder, opt = workplace
    opt['plugins'] = [str(ROOT / 'tests/training/naf_like.py')]
    opt['train']['total_iter'] = 1
    opt['val'] |= {'save_img': False}
    base = {'type': 'NAFLike', 'width': 8}
    opt['network_g'] = {'type': 'WithCEA', 'base': base, 'targets': ['encoders.0.0', 'middle.*'], 'rank': 2}
    opt['study'] = {'width': 'width'}
    assert command(folder, opt, '--match', '--variants', 'none', 'cea', '--seeds', '0', '--jobs', '2') == 0
    content = json.loads((folder / 'experiments/run_study/study.json').read_text())
    widths = {name: v['network_g'].get('base', v['network_g'])['width'] for name, v in content['variants'].items()}
    assert widths['cea'] == 8 < widths['none']
    sites = next(run['residuals'] for run in content['runs'] if run['variant'] == 'cea')
    assert list(sites) == ['base.encoders.0.0.cea', 'base.middle.0.cea', 'base.middle.1.cea']
    assert '| cea ahead of | seeds |' in capsys.readouterr().out


def test_a_variant_that_trains_longer_has_the_whole_schedule_so(workplace):
    folder, opt = workplace
    opt['train'] |= {'total_iter': 20, 'scheduler': {'type': 'MultiStepLR', 'milestones': [10, 20]}}
    opt['val'] |= {'val_freq': 20}
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    read = read_options('o.yml')
    (longer,) = find_variants(read, ['none*1.5'], match=False)
    found = study._options(read, study.Run(longer, 7, 'x'))
    assert (found['train']['total_iter'], found['val']['val_freq'], found['manual_seed']) == (30, 30, 7)
    assert found['train']['scheduler']['milestones'] == [15, 30]
    assert read['train']['scheduler']['milestones'] == [10, 20]


def test_a_study_that_is_stopped_says_how_far_it_came(workplace, capsys):
    folder, opt = workplace
    opt['train'] |= {'total_iter': 100000, 'scheduler': {'type': 'MultiStepLR', 'milestones': [100000]}}
    opt['val'] |= {'val_freq': 100000, 'save_img': False}
    assert command(folder, opt, '--variants', 'none', 'cea', '--seeds', '0', '--hours', '0') == 1
    assert '0 of 2 trainings are done; the same command goes on.' in capsys.readouterr().err
    words = ['study', '-opt', 'o.yml', '--variants', 'none', 'cea', '--seeds', '0']
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from cea_arch.cli import main; sys.exit(main({words!r}))'
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, cwd=folder)
    log = folder / 'experiments/run_study/run_none_s0.log'
    while not (log.is_file() and 'iter:       1' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(getattr(signal, 'SIGHUP', signal.SIGTERM))  # a closed terminal
    said = process.communicate(timeout=120)[1]
    assert (process.returncode, 'failed' in said) == (1, False), said
    assert '0 of 2 trainings are done; the same command goes on.' in said
    assert 'Stopped by SIGTERM after iteration' in log.read_text()
    assert list(Path(folder, 'experiments/run_none_s0/training_states').glob('*.state'))
    assert not (folder / 'experiments/run_cea_s0').exists()


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


def test_silencing_is_told_in_decibels():
    torch.manual_seed(0)
    net = CEAIR(size='T', dim=8, num_blocks=[1, 1, 1, 1], cea_width=8)
    torch.nn.init.normal_(net.output.weight, std=0.1)
    picture = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        own = net(picture)
    found = study.ablated(net, {'x': [(picture, (own + 0.01).clamp(0, 1))]})
    assert found['x'] == found['mean'] < 0


def test_other_validation_sets_and_metrics_are_scored_without_training(workplace):
    folder, opt = workplace
    opt['train']['total_iter'] = 2
    opt['val'] |= {'save_img': False}
    del opt['datasets']['val_2']

    def scores():
        assert command(folder, opt, '--variants', 'none', '--seeds', '0') == 0
        return json.loads((folder / 'experiments/run_study/study.json').read_text())['runs'][0]['psnr']

    first = scores()
    opt['datasets']['val_2'] = opt['datasets']['val_1'] | {'name': 'again'}
    second = scores()
    assert second == first | {'again': first['s25']}
    opt['val'] = {'val_freq': 2, 'save_img': False, 'protocol': 'basicsr'}
    third = scores()
    assert third.keys() == second.keys()
    assert third != second
    logs = [file.read_text() for file in (folder / 'experiments/run_none_s0').glob('train_*.log')]
    assert ['grad_norm: ' in log for log in logs].count(True) == 1 < len(logs)


def test_a_network_that_was_changed_is_trained_again_or_refused(workplace, capsys):
    folder, opt = workplace
    opt['train']['total_iter'] = 1
    opt['val'] |= {'save_img': False}
    opt['name'] = 'run[1]'
    del opt['datasets']['val_2']  # one set is enough, of one picture too
    words, wider = ['--variants', 'cea', '--seeds', '0'], ['--set', 'network_g.rank=4']

    def row():
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith('| cea | ')).split(' | ')

    assert command(folder, opt, *words) == 0
    first = row()
    assert command(folder, opt, *words, *wider) == 2
    assert 'run[1]_cea_s0 was begun with other options: network_g.rank: 4' in capsys.readouterr().err
    assert command(folder, opt, '--variants', 'cea', '--seeds', '1', *wider) == 2
    assert 'variant cea is another network in experiments/run[1]_study: network_g.rank: 4' in capsys.readouterr().err
    shutil.rmtree(folder / 'experiments/run[1]_cea_s0')
    assert command(folder, opt, *words, *wider) == 0
    second = row()
    assert first[1] != second[1]  # parameters
    assert first[4] == second[4] == '1'  # seeds
    assert float((folder / 'experiments/run[1]_study/run[1]_cea_s0.seconds').read_text()) > 0


def test_a_run_that_ended_while_it_was_scored_is_not_done(tmp_path):
    one = study.Run(study.Variant('none', {}, 1), 0, 'run')
    models = one.folder(tmp_path) / 'models'
    models.mkdir(parents=True)
    opt = {'train': {'total_iter': 5}, 'datasets': {'train': {}, 'val_1': {'name': 's25'}, 'val_2': {'name': 's50'}}}

    def done(iteration, *sets):
        content = {'iteration': iteration, 'sets': {name: {} for name in sets}}
        (one.folder(tmp_path) / 'results.json').write_text(json.dumps(content))
        return study.is_done(one, tmp_path, opt)

    assert not done(5, 's25', 's50')  # the training itself did not come to its end
    (models / 'net_g_latest.pth').touch()
    assert [done(5, 's25', 's50'), done(4, 's25', 's50'), done(5, 's25')] == [True, False, False]


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
        ({}, ['--variants', 'none*0'], 'variant none*0: it must train for some steps.'),
        ({}, ['--variants', 'statc'], "variant 'statc' is not known. Did you mean 'static'?"),
        ({'network_g': {'type': 'SRVGGNetCompact'}}, [], "variant 'none' is not known. Known: cea."),
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
