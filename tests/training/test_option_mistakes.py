"""Mistakes that people make in YAML, and on the command line, each with the sentence that it gets."""

import re

import pytest
import yaml
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.training.option_files import OptionDumper, OptionLoader
from cea_arch.training.option_rules import options_schema
from cea_arch.training.options import read_options
from tests.conftest import ROOT

# what is written instead of what in the file below, and what is said about it
FILE = """\
name: run
model_type: CEAModel
num_gpu: 0
datasets:
  train:
    name: photos
    type: CEADataset
    sources:
      noise: {degradation: gaussian_noise, sigmas: [15, 25], dataroot_gt: photos}
    gt_size: 64
    num_worker_per_gpu: 2
    batch_size_per_gpu: 4
network_g:
  type: CEAIR
  size: T
  rank: 8
train:
  optim_g: {type: AdamW, lr: 1e-3, betas: [0.9, 0.99]}
  scheduler: {type: CosineAnnealingRestartLR, periods: [100, 100], restart_weights: [1, 1]}
  total_iter: 200
  ema_decay: 0.99
  pixel_opt: {type: L1Loss}
val:
  val_freq: 50
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 0}
"""
MISTAKES = {
    'tab': ('  size: T', '\tsize: T', 'o.yml, line 15 (size: T): there is a tab; YAML is indented by spaces alone.'),
    'no space after a colon': (
        'val_freq: 50',
        'val_freq:50',
        'the colon of the line before may want a space after it.',
    ),
    'bracket not closed': (
        '[0.9, 0.99]',
        '[0.9, 0.99',
        "o.yml, line 18 (optim_g: {type: AdamW, lr: 1e-3, betas: [0.9, 0.99}): expected ',' or ']', but got '}'.",
    ),
    'indented too little': (
        '    batch_size_per_gpu: 4',
        '   batch_size_per_gpu: 4',
        'its indentation fits none of the lines above.',
    ),
    'key twice': (
        '  ema_decay: 0.99',
        '  ema_decay: 0.99\n  total_iter: 300',
        "o.yml, line 22 (total_iter: 300): the key 'total_iter' stands in line 20 already.",
    ),
    'not UTF-8': ('name: photos', b'name: Gr\xfcn', 'o.yml, line 6: byte 0xfc is not UTF-8; save the file as UTF-8.'),
    'Python tag': (
        'name: run',
        'name: !!python/object/apply:os.system ["touch hacked"]',
        "'tag:yaml.org,2002:python/object/apply:os.system'; plain YAML alone is read.",
    ),
    'misspelt': ('ema_decay', 'ema_deacy', "train: unknown key 'ema_deacy'. Did you mean 'ema_decay'? Known: accum"),
    'wrong section': (
        '  total_iter: 200',
        '  total_iter: 200\n  print_freq: 10',
        "train: unknown key 'print_freq'. It belongs in logger. Known: accumulate",
    ),
    'number in quotes': (
        'total_iter: 200',
        "total_iter: '200'",
        "train.total_iter must be a whole number of at least 1, got '200'.",
    ),
    'no iterations': (
        'total_iter: 200',
        'total_iter: 0',
        'train.total_iter must be a whole number of at least 1, got 0.',
    ),
    'decimal comma': ('lr: 1e-3', "lr: '0,001'", "train.optim_g.lr must be a number above 0, got '0,001'."),
    'negative rate': ('lr: 1e-3', 'lr: -1e-3', 'train.optim_g.lr must be a number above 0, got -0.001.'),
    'one of two numbers': (
        'betas: [0.9, 0.99]',
        'betas: 0.9',
        'train.optim_g.betas must be a list of 2 values, each a number of at least 0 and below 1, got 0.9.',
    ),
    'decay of one': ('0.99\n', '1\n', 'train.ema_decay must be a number of at least 0 and below 1, got 1.'),
    'lists of unequal length': (
        'restart_weights: [1, 1]',
        'restart_weights: [1]',
        'train.scheduler.restart_weights must have as many numbers as periods, 2; got [1].',
    ),
    'section left empty': ('  pixel_opt: {type: L1Loss}', '  pixel_opt:', 'train has no loss: pixel_opt is missing.'),
    'name instead of a section': (
        'pixel_opt: {type: L1Loss}',
        'pixel_opt: L1Loss',
        "train.pixel_opt must be a mapping, got 'L1Loss'.",
    ),
    'word for a truth value': (
        'save_img: false',
        'save_img: flase',
        "val.save_img must be true or false, got 'flase'.",
    ),
    'all GPUs': ('num_gpu: 0', 'num_gpu: all', "num_gpu must be a whole number of at least 0 or auto, got 'all'."),
    'argument of a metric': (
        'crop_border: 0',
        'crop_boarder: 0',
        "val.metrics.psnr: unknown key 'crop_boarder'. Did you mean 'crop_border'?",
    ),
    'argument of a metric left out': (', crop_border: 0', '', 'val.metrics.psnr.crop_border is missing.'),
    'argument of another kind': ('rank: 8', 'rank: [8]', 'network_g.rank must be a whole number, got [8].'),
    'word that an argument does not know': (
        'pixel_opt: {type: L1Loss}',
        'fft_opt: {type: CEAFFTLoss, norm: none}',
        "train.fft_opt.norm must be one of forward, backward, ortho, got 'none'.",
    ),
    'negative number of GPUs': (
        'num_gpu: 0',
        'num_gpu: -1',
        'num_gpu must be a whole number of at least 0 or auto, got -1.',
    ),
    'no mapping at all': (FILE, '- name: run\n', "o.yml must hold a mapping, got [{'name': 'run'}]."),
    'empty': (FILE, '', 'o.yml: name is missing.'),
    'no number of workers': ('    num_worker_per_gpu: 2\n', '', 'datasets.train.num_worker_per_gpu is missing.'),
    'a folder that is not there': (
        'photos}',
        'fotos}',
        "datasets.train.sources.noise.dataroot_gt: folder 'fotos' does not exist (looked for ",
    ),
    'warm-up longer than the training': (
        'total_iter: 200',
        'total_iter: 200\n  warmup_iter: 200',
        'train.warmup_iter must be below total_iter, 200; got 200.',
    ),
    'rate that rises': (
        'restart_weights: [1, 1]',
        'restart_weights: [1, 1], eta_min: 0.1',
        'train.scheduler.eta_min must be at most optim_g.lr, 0.001; got 0.1.',
    ),
}


