"""`adapt`: queries that follow one picture, and go back."""

import copy

import cv2
import numpy as np
import pytest
import torch

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.networks import CEAIR
from cea_arch.restoring.adapting import adapted
from cea_arch.restoring.restorer import Restorer
from tests.networks.test_cea_ir import TINY, lively

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def net():
    torch.manual_seed(0)
    return lively(CEAIR(**TINY)).eval()


def read(x):
    return lambda rows, columns: x[..., rows, columns]


def hidden_error(net, x):
    """What is asked of the queries, for pixels that they were not asked for."""
    hidden = torch.rand(1, 1, *x.shape[2:], generator=torch.Generator().manual_seed(9)) < 0.1
    with torch.no_grad():
        out = net(torch.where(hidden, torch.roll(x, 1, 3), x))
    return ((out - x).square() * hidden).sum() / hidden.sum()


def test_the_queries_learn_from_the_picture_and_go_back(net, photograph):
    x = torch.from_numpy(photograph[:96, :120] / np.float32(255)).permute(2, 0, 1)[None]
    net.embed.weight.requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    flags = [p.requires_grad for p in net.parameters()]
    before = hidden_error(net, x)
    with adapted(net, net, read(x), (96, 120), 20):
        after = hidden_error(net, x)
        moved = [name for name, value in net.state_dict().items() if not torch.equal(value, state[name])]
        assert not any(p.requires_grad for p in net.parameters())
    assert after < before
    assert moved
    assert all(name.endswith('.queries') for name in moved)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    with pytest.raises(ZeroDivisionError), adapted(net, net, read(x), (96, 120), 1):
        raise ZeroDivisionError
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_picture_is_restored_by_queries_of_its_own(net):
    pictures = torch.rand(2, 1, 3, 40, 30)
    plain, following = Restorer(net, 'cpu'), Restorer(net, 'cpu', adapt=3)
    first = following(pictures[0])
    assert not torch.equal(first, plain(pictures[0]))
    following(pictures[1])
    assert torch.equal(following(pictures[0]), first)  # whatever came before


def test_what_cannot_follow(net):
    with pytest.raises(UserError, match='adapt must be a number of steps, 0 for none; got -1'):
        Restorer(net, 'cpu', adapt=-1)
    with pytest.raises(UserError, match='adapt: the network has no queries'):
        Restorer(CEAIR(**TINY, factors='static'), 'cpu', adapt=1)(torch.rand(1, 3, 16, 16))
    larger = torch.nn.Upsample(scale_factor=2)
    with pytest.raises(UserError, match='adapt: the network enlarges'):
        Restorer(larger, 'cpu', adapt=1)(torch.rand(1, 3, 16, 16))


def test_the_command(tmp_path, photograph):
    cv2.imwrite(str(tmp_path / 'a.png'), photograph[:48, :64])
    results = []
    for name, words in (('plain', []), ('following', ['--adapt', '2'])):
        assert main(['restore', str(tmp_path / 'a.png'), '-o', str(tmp_path / name), '--device', 'cpu', *words]) == 0
        results.append(cv2.imread(str(tmp_path / name / 'a.png')))
    assert not np.array_equal(*results)
