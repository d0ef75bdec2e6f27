"""Option files that inherit others."""

import re

import pytest

from cea_arch.errors import UserError
from cea_arch.training.options import read_options
from tests.training.test_option_mistakes import FILE


def write(folder, **files):
    for name, text in ({'o': FILE} | files).items():
        (folder / f'{name}.yml').write_text(text)


def test_files_inherit(tmp_path):
    write(
        tmp_path,
        more='inherits: o.yml\ntrain: {total_iter: 300, grad_clip: 1.0}\ndatasets: {val_1: {name: a}, val_2: ~}\n',
        other='val: {val_freq: 7, metrics: {ssim: {type: calculate_cea_ssim_uniform}}}\n',
        both="""\
inherits: [more.yml, other.yml]
name: both
train:
  scheduler: {periods: [300], restart_weights: [1]}
  ema_decay: ~
datasets: {val_1: ~, val_2: ~}
val: {metrics: {psnr: ~}}
network_g: {rank: 4}
""",
    )
    opt, expected = read_options(str(tmp_path / 'both.yml')), read_options(str(tmp_path / 'o.yml'))
    expected['name'] = 'both'
    expected['train'] |= {'total_iter': 300, 'grad_clip': 1.0}
    expected['train']['scheduler'] |= {'periods': [300], 'restart_weights': [1]}
    del expected['train']['ema_decay']
    expected['val'] |= {'val_freq': 7, 'metrics': {'ssim': {'type': 'calculate_cea_ssim_uniform'}}}
    expected['network_g']['rank'] = 4
    assert opt == expected


def test_what_was_inherited_is_named_by_its_file(tmp_path):
    wrong = FILE.replace('val_freq: 50', 'val_frq: 50')
    write(tmp_path, o=wrong, a='inherits: o.yml\nval: {save_img: true}\n', b='inherits: o.yml\nval: {val_frq: 5}\n')
    line = wrong[: wrong.index('val_frq')].count('\n') + 1
    for name, place in (('a', f'o.yml, line {line}'), ('b', 'b.yml, line 2')):
        with pytest.raises(UserError, match=re.escape(f"{place}: val: unknown key 'val_frq'")):
            read_options(str(tmp_path / f'{name}.yml'))
    write(tmp_path, o=FILE, c='inherits: o.yml\ndatasets: {trian: ~}\n')
    with pytest.raises(UserError, match=r"c.yml, line 2: datasets: unknown key 'trian'"):
        read_options(str(tmp_path / 'c.yml'))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('inherits: on.yml', "o2.yml, line 1: inherits 'on.yml', but there is no {folder}/on.yml. Did you mean"),
        ('\ninherits: 3', 'o2.yml, line 2: inherits must name option files, got 3'),
        ('inherits: [o.yml, 3]', 'o2.yml, line 1: inherits must name option files, got 3'),
        ('inherits: o2.yml', 'o2.yml, line 1: {folder}/o2.yml inherits itself'),
        ('inherits: o3.yml', 'o3.yml, line 1: {folder}/o2.yml inherits itself, by {folder}/o3.yml and {folder}/o2.yml'),
        ('inherits: o4.yml', 'o4.yml, line 1 (name: [): '),
        ('inherits: o5.yml', 'o5.yml must hold a mapping'),
    ],
)
def test_inheriting_that_goes_wrong(tmp_path, text, message):
    write(tmp_path, o2=text, o3='inherits: o2.yml', o4='name: [', o5='[1]')
    with pytest.raises(UserError) as error:
        read_options(str(tmp_path / 'o2.yml'))
    assert message.format(folder=tmp_path) in str(error.value)
