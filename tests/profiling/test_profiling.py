"""What ``cea profile`` counts and prints, against counts made by hand; never how long anything takes."""

import json

import pytest
import torch
import yaml
from torch import nn

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.layers import HyperAdapter, inject_cea
from cea_arch.networks import CEAIR
from cea_arch.profiling.command import markdown, network_of_code, without_cea
from cea_arch.profiling.costs import (
    REST,
    Times,
    breakdown,
    by_stage,
    by_type,
    count_macs,
    interleaved,
    mac_breakdown,
)

CPU = torch.device('cpu')
TINY = {'dim': 8, 'num_blocks': [1, 1, 1, 1]}
COLUMNS = '| network | pixels | parameters | GMACs | ms | spread | ns per pixel | time to first |'
pytestmark = pytest.mark.usefixtures('one_thread')


def small_network() -> nn.Sequential:
    """At 10 x 6 pixels 60 * (3 * 8 * 9 + 8 * 9 + 8 * 4) MACs, its 1x1 convolution the last of these."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GELU(), nn.Conv2d(8, 4, 1)
    )


def test_macs_are_those_counted_by_hand():
    net, x = small_network(), torch.rand(1, 3, 10, 6)
    assert count_macs(lambda: net(x)) == (60 * (216 + 72 + 32), [])
    matrix, vector = torch.rand(5, 7), torch.rand(7)
    assert count_macs(lambda: matrix @ vector) == (35, [])
    assert count_macs(lambda: torch.dot(vector, vector)) == (7, [])


def test_macs_of_a_backward_pass_count_groups():
    net, x = small_network(), torch.rand(1, 3, 10, 6)
    forward = 60 * (216 + 72 + 32)
    first = 60 * 216  # the image wants no gradient
    assert count_macs(lambda: net(x).sum().backward())[0] == 3 * forward - first
    up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
    x = torch.rand(1, 4, 5, 3, requires_grad=True)
    assert count_macs(lambda: up(x).sum().backward())[0] == 3 * 15 * 4 * 3 * 4


def test_what_is_not_counted_is_named():
    x = torch.rand(4, 8, 8)
    assert count_macs(lambda: torch.fft.irfft2(torch.fft.rfft2(x))) == (0, ['_fft_c2r (1)', '_fft_r2c (1)'])


def test_attention_is_counted():
    query = torch.rand(2, 2, 5, 8, requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    assert count_macs(lambda: attend(query, query, query)) == (2 * 2 * 2 * 5 * 5 * 8, [])
    assert count_macs(lambda: attend(query, query, query).sum().backward()) == (3 * 2 * 2 * 2 * 5 * 5 * 8, [])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        macs, uncounted = count_macs(lambda: layer(torch.rand(1, 5, 8)))
    assert uncounted == []
    assert macs == 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8


def test_a_breakdown_gives_each_module_its_own():
    net = small_network()
    inject_cea(net, '3', rank=2)
    x = torch.rand(1, 3, 8, 8)
    labels = by_type(net)
    assert sorted(labels.values()) == [
        'CEALayer',
        'Conv2d',
        'Conv2d',
        'GELU',
        'HyperAdapter',
    ]  # not the one with a child
    reads = iter(range(100))
    own = {'Conv2d': 2, 'GELU': 1, 'CEALayer': 2, 'HyperAdapter': 1}
    assert breakdown(labels, lambda: net(x), lambda: next(reads)) == own | {REST: 5}
    assert not any(m._forward_hooks for m in labels)
    macs = mac_breakdown(labels, lambda: net(x))
    assert macs['Conv2d'] == 64 * (216 + 72)
    assert macs[REST] == 64 * 32
    assert sum(macs.values()) == count_macs(lambda: net(x))[0]


def test_stages_are_the_networks_children():
    net = CEAIR(size='T', **TINY)
    assert set(by_stage(net).values()) == {name for name, _ in net.named_children()}
    assert list(by_stage(nn.Sequential(small_network())).values()) == ['0', '1', '2', '3']


def test_calls_are_timed_in_turn():
    order = []
    times = interleaved({'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 2, CPU)
    assert ''.join(order) == 'ababab'
    assert [len(times[name].seconds) for name in 'ab'] == [2, 2]


def test_ratios_are_of_calls_side_by_side():
    steady, disturbed = Times((1.0, 10.0, 2.0)), Times((2.0, 20.0, 1.0))
    assert (steady.median, disturbed.over(steady), Times((3.0,)).spread) == (2.0, 2.0, 0.0)
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(2 / 3)


def test_without_cea_layers_all_else_stays():
    net = CEAIR(size='T', **TINY)
    bare = without_cea(net, 'mine')
    layers = [m for m in net.modules() if isinstance(m, HyperAdapter)]
    cea = sum(p.numel() for layer in layers for p in layer.parameters())
    assert len(layers) == 11
    assert sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in bare.parameters()) == cea > 0
    assert bare.state_dict().keys() == CEAIR(size='T', modulate=(), **TINY).state_dict().keys()
    with pytest.raises(UserError, match='--without-cea: mine has no CEA layers'):
        without_cea(bare, 'mine')


def test_injected_layers_are_taken_out_with_their_hooks():
    net = small_network()
    inject_cea(net, '3', rank=2)
    nn.init.ones_(net[3].cea.gamma)
    x = torch.rand(1, 3, 8, 8)
    bare = without_cea(net, 'mine')
    assert bare.state_dict().keys() == small_network().state_dict().keys()
    assert (bare(x) - net(x)).abs().max() > 0.01


def test_a_table_of_networks(tmp_path, capsys):
    file = tmp_path / 'mine.yml'
    file.write_text(yaml.safe_dump({'network_g': {'type': 'CEAIR', 'size': 'T', **TINY}}))
    output = tmp_path / 'costs.json'
    words = f'profile -opt {file} --size T --without-cea --pixels 16 24 --layers stage --repeats 2 --device cpu'
    assert main([*words.split(), '--output', str(output)]) == 0
    printed = capsys.readouterr().out
    assert COLUMNS in printed.splitlines()
    assert '| network | pixels | parameters more | GMACs more | time more |' in printed
    figures = json.loads(output.read_text())
    names = ['CEA-IR-T', 'CEA-IR-T without CEA', 'mine', 'mine without CEA']
    assert [(row['network'], row['pixels']) for row in figures['networks']] == [
        (name, side) for side in (16, 24) for name in names
    ]
    whole, bare = figures['networks'][4:6]
    assert whole['parameters'] == sum(p.numel() for p in CEAIR(size='T').parameters())
    share = figures['CEA adds'][2]
    assert (share['network'], share['pixels']) == ('CEA-IR-T', 24)
    assert share['GMACs more'] == pytest.approx(whole['GMACs'] / bare['GMACs'] - 1)
    stages = [row for row in figures['by stage'] if (row['network'], row['pixels']) == ('mine', 24)]
    assert sum(row['GMACs'] for row in stages) == pytest.approx(figures['networks'][6]['GMACs'])
    assert figures['settings']['mode'] == 'inference'


def test_a_network_of_other_code(tmp_path, capsys):
    (tmp_path / 'net.py').write_text(
        'from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, dim=4):\n'
        '        super().__init__(nn.Conv2d(3, dim, 1), nn.Conv2d(dim, 3, 1))\n'
    )
    words = [
        '--code',
        f'{tmp_path}/net.py:Net',
        f'wider={tmp_path}/net.py:Net(dim=8)',
        '--pixels',
        '8',
        '--repeats',
        '1',
    ]
    assert main(['profile', *words]) == 0
    said = capsys.readouterr().out
    assert '| Net | 8 | 31 |' in said
    assert '| wider | 8 | 59 |' in said
    with pytest.raises(UserError, match=r"Net\(rank=1\): expected .*'rank'"):
        network_of_code(f'{tmp_path}/net.py:Net(rank=1)')


def test_training_costs_thrice_the_products(tmp_path):
    output = tmp_path / 'costs.json'
    macs = []
    for words in ('', '--train'):
        assert main(f'profile --size T --pixels 16 --repeats 1 --device cpu --output {output} {words}'.split()) == 0
        macs.append(json.loads(output.read_text())['networks'][0]['GMACs'])
    assert macs[1] / macs[0] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize('words', ['', '--train', '--precision bf16'])
def test_a_table_of_the_layer(words, capsys):
    assert main(f'profile --layer --dim 8 --rank 2 --pixels 8 --repeats 1 --device cpu {words}'.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    header = '| part | C | r | pixels | MMACs | ms | spread | to projection | to block |'
    rows = [row.split(' | ') for row in lines[lines.index(header) + 2 :] if row.startswith('|')]
    assert [row[0] for row in rows] == [
        '| copy',
        '| projection C -> 3C',
        '| adapted by CEA, merged',
        '| adapted by CEA, assembled',
        '| its reading and writing',
        '| block without CEA',
        '| block with CEA',
    ]
    macs = {row[0][2:]: float(row[4]) for row in rows}
    once = 1 if words != '--train' else 3
    assert macs['projection C -> 3C'] == pytest.approx(once * 64 * 8 * 24 / 1e6, rel=1e-3)
    assert macs['adapted by CEA, merged'] < macs['adapted by CEA, assembled']
    assert macs['block without CEA'] < macs['block with CEA']


def test_numbers_stand_right_and_shares_in_per_cent():
    table = markdown([{'a': 'x', 'n': 1234, 'time more': 0.0512, 'z': None}])
    assert table.splitlines() == [
        '| a | n | time more | z |',
        '| --- | ---: | ---: | ---: |',
        '| x | 1,234 | 5.1 % | - |',
    ]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('', 'name networks, by -opt, --size or --code, or use --layer.'),
        ('--code none.py:Net', "--code none.py:Net: expected 'NAME=FILE.py:Class(word=value)'; [Errno 2] No such file"),
        ('--code Net', "--code Net: expected 'NAME=FILE.py:Class(word=value)'; it is not of that form."),
        ('--size 256', "--size: CEAIR comes in base, S, T, not '256'; image sizes go to --pixels."),
        ('--size T --repeats 0', '--repeats must be at least 1, got 0.'),
        ('--size T --pixels 64 0', '--pixels must be at least 1, got 0.'),
        ('--layer --rank 0', '--rank must be at least 1, got 0.'),
        ('--layer --dim 9', '--layer: width must be a multiple of heads, got width=9'),
        ('--layer --size T', '--layer measures one block: leave out'),
        ('--size T --device none', "device 'none' cannot be used"),
        ('-opt absent.yml', 'absent.yml'),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(['profile', *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_a_network_refuses_is_named(tmp_path, capsys):
    file = tmp_path / 'vgg.yml'
    file.write_text(yaml.safe_dump({'network_g': {'type': 'EDSR', 'num_in_ch': 1, 'num_out_ch': 1}}))
    assert main(f'profile -opt {file} --pixels 8 --device cpu'.split()) == 2
    assert 'cea profile: 8 x 8 pixels: ' in capsys.readouterr().err


def test_numbers_of_threads_side_by_side_beside_other_work(capsys):
    threads = torch.get_num_threads()
    command = 'profile --size T --without-cea --pixels 16 --batch 2 --train --threads 1 2 --busy 1 --repeats 1'
    assert main(command.split()) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert 'threads 1 and 2, busy processes beside it 1, batch 2' in printed
    rows = [line.split(' | ')[:3] for line in printed.splitlines() if line.startswith('| CEA-IR-T')]
    names = ['| CEA-IR-T', '| CEA-IR-T', '| CEA-IR-T without CEA', '| CEA-IR-T without CEA', '| CEA-IR-T', '| CEA-IR-T']
    assert [row[0] for row in rows] == names
    assert [row[2] for row in rows] == ['1', '2', '1', '2', '1', '2']


def test_starting_times(capsys):
    assert main(['profile', '--start', '--repeats', '1']) == 0
    printed = capsys.readouterr().out
    names = [line.split(' | ')[0].strip('| ') for line in printed.splitlines()[2:]]
    assert names[2:] == [
        'python -c "import torch"',
        'cea --help',
        'cea restore --help',
        'cea restore, a picture of 320 x 240',
    ]
