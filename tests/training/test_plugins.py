"""Other people's packages: networks, models and data sets that a module or a file registers."""

import cea_arch  # noqa: F401, I001  before basicsr
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from cea_arch import plugins
from cea_arch.archs.cea_arch import register
from cea_arch.checkpoints import read_checkpoint, write_checkpoint
from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.networks.from_file import build_network, load_network
from tests.conftest import ROOT
from tests.test_compat import REGISTERED, run

PLUGIN = str(ROOT / 'tests/training/stand_in_plugin.py')
SET = {'type': 'StandInDataset', 'how_many': 2, 'name': 't'}
WINDOWED = {'type': 'WithCEA', 'base': {'type': 'StandInNet', 'window_size': 8}, 'targets': ['body.0']}


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def options(**changes):
    opt = {
        'name': 'run',
        'model_type': 'StandInModel',
        'plugins': [PLUGIN],
        'scale': 1,
        'num_gpu': 0,
        'datasets': {'train': SET | {'num_worker_per_gpu': 1, 'batch_size_per_gpu': 2}, 'val': SET | {'name': 'v'}},
        'network_g': WINDOWED,
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-3},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [100]},
            'total_iter': 2,
            'pixel_opt': {'type': 'L1Loss'},
        },
        'val': {'val_freq': 2, 'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False},
    }
    Path('o.yml').write_text(yaml.safe_dump(opt | changes))
    return 'o.yml'


def test_a_model_of_others_trains_a_network_of_theirs_with_cea_inside(capsys, tmp_path):
    assert main(['train', '-opt', options()]) == 0
    weights = 'experiments/run/models/net_g_latest.pth'
    assert 'network_g' not in read_checkpoint(weights)  # their model writes it
    (tmp_path / 'in').mkdir()
    cv2.imwrite('in/a.png', np.full((20, 27, 3), 90, np.uint8))
    capsys.readouterr()
    assert main(['restore', 'in', '-m', weights]) == 2
    assert 'does not say what network it holds' in (said := capsys.readouterr().err)
    assert '`-opt OPTIONS.yml` takes them' in said
    assert main(['restore', 'in', '-m', weights, '-opt', 'o.yml']) == 0
    assert Path('restored/a.png').is_file()
    assert main(['info', weights, '-opt', 'o.yml']) == 0
    assert "'StandInNet'" in capsys.readouterr().out


def test_a_file_of_weights_names_its_plugins_and_imports_none(capsys, monkeypatch):
    assert main(['train', '-opt', options(model_type='CEAModel')]) == 0
    weights = 'experiments/run/models/net_g_latest.pth'
    content = read_checkpoint(weights)
    assert content['plugins'] == ['stand_in_plugin.py']
    assert content['network_g'] == WINDOWED
    assert type(content['network_g']) is dict
    kept = yaml.safe_load(Path('experiments/run/options.yml').read_text())
    assert kept['plugins'] == [PLUGIN]
    code = f"import sys; from cea_arch.cli import main; sys.exit(main(['info', {str(Path(weights).absolute())!r}"
    found = run(f'{code}]))')
    assert found.returncode == 2
    assert "'StandInNet' is not registered" in found.stderr
    assert '--plugin stand_in_plugin.py imports them' in found.stderr
    assert main(['info', weights, '--plugin', PLUGIN]) == 0


def test_weights_alone_of_a_network_that_takes_multiples_are_checked_and_tell_their_plugins(capsys):
    pytest.importorskip('safetensors', reason='needs the extra: pip install -e ".[safetensors]"')
    plugins.load_plugins([PLUGIN])
    options()
    net = build_network(WINDOWED)
    write_checkpoint({'params': net.state_dict()}, 'a.pth')
    assert main(['export', 'a.safetensors', '-m', 'a.pth', '-opt', 'o.yml']) == 0
    assert 'within 0.0e+00 of the network' in capsys.readouterr().out
    content = read_checkpoint('a.safetensors')
    assert content['plugins'] == ['stand_in_plugin.py']
    x = torch.rand(1, 3, 16, 8)
    assert torch.equal(load_network('a.safetensors')(x), net.eval()(x))
    assert main(['export', 'none/a.safetensors', '-m', 'a.pth', '-opt', 'o.yml']) == 2
    assert 'there is no folder none' in capsys.readouterr().err


def test_a_network_that_lays_out_its_batch_in_python_is_exported_for_one_picture(capsys):
    plugins.load_plugins([PLUGIN])
    net = build_network({'type': 'StandInNet'}).eval()
    write_checkpoint({'params': net.state_dict(), 'network_g': {'type': 'StandInNet'}}, 'a.pth')
    assert main(['export', 'a.pt2', '-m', 'a.pth']) == 0
    assert 'One picture at a time' in capsys.readouterr().out
    program = torch.export.load('a.pt2').module()
    x = torch.rand(1, 3, 20, 36)
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=1e-5)