FAR = {'section left empty': 5, 'no number of workers': 6}  # lines between what is changed and what is named


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_in_yaml(tmp_path, image_folder, monkeypatch, capsys, name):
    right, wrong, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    image_folder('photos', ['a', 'b', 'c', 'd'], (64, 64))
    assert FILE.count(right) == 1
    wrong = wrong if isinstance(wrong, bytes) else wrong.encode()
    (tmp_path / 'o.yml').write_bytes(FILE.encode().replace(right.encode(), wrong))
    assert main(['train', '-opt', 'o.yml']) == 2
    said = capsys.readouterr().err.strip()
    place = re.match(r'cea train: o\.yml(?:, line (\d+))?[: ]', said)
    assert place, said
    line = FILE[: FILE.index(right)].count('\n') + 1
    assert place[1] is None or abs(int(place[1]) - line) <= FAR.get(name, 1), said
    assert message in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['o.yml', 'photos']


@pytest.fixture
def file(tmp_path):
    (tmp_path / 'o.yml').write_text(FILE)
    return str(tmp_path / 'o.yml')


def test_settings_of_both_kinds(file):
    settings = ['train.optim_g.lr=5e-5', 'train.scheduler.periods.1=300', 'train.grad_clip=0.5', 'val.metrics=~']
    opt = read_options(file, settings, ['train:total_iter=4e2', 'network_g:cea_stages=[latent]', 'val:save_img=true'])
    expected = read_options(file)
    expected['train'] |= {'grad_clip': 0.5, 'total_iter': 400}
    expected['train']['optim_g']['lr'] = 5e-5
    expected['train']['scheduler']['periods'] = [100, 300]
    expected['val']['save_img'] = True
    del expected['val']['metrics']
    expected['network_g']['cea_stages'] = ['latent']
    assert opt == expected
    assert isinstance(opt['train']['total_iter'], int)


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('train.total_iter', "setting 'train.total_iter' must read like train.total_iter=100"),
        ('train.optim.lr=1', "setting 'train.optim.lr=1': train has no section 'optim'. Did you mean 'optim_g'?"),
        ('trian.total_iter=1', "the option file has no section 'trian'. Did you mean 'train'?"),
        ('train.total_iters=1', "train: unknown key 'total_iters'. Did you mean 'total_iter'?"),
        ('train.total_iter=[1', "setting 'train.total_iter=[1', line 1 ([1): expected"),
        ('train.scheduler.periods.2=1', "train.scheduler.periods has 2 items, counted from 0; got '2'"),
        ('train.optim_g.lr.x=1', "train.optim_g has no section 'lr'"),
        ('train.total_iter=many', "train.total_iter must be a whole number of at least 1, got 'many'"),
    ],
)
def test_settings_that_are_refused(file, setting, message):
    with pytest.raises(UserError) as error:
        read_options(file, [setting])
    assert message in str(error.value)
    with pytest.raises(UserError):
        read_options(file, None, [setting.replace('.', ':')])


