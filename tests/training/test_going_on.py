"""Going on with a training that was cut off or is done, otherwise than it began: as one expects, or refused."""

import re

import numpy as np
import pytest
import torch

from cea_arch.networks import CEAIR
from tests.training.test_training import log_of, train


def goes_on(folder, opt, **changes):
    """The sentences about what is another, and the learning rates that the log says, of a run that goes on."""
    for key, value in changes.items():
        target = opt
        *path, last = key.split('__')
        for part in path:
            target = target[part]
        target[last] = value
    assert train(folder, opt, '--auto_resume') == 0
    log = log_of(folder)
    said = re.findall(r'Going on: (.*)', log)
    return said, {int(i): float(lr) for i, lr in re.findall(r'iter:\s+(\d+), lr:\(([^,]+),\)', log)}


def cosine(step, period, lr=1e-3):
    return lr * 0.5 * (1 + np.cos(np.pi * step / period))


def test_going_on_for_longer(workplace):
    """A new schedule holds from the present iteration on, as if it had held from the first."""
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 4}
    opt['train']['scheduler']['periods'] = [4]
    opt['logger']['save_checkpoint_freq'] = 4
    assert train(folder, opt) == 0
    said, rates = goes_on(folder, opt, train__total_iter=8, train__scheduler__periods=[8])
    assert said[:2] == ['train.scheduler.periods: [8] (was [4])', 'train.total_iter: 8 (was 4)']
    assert said[2].startswith(
        'The schedule is another one: its learning rate after 4 iterations is 6.913e-04 (was 1.464e-04)'
    )
    assert rates == pytest.approx({i: cosine(i - 1, 8) for i in (5, 6, 7, 8)}, rel=1e-3)
    state = torch.load(folder / 'experiments/run/training_states/8.state', weights_only=True)
    assert state['made_with']['train']['total_iter'] == 8
    assert goes_on(folder, opt, train__total_iter=9, train__scheduler__periods=[9])[1] == pytest.approx(
        {9: cosine(8, 9)}, rel=1e-3
    )


USUAL = [cosine(4, 100), cosine(5, 100)]
STEPS = {'type': 'MultiStepLR', 'milestones': [2, 5], 'gamma': 0.5}
OTHERWISE = {
    'rate': ({'train__optim_g__lr': 5e-4}, 'train.optim_g.lr: 0.0005 (was 0.001)', [rate / 2 for rate in USUAL]),
    'kind': (
        {'train__scheduler': STEPS},
        'train.scheduler.type: MultiStepLR (was CosineAnnealingRestartLR)',
        [5e-4, 2.5e-4],
    ),
    'decay': ({'train__optim_g__weight_decay': 0.1}, 'weight_decay is 0.1 (was 0.01).', USUAL),
    'batch': ({'datasets__train__batch_size_per_gpu': 2}, 'datasets.train.batch_size_per_gpu: 2 (was 3)', USUAL),
    'workers': ({'datasets__train__num_worker_per_gpu': 1}, 'datasets.train.num_worker_per_gpu: 1 (was 0)', USUAL),
    'seed': ({'manual_seed': 5}, 'manual_seed: 5 (was 0)', USUAL),
}


@pytest.mark.parametrize(('changes', 'word', 'rates'), OTHERWISE.values(), ids=OTHERWISE)
def test_going_on_otherwise(workplace, changes, word, rates):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 4}
    opt['logger']['save_checkpoint_freq'] = 4
    assert train(folder, opt) == 0
    said, found = goes_on(folder, opt, train__total_iter=6, **changes)
    assert word in said
    assert found == pytest.approx(dict(zip((5, 6), rates)), rel=1e-3)
    state = torch.load(folder / 'experiments/run/training_states/4.state', weights_only=True)
    assert state['optimizers'][0]['param_groups'][0]['weight_decay'] == 0.01


def test_basicsrs_own_model_goes_on_for_longer_too(workplace):
    folder, opt = workplace
    opt |= {'model_type': 'SRModel', 'scale': 1}
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] = {key: opt['train'][key] for key in ('optim_g', 'scheduler', 'pixel_opt')} | {'total_iter': 4}
    opt['train']['optim_g'] = {'type': 'Adam', 'lr': 1e-3}
    opt['train']['scheduler']['periods'] = [4]
    opt['logger']['save_checkpoint_freq'] = 4
    assert train(folder, opt) == 0
    said, rates = goes_on(folder, opt, train__total_iter=8, train__scheduler__periods=[8])
    assert [sentence.partition(':')[0] for sentence in said] == ['The schedule is another one']
    assert rates == pytest.approx({i: cosine(i - 1, 8) for i in (5, 6, 7, 8)}, rel=1e-3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'network_g': {'type': 'CEAIR', 'size': 'T', 'dim': 16, 'num_blocks': [1, 1, 1, 1]}},
            'network_g.dim: 16 (was 8)',
        ),
        (
            {'network_g': {'type': 'CEAIR', 'size': 'T', 'dim': 8, 'num_blocks': [1, 1, 1, 1], 'rank': 3}},
            'network_g.rank: 3 (was absent)',
        ),
        ({'optim': {'type': 'SGD', 'lr': 1e-3}}, 'of AdamW, and of no use to SGD'),
        ({'total_iter': 1}, 'train.total_iter is 1, but'),
        ({'other': True}, "is of another run than 'run'"),
        ({'start': True}, 'path.pretrain_network_g: weights.pth does not fit network_g'),
    ],
    ids=['size', 'rank', 'optimizer', 'length', 'run', 'start'],
)
def test_what_cannot_go_on_is_one_sentence_and_nothing_is_written(workplace, capsys, change, message):
    folder, opt = workplace
    opt['val'] = {'val_freq': 100, 'save_img': False}
    opt['train'] |= {'total_iter': 2}
    assert train(folder, opt | ({'name': 'first'} if 'other' in change else {})) == 0
    flags = ['--auto_resume']
    if 'network_g' in change:
        opt['network_g'] = change['network_g']
    if 'optim' in change:
        opt['train']['optim_g'] = change['optim']
    if 'total_iter' in change:
        opt['train']['total_iter'] = change['total_iter']
    if 'other' in change:
        opt['path'], flags = {'resume_state': 'experiments/first/training_states/2.state'}, []
    if 'start' in change:
        torch.save({'params': CEAIR(size='T', dim=16, num_blocks=[1, 1, 1, 1]).state_dict()}, folder / 'weights.pth')
        opt |= {'name': 'new', 'path': {'pretrain_network_g': 'weights.pth'}}
        flags = []
    opt['train']['total_iter'] = max(opt['train']['total_iter'], 3) if 'total_iter' not in change else 1
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.name not in ('o.yml', '.')}
    capsys.readouterr()
    assert train(folder, opt, *flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert 'Traceback' not in said
    after = {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.name not in ('o.yml', '.')}
    assert {p for p in after if p.is_file()} == {p for p in before if p.is_file()}
