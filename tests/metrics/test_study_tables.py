"""The tables of ``cea study`` and ``cea report``."""

import math

import pytest

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.files import as_json
from cea_arch.metrics.study_tables import interval, merged, tables


def a_run(variant, seed, psnr, **more):
    return {'variant': variant, 'seed': seed, 'core_seconds': 1800, 'psnr': {'rain': psnr}} | more


def test_the_tables_pair_seeds():
    runs = [a_run('none', seed, value) for seed, value in enumerate((20.0, 22.0, 24.0))]
    runs += [a_run('cea', 0, 21.0, ablated={'rain': -1.0}), a_run('cea', 1, 24.0, ablated={'rain': -3.0})]
    variants = {'none': {'parameters': 1000, 'steps': 5}, 'cea': {'parameters': 999, 'steps': 5}}
    lines = tables({'reference': 'cea', 'variants': variants, 'runs': runs}).splitlines()
    assert lines[:4] == [
        '| variant | parameters | steps | core-hours | seeds | rain |',
        '|---|---|---|---|---|---|',
        '| none | 1,000 | 5 | 0.50 | 3 | 22.00 ± 2.00 |',
        '| cea | 999 | 5 | 0.50 | 2 | 22.50 ± 2.12 |',
    ]
    assert '| none | 2 | +1.50 ± 6.35 |' in lines  # t of one degree of freedom, 12.71, times 0.5
    assert '| cea | 2 | -2.00 ± 1.41 |' in lines


def test_studies_of_one_recipe_come_into_one_table():
    sizes = {'parameters': 1000, 'steps': 5, 'network_g': {'type': 'CEAIR', 'dim': 8}}

    def one(recipe, *runs):
        runs = [run | {'recipe': recipe} for run in runs]
        return {'study': 's', 'reference': 'cea', 'variants': {run['variant']: sizes for run in runs}, 'runs': runs}

    here = one(1, a_run('none', 0, 20.0), a_run('cea', 0, 21.0))
    there = one(1, a_run('none', 1, 20.0), a_run('cea', 1, 22.0), a_run('cea', 0, 99.0), a_run('static', 1, 19.0))
    other = one(2, a_run('none', 0, 20.0))
    whole, alone = merged([here, there, other])
    assert [(run['variant'], run['seed']) for run in whole['runs']] == [
        ('none', 0),
        ('cea', 0),
        ('none', 1),
        ('cea', 1),
        ('static', 1),
    ]
    assert list(whole['variants']) == ['none', 'cea', 'static']
    assert '| none | 2 | +1.50 ± 6.35 |' in tables(whole)
    assert alone == other
    assert len(here['runs']) == 2
    for run in whole['runs']:
        run['network_g'] = {}
    there['variants']['none'] = sizes | {'network_g': {'type': 'CEAIR', 'dim': 12}}
    with pytest.raises(UserError, match=r'variant none is another network .*: network_g.dim: 12 \(was 8\)'):
        merged([here, there])


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776445 * 1.5811388 / 5**0.5))


def test_a_training_that_gave_no_numbers_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    variants = {name: {'parameters': 10, 'steps': 5, 'network_g': {}} for name in ('none', 'cea')}
    runs = [a_run('none', 0, math.nan), a_run('cea', 0, 21.0)]
    (tmp_path / 'a.json').write_text(as_json({'reference': 'cea', 'variants': variants, 'runs': runs}))
    assert main(['report', 'a.json']) == 0
    said = capsys.readouterr().out
    assert '| none | 10 | 5 | 0.50 | 1 | nan |' in said
    assert '| none | 1 | +nan |' in said
    assert main(['report', 'a.json', 'none.json']) == 2
    assert 'none.json cannot be read: No such file' in capsys.readouterr().err