def test_what_a_model_reads_of_the_network_must_be_there(capsys):
    assert main(['train', '-opt', options(network_g={'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3})]) == 2
    said = 'network_g.window_size is missing: model_type StandInModel reads it.'
    assert said in capsys.readouterr().err
    assert not Path('experiments').exists()


def test_optimizers_that_a_model_of_others_leaves_to_basicsr_are_tried_first(capsys):
    train = yaml.safe_load(Path(options()).read_text())['train']
    for change, said in (
        ({'type': 'Lion'}, 'train.optim_g cannot be used: NotImplementedError: optimizer Lion is not'),
        ({'nothing': 1}, 'train.optim_g cannot be used: TypeError: Adam.__init__() got an unexpected keyword'),
    ):
        changed = train | {'optim_g': train['optim_g'] | change}
        assert main(['train', '-opt', options(train=changed)]) == 2
        assert said in (found := capsys.readouterr().err)
        assert len(found.splitlines()) == 1
        assert not Path('experiments').exists()


def test_a_first_step_that_fails_is_a_sentence(capsys):
    broken = {'type': 'StandInNet', 'window_size': 5}
    assert main(['check', '-opt', options(network_g=broken)]) == 2
    said = capsys.readouterr().err
    assert 'these options cannot be trained: RuntimeError: ' in said
    assert 'stand_in_plugin.py, line ' in said


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('import nothing_like_it', "ModuleNotFoundError: No module named 'nothing_like_it' ({file}, line 1)"),
        ('\n\nraise RuntimeError("no GPU")', 'RuntimeError: no GPU ({file}, line 3)'),
        ('x = = 1', 'SyntaxError: invalid syntax'),
        (
            'from basicsr.utils.registry import LOSS_REGISTRY\n@LOSS_REGISTRY.register()\nclass CEAFFTLoss: pass',
            "it registers 'CEAFFTLoss' in LOSS_REGISTRY, which {ours} has registered already",
        ),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_line(text, expected, tmp_path, capsys):
    file = tmp_path / f'plugin_{abs(hash(text))}.py'
    file.write_text(text)
    assert main(['schema', '--plugin', str(file)]) == 2
    said = capsys.readouterr().err
    assert f'--plugin: {file} cannot be imported: ' in said
    ours = ROOT / 'cea_arch/losses/fft_loss.py'
    assert expected.format(file=file, ours=ours) in said


def test_plugins_that_are_not_there(capsys, tmp_path):
    for name, expected in (('none_such', "No module named 'none_such'"), ('none.py', 'none.py does not exist')):
        assert main(['schema', '--plugin', name]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'leave.py').write_text('raise SystemExit(3)')
    for name, expected in (
        ('bare', 'bare is a folder without __init__.py'),
        ('plug/a.txt', "expected a module, such as hat.archs, or a file NAME.py; got 'plug/a.txt'"),
        ('', "got ''"),
        ('leave.py', 'leave.py cannot be imported: SystemExit: 3'),
    ):
        assert main(['schema', '--plugin', name]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / 'json.py').write_text('')
    assert main(['schema', '--plugin', 'json.py']) == 2
    assert 'there is another module called json' in capsys.readouterr().err
    assert main(['check', '-opt', options(plugins='hat')]) == 2
    assert "o.yml, line 26: plugins must be a list of modules or files, got 'hat'" in capsys.readouterr().err
    assert main(['check', '-opt', options(plugins=[], model_type='HATModel')]) == 2
    assert '`plugins: [MODULE]` in the option file' in capsys.readouterr().err


LOOK_ALIKES = """
import torch
from basicsr.utils import registry
for kind, names in {'LOSS': ['FFTLoss'], 'DATASET': ['AllInOneDataset', 'CompositeDataset'], 'ARCH': ['PromptIR'],
                    'METRIC': ['calculate_psnr_float', 'calculate_lpips'], 'MODEL': ['ImageRestorationModel']}.items():
    for name in names:
        getattr(registry, kind + '_REGISTRY').register(type(name, (), {}))
"""


# basicsr as it is without us, on a torchvision that has what it wants
ALONE = """
import sys, types
old = types.ModuleType('torchvision.transforms.functional_tensor')
old.rgb_to_grayscale = None
sys.modules[old.__name__] = old
import basicsr
"""


def test_names_are_ours_alone():
    found = run(ALONE + LOOK_ALIKES + 'import cea_arch' + REGISTERED)
    assert found.returncode == 0, found.stderr


def test_a_name_of_ours_that_is_taken_is_a_sentence_with_both_files():
    taken = type('CEAModel', (), {'__module__': __name__})
    registry = dict(iter(plugins.registry('MODEL')))
    with pytest.raises(UserError) as error:
        register({'LOSS': (type('AnyLoss', (), {}),), 'MODEL': (taken,)})
    ours = ROOT / 'cea_arch/models/cea_model.py'
    said = f"two files register 'CEAModel' in MODEL_REGISTRY of basicsr: {ours} and {__file__}. Leave one of them out."
    assert str(error.value) == said
    assert dict(iter(plugins.registry('MODEL'))) == registry
    assert 'AnyLoss' not in plugins.registry('LOSS')
