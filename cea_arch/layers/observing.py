"""What CEA does in a network, seen while pictures pass, and networks with its layers silenced; weights stay."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import Factors, assemble
from cea_arch.layers.cea_layer import CEALayer
from cea_arch.layers.hyper_adapter import HyperAdapter
from cea_arch.layers.tokens import as_tokens, from_tokens


@dataclass(frozen=True)
class Residual:
    """What one layer has added to one batch.

    Attributes:
        size: |dY| / |XW|, over the channels that the layer adapts.
        bases: A of the first image, ``(K, d_in)``.
        directions: B of the first image, ``(K, d_out)``.
        shares: Of the energy of dY of the first image, by component, ``(K,)``; as if components were orthogonal.
    """

    size: float
    bases: Tensor
    directions: Tensor
    shares: Tensor


def sites(net: nn.Module) -> dict[str, nn.Module]:
    """The hyper-adapters of our networks and the CEA layers of others, by name."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, CEALayer)}
    inside = {id(layer.adapter) for layer in layers.values()}
    adapters = {n: m for n, m in net.named_modules() if isinstance(m, HyperAdapter) and id(m) not in inside}
    return adapters | layers


@contextmanager
def observing(net: nn.Module) -> Iterator[dict[str, list[Residual]]]:
    """Note the residuals of every site, by name, of each batch that ``net`` sees."""
    seen: dict[str, list[Residual]] = {}
    changes = []
    for name, site in sites(net).items():
        note = seen.setdefault(name, []).append
        changes.append(_change(site, partial(_projected, note=note), partial(_added, note=note)))
    with _instead(changes):
        yield seen


@contextmanager
def silenced(net: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Let ``net`` compute with dY = 0 at the sites of these names, at all by default."""
    known = sites(net)
    with _instead([_change(known[name], _plain, _unchanged) for name in (known if names is None else names)]):
        yield


@contextmanager
def keeping(
    net: nn.Module, count: int, order: Mapping[str, Tensor] | None = None, merged: bool = False
) -> Iterator[None]:
    """Let every site use ``count`` components of each target alone.

    Args:
        net: Network with CEA layers.
        count: How many are kept.
        order: By site, components in the order in which they are kept, ``(K,)``; by default the strongest in each
            picture, see :attr:`Residual.shares`.
        merged: Instead, the best approximation of dW of so low a rank, by its singular values.
    """
    changes = []
    for name, site in sites(net).items():
        adapter = site.adapter if isinstance(site, CEALayer) else site
        places = None if order is None else order[name]
        changes.append((adapter, 'forward', partial(_reduced, adapter, count, places, merged)))
    with _instead(changes):
        yield


def _reduced(adapter: HyperAdapter, count: int, order: Tensor | None, merged: bool, x: Tensor) -> Factors:
    bases, directions = HyperAdapter.forward(adapter, x)
    if merged:
        left, values, right = torch.linalg.svd(bases.mT @ directions, full_matrices=False)
        wanted = count * len(adapter.spec.parts)
        kept = values[:, :wanted].sqrt()
        empty = bases.shape[1] - kept.shape[1]
        rows = (left[..., :wanted] * kept[:, None]).mT, right[:, :wanted] * kept[..., None]
        return tuple(nn.functional.pad(part, (0, 0, 0, empty)) for part in rows)
    strength = energies(adapter, as_tokens(x, 'bchw'), (bases, directions))
    if order is not None:
        strength = torch.zeros_like(strength).index_fill(1, order[:count], 1.0)
    weakest = strength.unflatten(1, (-1, adapter.spec.rank)).argsort(-1, descending=True).argsort(-1) >= count
    return bases, directions.masked_fill(weakest.flatten(1)[..., None], 0)


@contextmanager
def _instead(changes: Sequence[tuple[nn.Module, str, Callable]]) -> Iterator[None]:
    """Let functions stand for methods of modules, by their names, until the end of the block."""
    done = []
    try:
        for module, word, action in changes:
            setattr(module, word, action)
            done.append((module, word))
        yield
    finally:
        for module, word in done:
            delattr(module, word)


def _change(site: nn.Module, project: Callable, forward: Callable) -> tuple[nn.Module, str, Callable]:
    """What is put in the place of a site's work: of an adapter's ``project``, or of a layer's call."""
    word, action = ('forward', forward) if isinstance(site, CEALayer) else ('project', project)
    return site, word, partial(action, site)


def _plain(adapter: HyperAdapter, projection: nn.Module, x: Tensor) -> Tensor:
    return projection(x)


def _unchanged(layer: CEALayer, x: Tensor, y: Tensor | None = None) -> Tensor:
    return x if y is None else y


def _projected(adapter: HyperAdapter, projection: nn.Module, x: Tensor, note: Callable[[Residual], None]) -> Tensor:
    tokens, plain, factors = as_tokens(x, 'bchw'), as_tokens(projection(x), 'bchw'), adapter(x)
    residual = assemble(torch.zeros_like(plain), tokens, factors, adapter.spec.rank, adapter.routing)
    note(_residual(adapter, tokens, residual, plain, factors))
    return from_tokens(plain + residual, x, 'bchw')


def _added(layer: CEALayer, x: Tensor, y: Tensor | None = None, *, note: Callable[[Residual], None]) -> Tensor:
    out = CEALayer.forward(layer, x, y)
    if y is not None:
        plain = as_tokens(y, layer.layout)
        bases, directions = layer.adapter(layer.plane(x))
        factors = bases, directions * (layer.gamma * layer.gain)
        residual = as_tokens(out, layer.layout) - plain
        note(_residual(layer.adapter, as_tokens(x, layer.layout), residual, plain, factors))
    return out


def _residual(adapter: HyperAdapter, tokens: Tensor, residual: Tensor, plain: Tensor, factors: Factors) -> Residual:
    beside = torch.cat([plain[..., a:b] for a, b in adapter.spec.parts.values()], dim=-1)
    bases, directions = (rows[0].detach() for rows in factors)
    energy = energies(adapter, tokens[:1], (bases[None], directions[None]))[0]
    return Residual((residual.norm() / beside.norm()).item(), bases, directions, energy / energy.sum())


def energies(adapter: HyperAdapter, tokens: Tensor, factors: Factors) -> Tensor:
    """The energy that each component adds to tokens ``(B, N, d_in)``, ``(B, K)``, as if they were orthogonal."""
    routed = adapter.routed(tokens, factors[0]).flatten(-2)
    return routed.detach().float().square().sum(1) * factors[1].detach().square().sum(-1)
