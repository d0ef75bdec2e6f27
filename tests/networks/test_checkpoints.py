"""Files of weights that explain themselves; `cea info` and `cea doctor`."""

import pickle

import pytest
import torch

from cea_arch.checkpoints import read_checkpoint, write_checkpoint
from cea_arch.cli import main
from cea_arch.compat import has_basicsr
from cea_arch.errors import UserError
from cea_arch.layers import CEALayer
from cea_arch.networks.cea_ir import CEAIR, SIZES
from cea_arch.networks.from_file import build_network, load_network, network_options
from tests.networks.test_cea_ir import TINY, lively
from tests.test_compat import run

OPTIONS = {'type': 'CEAIR', **TINY}
needs_basicsr = pytest.mark.skipif(not has_basicsr(), reason='basicsr is not installed')


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return lively(CEAIR(**TINY))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_says_its_network_and_more(net, tmp_path, suffix, capsys):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors', reason='needs the extra: pip install -e ".[safetensors]"')
    path = tmp_path / f'net{suffix}'
    more = {'version': '0.1.0', 'scores': {'noise25': 28.5}}
    write_checkpoint({'params': net.state_dict(), 'network_g': OPTIONS, **more}, path)
    loaded = load_network(path)
    x = torch.rand(1, 3, 17, 12)
    assert torch.equal(loaded(x), net(x))
    assert not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert main(['info', str(path)]) == 0
    said = capsys.readouterr().out
    assert f'network: {OPTIONS} (said by the file)' in said
    assert "scores: {'noise25': 28.5}" in said


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize('key', ['params_ema', 'params', None])
def test_keys_and_prefixes(net, tmp_path, prefix, key):
    weights = {prefix + name: value for name, value in net.state_dict().items()}
    content = {key: weights, 'network_g': OPTIONS} if key else weights
    if key == 'params_ema':
        content['params'] = {name: value * 0 for name, value in weights.items()}
    torch.save(content, tmp_path / 'a.pth')
    if key is None:
        with pytest.raises(UserError, match=r'does not say what network .* not those of CEAIR in size base, S, T'):
            load_network(tmp_path / 'a.pth')
    else:
        torch.testing.assert_close(load_network(tmp_path / 'a.pth').state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('size', SIZES)
def test_named_sizes_are_recognised_by_their_shapes(size):
    with torch.device('meta'):
        weights = CEAIR(size=size).state_dict()
    assert network_options({'params': weights}, 'x') == {'type': 'CEAIR', 'size': size}


class Evil:
    def __reduce__(self):
        return print, ('code was run',)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (pickle.dumps(Evil()), 'is not a file of weights'),
        (b'text', 'is not a file of weights'),
        (b'', 'is not a file of weights'),
    ],
)
def test_what_is_no_file_of_weights_is_refused_and_not_run(tmp_path, capsys, content, message):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(tmp_path / 'a.pth')
    assert 'weights_only' not in str(error.value)
    assert 'code was run' not in capsys.readouterr().out


