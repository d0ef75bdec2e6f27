"""``cea check`` says what a run would be, takes real steps and writes nothing; ``cea schema`` knows the same rules."""

import json
import os
import re
import subprocess
import sys

import lmdb
import pytest
import torch
import yaml

from cea_arch.cli import main
from cea_arch.models.cea_model import CEAModel
from cea_arch.training.check import _bytes, _duration, take_steps
from cea_arch.training.option_files import OptionLoader
from tests.conftest import ROOT
from tests.training.test_option_mistakes import FILE, MISTAKES
from tests.training.test_options import FILES


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Run ``cea check`` on options or a file; returns exit code, the table by row name, and all that it said."""
    monkeypatch.chdir(tmp_path)

    def call(opt, *flags):
        if isinstance(opt, dict):
            (tmp_path / 'o.yml').write_text(yaml.safe_dump(opt))
        before = sorted(tmp_path.rglob('*'))
        code = main(['check', '-opt', 'o.yml' if isinstance(opt, dict) else str(opt), *flags])
        assert sorted(tmp_path.rglob('*')) == before
        said = capsys.readouterr()
        rows = (line.partition('  ')[::2] for line in said.out.splitlines())
        return code, {name: text.strip() for name, text in rows}, said

    return call


def test_what_would_be_trained(workplace, check, monkeypatch):
    folder, opt = workplace
    taken = []
    optimize = CEAModel.optimize_parameters
    monkeypatch.setattr(
        CEAModel, 'optimize_parameters', lambda self, i: taken.append((i, len(self.lq))) or optimize(self, i)
    )
    opt['train'] |= {'accumulate': 3, 'max_skipped': 1, 'grad_clip': 1.0}
    code, rows, said = check(opt, '--set', 'train.total_iter=10', '--set', 'logger.keep_last=3')
    assert code == 0
    assert said.err == ''
    assert taken == [(1, 3), (2, 3)]
    count = sum(value.numel() for value in parameters_of(opt).values())
    assert rows['network'].endswith(f': {count:,} parameters')
    assert rows['training data'] == 'train, noise: gaussian_noise, 8 x 1 = 8 samples (100.0 %)'
    assert rows['batch'] == '3 (1 x 3, each computed in 3 parts)'
    assert rows['length'] == '10 iterations = 5.0 epochs of 2'
    assert rows['fft_opt'] == 'CEAFFTLoss(loss_weight 0.01)'
    assert rows['optimizer'] == 'AdamW(lr 0.001)'
    assert rows['switches'] == 'ema_decay 0.9, grad_clip 1.0'
    assert rows['validation'] == 's25: 8 images'
    assert rows['scores'] == 'every 4 iterations, psnr, psnr8'
    size = _bytes(2 * 4 * count)
    assert rows['checkpoints'] == f'{folder}/experiments/run: every 2 iterations, 3 kept, each {size} and its ' + (
        'training state'
    )
    last = said.out.splitlines()[-1]
    assert last.startswith('A step takes ')
    assert '10 take about ' in last
    assert 'peak memory ' in last
    assert re.search(r'; a training state has \d+\.\d MiB\.$', last)


def parameters_of(opt):
    from basicsr.archs import build_network

    return dict(build_network(opt['network_g']).named_parameters())


def test_several_processes_and_no_steps(workplace, check):
    _, opt = workplace
    opt['datasets']['train']['sources']['noise']['repeat'] = 6
    code, rows, said = check(opt, '--processes', '4', '--steps', '0')
    assert code == 0
    assert rows['batch'] == '12 (4 x 3)'
    assert rows['length'] == '7 iterations = 1.8 epochs of 4'
    assert 'A step takes' not in said.out
    opt['datasets']['train']['sources']['noise']['repeat'] = 1
    code, _, said = check(opt, '--processes', '4')
    assert code == 2
    assert 'a batch of 12 is more than the 8 samples of an epoch' in said.err


def test_missing_data_are_listed_and_the_rest_is_checked(workplace, check):
    _, opt = workplace
    opt['datasets']['val_2']['sources']['all']['dataroot_gt'] = 'nowhere.lmdb'
    opt['path']['pretrain_network_g'] = 'lost.pth'
    code, rows, said = check(opt)
    assert code == 2
    assert said.out.splitlines()[-3:] == [
        'Missing:',
        '  datasets.val_2.sources.all.dataroot_gt: nowhere.lmdb',
        '  path.pretrain_network_g: lost.pth',
    ]
    assert rows['validation'] == 's25: 8 images'
    assert 's50: not all there' in said.out
    assert check(opt, '--allow-missing')[0] == 0
    code, _, said = check(opt, '--allow-missing', '--set', 'network_g.rank=0')
    assert code == 2
    assert said.err.startswith("cea check: setting 'network_g.rank=0': network_g: ")


def test_what_would_be_tested(workplace, check):
    folder, opt = workplace
    test = {key: opt[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'val')}
    test['datasets'] = {'test_1': opt['datasets']['val_1']}
    test['path'] = {'pretrain_network_g': 'w.pth', 'param_key_g': 'params_ema'}
    state = parameters_of(opt)
    torch.save({'params_ema': state}, folder / 'w.pth')
    code, rows, _ = check(test)
    assert code == 0
    assert rows['weights'] == 'w.pth, params_ema'
    assert rows['test data'] == 's25: 8 images'
    assert rows['results'] == f'{folder}/results/run'
    torch.save({'params_ema': {**state, 'more': torch.zeros(1)}}, folder / 'w.pth')
    code, _, said = check(test)
    assert code == 2
    assert 'w.pth does not fit network_g' in said.err
    code, _, said = check(test, '--set', 'path={}')
    assert code == 2
    assert 'path.pretrain_network_g is missing' in said.err


@pytest.mark.parametrize('path', FILES, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_option_file_passes_up_to_missing_data(path, check):
    code, rows, said = check(path, '--allow-missing', '--steps', '0')
    assert code == 0, said.err
    assert rows['network']
    assert 'Missing:' in rows


def test_steps_run_over_the_end_of_an_epoch(workplace):
    from argparse import Namespace

    from cea_arch.training.options import read_options
    from cea_arch.training.pipeline import parsed_options

    folder, opt = workplace
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    args = Namespace(command='check', opt='o.yml', root='.', set=None, force_yml=None)
    steps = take_steps(parsed_options(args, read_options('o.yml'), True), 5)
    assert 0 <= steps.waited < steps.seconds
    assert steps.memory > 2**20


def test_words_for_sizes_and_times():
    assert [_duration(seconds) for seconds in (1, 119, 150, 7200, 86400 * 3)] == [
        '1 seconds',
        '119 seconds',
        '2.5 minutes',
        '2.0 hours',
        '3.0 days',
    ]
    assert [_bytes(count) for count in (2**19, 3 * 2**30)] == ['0.5 MiB', '3.0 GiB']


@pytest.fixture(scope='module')
def validator():
    jsonschema = pytest.importorskip('jsonschema')
    from cea_arch.training.option_rules import editors_schema

    jsonschema.Draft202012Validator.check_schema(editors_schema())
    return jsonschema.Draft202012Validator(editors_schema())


@pytest.mark.parametrize('path', FILES, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_option_files_keep_the_schema(validator, path):
    validator.validate(yaml.load(path.read_text(), Loader=OptionLoader))


STATIC = [
    name for name, (_, _, said) in MISTAKES.items() if any(w in said for w in ('must be', 'unknown key', 'missing.'))
]
BY_VALUES = ('warm-up longer than the training', 'rate that rises', 'section left empty')


@pytest.mark.parametrize('name', [name for name in STATIC if name not in BY_VALUES])
def test_the_schema_refuses_what_the_check_refuses(validator, name):
    right, wrong, _ = MISTAKES[name]
    assert validator.is_valid(yaml.load(FILE, Loader=OptionLoader))
    assert not validator.is_valid(yaml.load(FILE.replace(right, wrong), Loader=OptionLoader))


@pytest.mark.parametrize(
    ('text', 'right'),
    [
        ('{inherits: a.yml}', True),
        ('{inherits: [a.yml, b.yml], train: {total_iter: 3, fft_opt: ~}, datasets: {val_2: ~}}', True),
        ('{inherits: a.yml, datasets: {train: {sources: {x: {repeat: 2, sigmas: ~}}}}}', True),
        ('{inherits: a.yml, network_g: {rank: 4}, model_type: CEAModel}', True),
        ('{inherits: 3}', False),
        ('{inherits: a.yml, train: {total_iter: x}, model_type: CEAModel}', False),
        ('{inherits: a.yml, train: {total_iters: 3}, model_type: CEAModel}', False),
        ('{train: {total_iter: 3}}', False),
    ],
)
def test_the_schema_knows_files_that_inherit(validator, text, right):
    assert validator.is_valid(yaml.load(text, Loader=OptionLoader)) == right


def test_cea_schema_prints_it(capsys):
    assert main(['schema']) == 0
    schema = json.loads(capsys.readouterr().out)
    cases = schema['$defs']['network']['allOf']
    ceanet = next(case['then'] for case in cases if case['if']['properties']['type']['const'] == 'CEAIR')
    assert ceanet['properties']['rank'] == {'type': 'integer'}
    assert ceanet['properties']['dim'] == {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}


def test_absent_lmdbs_name_the_command_that_makes_them_and_counts_are_compared(workplace, check):
    folder, opt = workplace
    opt['datasets']['train']['sources']['rain'] = {
        'degradation': 'paired',
        'dataroot_lq': 'datasets/aio/train/lol_lq.lmdb',
        'dataroot_gt': 'datasets/aio/train/raintrainl_gt.lmdb',
    }
    code, _, said = check(opt)
    assert code == 2
    assert said.out.splitlines()[-1] == (
        '`python datasets_prep/prepare_aio5.py --raw DOWNLOADS` makes such LMDBs of what you have downloaded.'
    )
    del opt['datasets']['train']['sources']['rain']
    (folder / 'datasets/aio/train').mkdir(parents=True)
    (folder / 'x.lmdb').rename(folder / 'datasets/aio/train/bsd400_wed.lmdb')
    for dataset in opt['datasets'].values():
        for source in dataset['sources'].values():
            source['dataroot_gt'] = 'datasets/aio/train/bsd400_wed.lmdb'
    code, _, said = check(opt, '--steps', '0')
    assert code == 0
    assert 'datasets/aio/train/bsd400_wed.lmdb holds 8 images; as published there are 5,144' in said.out


SWINIR = {'type': 'SwinIR', 'upscale': 1, 'img_size': 16, 'window_size': 8, 'embed_dim': 12}
SWINIR |= {'depths': [2], 'num_heads': [2]}
TWICE = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}


@pytest.mark.parametrize('command', ['check', 'train'])
@pytest.mark.parametrize(
    ('network', 'size', 'message'),
    [
        (TWICE, 16, 'network_g makes 32 x 32 pixels of patches of 16 x 16 pixels, but clean ones have 16 x 16'),
        (SWINIR, 20, 'network_g cannot be used of patches of 20 x 20 pixels: '),
    ],
    ids=['scale', 'window'],
)
def test_patches_that_the_network_cannot_take(workplace, capsys, command, network, size, message):
    folder, opt = workplace
    opt['network_g'] = network
    opt['datasets']['train'] |= {'gt_size': size, 'num_worker_per_gpu': 1}
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    assert main([command, '-opt', 'o.yml']) == 2
    assert message in capsys.readouterr().err
    assert not (folder / 'experiments').exists()


def test_a_step_that_fails_ends_the_check_though_there_are_workers(workplace):
    folder, opt = workplace
    with lmdb.open(str(folder / 'x.lmdb')) as environment, environment.begin(write=True) as transaction:
        for number in range(8):
            transaction.put(f'{number}'.encode(), b'x')
    opt['datasets'] = {'train': opt['datasets']['train'] | {'num_worker_per_gpu': 2}}
    (folder / 'o.yml').write_text(yaml.safe_dump(opt))
    command = [sys.executable, '-m', 'cea_arch.cli', 'check', '-opt', 'o.yml']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert 'not a picture of' in done.stderr


def test_more_steps_than_the_schedule_has(workplace, check):
    _, opt = workplace
    opt['train']['total_iter'] = 2
    opt['train']['scheduler']['periods'] = [2]
    code, _, said = check(opt, '--steps', '5')
    assert code == 0
    assert 'A step takes' in said.out