def test_a_setting_that_is_refused_is_named(file):
    for setting, message in (
        ('train.total_iter=many', 'train.total_iter must be'),
        ('train.scheduler.periods.1=-1', 'train.scheduler.periods[1] must be'),
        ('train.optim_g={type: AdamW, lr: x}', 'train.optim_g.lr must be'),
    ):
        with pytest.raises(UserError, match=re.escape(f'setting {setting!r}: {message}')):
            read_options(file, [setting])


BASICSR = {
    'model_type: SRModel': "train: unknown key 'fft_opt'. Did you mean 'pixel_opt'? Known: ema_decay, optim_g",
    'model_type: ESRGANModel': "unknown key 'fft_opt'. Did you mean 'ldl_opt'? Known: ema_decay, gan_opt, ldl_opt",
}


@pytest.mark.parametrize('model', BASICSR)
def test_keys_of_basicsrs_models_come_from_their_source(file, tmp_path, model):
    text = FILE.replace('model_type: CEAModel', model).replace('AdamW', 'Adam')
    (tmp_path / 'o.yml').write_text(text)
    read_options(file)
    with pytest.raises(UserError) as error:
        read_options(file, ['train.fft_opt={type: CEAFFTLoss}'])
    assert BASICSR[model] in str(error.value)
    with pytest.raises(UserError, match=r"train.optim_g.type must be Adam, got 'AdamW'"):
        read_options(file, ['train.optim_g.type=AdamW'])


def test_keys_of_basicsrs_datasets_come_from_their_source(file):
    paired = '{name: x, type: PairedImageDataset, dataroot_gt: a, dataroot_lq: b, io_backend: {type: disk}, color: y}'
    read_options(file, [f'datasets.val={paired}'])
    with pytest.raises(UserError, match=r"datasets.val: unknown key 'colour'. Did you mean 'color'\?"):
        read_options(file, [f'datasets.val={paired.replace("color", "colour")}'])


def test_what_files_of_the_family_say_and_nothing_reads_is_a_notice(file, capsys):
    val = (
        'datasets.val={name: v, type: SingleImageDataset, dataroot_lq: x, io_backend: {type: disk}, use_shuffle: true}'
    )
    words = [val, 'datasets.train.use_shuffle=true', 'crop_border=4']
    main(['check', '-opt', str(file), '--steps', '0', '--set', *words])
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "cea check: setting 'crop_border=4': crop_border is read by nothing.",
        "cea check: setting 'datasets.train.use_shuffle=true': datasets.train.use_shuffle, and 1 like it, is read by "
        'nothing.',
    ]
    with pytest.raises(UserError, match=r"unknown key 'use_shufle'"):
        read_options(file, ['datasets.train.use_shufle=true'])
    with pytest.raises(UserError, match=r"train: unknown key 'use_shuffle'"):
        read_options(file, ['train.use_shuffle=true'])