def test_other_mistakes_are_named(net, tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    torch.save([1], tmp_path / 'list.pth')
    with pytest.raises(UserError, match='expected a dict, found list'):
        read_checkpoint(tmp_path / 'list.pth')
    torch.save({'params': {'a': 1}}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='holds no weights: expected tensors by name'):
        load_network(tmp_path / 'a.pth')
    weights = net.state_dict()
    weights['more'] = weights.pop('embed.weight')
    weights['output.weight'] = weights['output.weight'][:2]
    torch.save({'params': weights, 'network_g': OPTIONS}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'1 missing \(embed.weight\); 1 unexpected \(more\); 1 of another shape'):
        load_network(tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r"network 'CEAIR' cannot be built: .*'depth'"):
        build_network({'type': 'CEAIR', 'depth': 3})


def test_safetensors_are_read_as_the_library_writes_them(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch', reason='needs the extra: pip install -e ".[safetensors]"')
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
    weights = {f'{kind}': torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    weights |= {'empty': torch.zeros(0, 2), 'number': torch.tensor(2.5)}
    safetensors.save_file(weights, tmp_path / 'a.safetensors')
    read = read_checkpoint(tmp_path / 'a.safetensors')['params']
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


def safetensors_file(header, numbers=b'', length=None):
    return (len(header) if length is None else length).to_bytes(8, 'little') + header + numbers


ONE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'text',
        safetensors_file(b'{'),
        safetensors_file(b'[]'),
        safetensors_file(ONE, b'123'),
        safetensors_file(ONE, length=10**18),
        safetensors_file(ONE.replace(b'[1]', b'[2]'), b'1234'),
        safetensors_file(ONE.replace(b'F32', b'Z9'), b'1234'),
        safetensors_file(ONE.replace(b'"a"', b'"__metadata__": {"cea_arch": "{"}, "a"'), b'1234'),
    ],
)
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / 'a.safetensors').write_bytes(safetensors_file(ONE, b'1234'))
    read_checkpoint(tmp_path / 'a.safetensors')
    (tmp_path / 'a.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=r'a\.safetensors is not a file of weights: '):
        read_checkpoint(tmp_path / 'a.safetensors')


def test_reading_safetensors_needs_no_extra_and_writing_names_it(net, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'safetensors', None)
    monkeypatch.setitem(__import__('sys').modules, 'safetensors.torch', None)
    (tmp_path / 'a.safetensors').write_bytes(safetensors_file(ONE, b'1234'))
    read_checkpoint(tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=r'pip install -e "\.\[safetensors\]"'):
        write_checkpoint({'params': net.state_dict()}, tmp_path / 'b.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']


@needs_basicsr
def test_networks_of_the_registry():
    assert isinstance(build_network({'type': 'CEALayer', 'dim': 8}), CEALayer)
    assert type(build_network({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3})).__name__ == 'EDSR'
    with pytest.raises(UserError, match="network: 'Nothing' is not registered"):
        build_network({'type': 'Nothing'})


def test_a_frozen_runs_layers_are_told_from_a_whole_network(tmp_path, capsys):
    base = {'type': 'SwinIR', 'upscale': 1, 'window_size': 8, 'embed_dim': 8, 'depths': [1], 'num_heads': [2]}
    base |= {'img_size': 16, 'drop_path_rate': 0.0}
    options = {'type': 'WithCEA', 'base': base, 'rank': 2}
    torch.manual_seed(0)
    net = build_network(options)
    layers = {name: value for name, value in net.state_dict().items() if '.cea.' in name}
    write_checkpoint({'params': layers, 'network_g': options}, tmp_path / 'cea.pth')
    plain = {name: value for name, value in net.base.state_dict().items() if '.cea.' not in name}
    write_checkpoint({'params': plain}, tmp_path / 'base.pth')
    assert main(['info', str(tmp_path / 'cea.pth')]) == 0
    assert 'CEA layers alone: `cea merge`' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'cea\.pth holds CEA layers alone; `cea merge'):
        load_network(tmp_path / 'cea.pth')
    whole = str(tmp_path / 'whole.pth')
    assert main(['merge', str(tmp_path / 'base.pth'), str(tmp_path / 'cea.pth'), whole]) == 0
    assert main(['info', whole]) == 0
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_network(whole)(x), net.eval()(x))


def test_without_basicsr_other_networks_are_refused(monkeypatch):
    monkeypatch.setattr('cea_arch.networks.from_file.has_basicsr', lambda: False)
    with pytest.raises(UserError, match="network 'EDSR' needs basicsr"):
        build_network({'type': 'EDSR'})


def test_the_doctor(capsys, monkeypatch):
    assert main(['doctor']) == (0 if has_basicsr() else 1)
    said = capsys.readouterr().out
    assert f'torch {torch.__version__.split("+")[0]}' in said
    assert 'device cpu' in said
    assert ('All is well.' if has_basicsr() else 'NOT RIGHT: basicsr is not installed: `pip install') in said
    monkeypatch.setattr('cea_arch.doctor.has_basicsr', lambda: True)
    monkeypatch.setattr('cea_arch.doctor._version', lambda name: '1.2.0+forked')
    assert main(['doctor']) == 1
    assert 'NOT RIGHT: basicsr is 1.2.0+forked, expected 1.4.2' in capsys.readouterr().out


@needs_basicsr
@pytest.mark.parametrize('text', ["__version__ = '1.3.5'", 'import nothing_like_it'], ids=['older', 'broken'])
def test_a_basicsr_in_front_of_the_installed_one(tmp_path, text):
    for name in ('', 'utils'):
        (tmp_path / 'basicsr' / name).mkdir()
        (tmp_path / 'basicsr' / name / '__init__.py').write_text('' if name else text)
    said = {}
    for command in ('doctor', 'schema'):
        code = f'import sys; sys.path.insert(0, {str(tmp_path)!r})'
        found = run(f'{code}\nfrom cea_arch.cli import main; sys.exit(main([{command!r}]))')
        assert found.returncode == (1 if command == 'doctor' else 2)
        said[command] = found.stdout + found.stderr
        assert 'Traceback' not in said[command]
    assert f'{tmp_path}/basicsr lies in front of the installed one: run from another folder' in said['doctor']
    if 'nothing' in text:
        assert "cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'" in said['doctor']
    assert 'basicsr cannot be imported: ' in said['schema']
    assert '`cea doctor` says which one it is.' in said['schema']