def test_every_basicsr_model_and_dataset_takes_its_documented_keys():
    definitions = options_schema()
    models = {case['if']['properties']['model_type']['const']: case['then'] for case in definitions['allOf']}
    for name, keys in {'RealESRGANModel': {'l1_gt_usm', 'resize_prob', 'network_d'}, 'EDVRModel': set()}.items():
        assert keys <= models[name]['properties'].keys()
    assert {'tsa_iter', 'dcn_lr_mul'} <= models['EDVRModel']['properties']['train']['properties'].keys()
    assert 'pretrain_network_d' in models['SRGANModel']['properties']['path']['properties']
    cases = definitions['$defs']['dataset']['allOf']
    datasets = {case['if']['properties']['type']['const']: case['then'] for case in cases}
    assert {'meta_info_file', 'filename_tmpl', 'mean'} <= datasets['PairedImageDataset']['properties'].keys()
    assert {'val_partition', 'num_frame'} <= datasets['REDSDataset']['properties'].keys()


def test_all_mistakes_are_said_at_once_each_by_its_line(tmp_path):
    file = tmp_path / 'o.yml'
    file.write_text(
        f'inherits: {ROOT / "options/cea_demo.yml"}\n'
        'train:\n'
        '  total_iters: 5\n'
        '  optim_g: {lr: -1}\n'
        '  pixel_opt: {type: L1Losss}\n'
        'val: {val_freqq: 3, more: 2}\n'
    )
    with pytest.raises(UserError) as caught:
        read_options(str(file), ['logger.print_freq=x'])
    said = str(caught.value).splitlines()
    assert said[0] == '6 mistakes:'
    for line, (place, words) in zip(
        said[1:],
        [
            ('line 3', "unknown key 'total_iters'. Did you mean 'total_iter'? Known: accumulate"),
            ('line 4', 'train.optim_g.lr must be a number above 0, got -1.'),
            ('line 5', "'L1Losss'. Did you mean 'L1Loss'?"),
            ('line 6', "val: unknown key 'val_freqq'. Did you mean 'val_freq'? Known: "),
            ('line 6', "val: unknown key 'more'."),
            ('logger.print_freq=x', "logger.print_freq must be a whole number of at least 1, got 'x'."),
        ],
        strict=True,
    ):
        assert place in line
        assert words in line


def test_all_folders_that_are_not_there_are_said_at_once_each_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', str(ROOT / 'options/cea_aio5.yml'), '--set', 'num_gpu=0']) == 2
    first, *said, last = capsys.readouterr().err.splitlines()
    folders = [line.split("folder '")[1].split("'")[0] for line in said]
    assert len(folders) == len(set(folders))
    assert first == f'cea train: {len(folders) + int(last.split()[1])} mistakes:'
    assert all(' does not exist (looked for ' in line for line in said)


def test_models_and_data_sets_of_other_packages_may_read_anything(file, monkeypatch):
    class Theirs(SRModel):
        pass

    Theirs.__module__ = 'another.package'
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'Theirs', Theirs)
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, 'Their', type('Their', (), {'__module__': 'another.package'}))
    settings = ['model_type=Theirs', 'train.optim_g.type=Lion', 'more=1', 'train.more=1', 'val.more=1', 'path.more=x']
    read_options(file, [*settings, 'datasets.val={name: x, type: Their, more: 1}'])
    with pytest.raises(UserError, match=r"train.total_iter must be a whole number of at least 1, got 'x'"):
        read_options(file, [*settings, 'train.total_iter=x'])


def test_merged_mappings_are_no_repeated_keys():
    text = 'a: &a {lr: 1}\nb: &b {<<: *a, lr: 2}\nc: {<<: *b, x: 3}\n'
    assert yaml.load(text, Loader=OptionLoader) == {'a': {'lr': 1}, 'b': {'lr': 2}, 'c': {'lr': 2, 'x': 3}}


def test_whole_numbers_that_are_called_floats():
    assert yaml.load('[!!float 1600, !!float 5e3, 5e3, !!float 2, 2.0]', Loader=OptionLoader) == [
        1600,
        5000,
        5000,
        2,
        2,
    ]
    kinds = [type(n) for n in yaml.load('[!!float 1600, !!float 5e3, 2.0, !!float 0.5]', Loader=OptionLoader)]
    assert kinds == [int, int, float, float]


def test_numbers_survive_a_round_trip():
    values = [1e-5, 0.001, 1000000, 2.5e-12, '1e-3', '0.5', 'x: y', None, True, 'off', 'Grün', [1, [2.5]], {'a': {}}]
    text = yaml.dump(values, Dumper=OptionDumper)
    assert yaml.load(text, Loader=OptionLoader) == values
