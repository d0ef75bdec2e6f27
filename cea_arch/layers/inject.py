"""CEA layers inside a network that this package did not write.

Each chosen module gets a child ``cea``, a :class:`CEALayer`, and a forward hook that adds what its input assembles to
its output. So the module keeps its type and the network its keys; new are ``<path>.cea.*``.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import Parts
from cea_arch.layers.cea_layer import CEALayer
from cea_arch.layers.compiling import look_at_hooks

LOST = (
    'a module that had a CEA layer was replaced by another one, as quantising and fusing do. Quantise or '
    'fuse the host first and inject into modules that stay as they are, or leave the targets out of it.'
)
PACKED = 'qkv'  # parts of a packed projection, in this order


@dataclass(frozen=True)
class Site:
    """What is known of a module that may become a target, from the widths that its layers tell.

    Attributes:
        kind: Name of the module's class.
        dim, dim_out: Channels of its input and output; 0 where it cannot be a target.
        layout: Of both, see :class:`CEALayer`; empty where it cannot be a target.
        problem: Why it cannot be a target; empty where it can.
        parts: Columns of its output that are adapted, by name; empty for all.
    """

    kind: str
    dim: int = 0
    dim_out: int = 0
    layout: str = ''
    problem: str = ''
    parts: Parts = field(default_factory=dict)


def inject_cea(
    net: nn.Module,
    targets: str | Sequence[str],
    rank: int | Mapping[str, int] = 8,
    factors: str = 'dynamic',
    routing: str = 'signed',
    rank_norm: bool = True,
    width: int | None = None,
    heads: int = 4,
) -> list[str]:
    """Give the modules of ``net`` that match ``targets`` a CEA layer each, in place; the output does not change yet.

    A target is a module whose first input and output are features of the same places: a linear layer, a convolution of
    stride 1 that keeps the size, or a block of such layers. Its batch must be that of the images: a module that sees
    windows as a batch raises at the network's first run, and the block around it is the target to take.

    A module that the network holds under several names gets one layer. New layers take the device and dtype of their
    module's parameters, and train; what else trains is left as it is, see :func:`cea_parameters`. Torch's random
    numbers go on as if nothing had been drawn. Everything is checked before anything changes.

    Args:
        net: Network whose forward takes images, its batch first.
        targets: Patterns over qualified module names, as for paths: ``*`` stays between two dots, a part ``**`` stands
            for any number of parts; ``?`` and ``[0-3]`` work as well. Each must match something. Of a projection to
            queries, keys and values together, ``blocks.*.attn.qkv:qk`` adapts queries and keys alone.
        rank: Components of each layer, at most the channels of its target; or a mapping from patterns to that number,
            of which the first that matches counts.
        factors, routing, rank_norm, width, heads: As for :class:`CEALayer`.

    Returns:
        Names of the targets, in ``named_modules`` order.

    Raises:
        ValueError: There are CEA layers already, a pattern matches nothing, a module is no possible target, or a size
            is wrong.
        TypeError: A rank is not a whole number.
    """
    present = [name for name, _ in _injected(net)]
    if present:
        raise ValueError(
            f'the network has CEA layers already, the first in {present[0]!r}: inject once, with all patterns, or call '
            'remove_cea before.'
        )
    sites = find_sites(net)
    modules = {name: net.get_submodule(name) for name in sites}
    wanted = _wanted([targets] if isinstance(targets, str) else list(targets), sites)
    ranks = _ranks(rank, list(wanted))
    layers: dict[nn.Module, CEALayer] = {}
    with torch.random.fork_rng(devices=[]):  # runs with and without layers, or with other ones, draw the same data
        for name, site in wanted.items():
            _check_target(name, modules[name], site, ranks[name])
            if modules[name] not in layers:
                sizes = (site.dim, site.dim_out, ranks[name])
                options = (factors, routing, rank_norm, width, heads, site.layout)
                try:
                    layer = CEALayer(*sizes, *options, site.parts or None)
                except ValueError as error:
                    raise ValueError(f'target {name!r}: {error}') from error
                like = next(p for p in modules[name].parameters() if p.is_floating_point())
                layers[modules[name]] = layer.to(like.device, like.dtype).train(modules[name].training)
    for module, layer in layers.items():
        module.cea = layer
        layer.hook_handle = module.register_forward_hook(apply_cea, with_kwargs=True)
    net.cea_batch = [net.register_forward_pre_hook(_note_batch), net.register_forward_hook(_forget_batch)]
    net.cea_count = len(layers)
    look_at_hooks()
    return list(wanted)


def apply_cea(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """The forward hook of a target. A function of its own, so that networks can be copied and pickled."""
    layer = getattr(module, 'cea', None)
    if layer is None or layer.alone:
        raise ValueError(LOST)
    x = args[0] if args else next(iter(kwargs.values()), None)
    kind = type(module).__name__
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        found = f'{type(x).__name__} and {type(output).__name__}'
        raise ValueError(f'a CEA target must take and return a tensor; {kind} takes and returns {found}.')
    batch = getattr(layer, 'batch', None)
    if batch is not None and len(x) != batch:
        raise ValueError(
            f'a CEA target must see {batch} images as its batch, {kind} sees {len(x)}, such as windows or frames: '
            'take the block around it.'
        )
    try:
        return layer(x, output)
    except ValueError as error:
        raise ValueError(f'CEA target {kind}: {error}') from error


def _note_batch(net: nn.Module, args: tuple[Any, ...]) -> None:
    """Tell the layers how many images there are. Not in traced programs, which no such number may enter."""
    if args and isinstance(args[0], Tensor) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        layers = {module.cea for _, module in _injected(net)}
        if len(layers) < net.cea_count:
            raise ValueError(LOST)
        for layer in layers:
            layer.batch = len(args[0])


def _forget_batch(net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        for _, module in _injected(net):
            module.cea.batch = None


def remove_cea(net: nn.Module) -> list[str]:
    """Take out what :func:`inject_cea` put in; returns the names of the modules that had a layer."""
    targets = list(_injected(net))
    for _, module in targets:
        if hasattr(module, 'cea'):  # a shared module comes under each of its names
            module.cea.hook_handle.remove()
            del module.cea
    for module in net.modules():  # the network, or a part of it, that they were put into
        if hasattr(module, 'cea_batch'):
            for handle in module.cea_batch:
                handle.remove()
            del module.cea_batch, module.cea_count
    return [name for name, _ in targets]


def cea_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of all injected layers, each once, for an optimizer or to leave only them trainable."""
    layers = dict.fromkeys(module.cea for _, module in _injected(net))
    return [parameter for layer in layers for parameter in layer.parameters()]


def cea_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The entries of ``net.state_dict()`` that belong to injected layers: ``<path>.cea.*``."""
    state: dict[str, Tensor] = {}
    for name, module in _injected(net):
        module.cea.state_dict(destination=state, prefix=f'{name}.cea.' if name else 'cea.')
    return state


def match_names(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The ``names`` that match any of ``patterns``, in their order; see :func:`inject_cea`.

    Raises:
        ValueError: There is no pattern, or one matches nothing; the nearest names are shown.
    """
    names = list(names)
    if not patterns:
        raise ValueError('targets is empty: name at least one module.')
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f'{pattern!r} matches no module. The nearest names are {", ".join(near)}.')
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def find_sites(net: nn.Module) -> dict[str, Site]:
    """What is known of each module of ``net`` by its name, under each of the names that it has; nothing is run."""
    return {name: _site(module) for name, module in net.named_modules(remove_duplicate=False) if name}


def _site(module: nn.Module) -> Site:
    kind = type(module).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return Site(kind, problem='is a container that is never called: name the modules inside it')
    leaves = [m for m in module.modules() if _widths(m)]
    if not leaves:
        return Site(kind, problem='has no linear layer, convolution or norm that tells its channels')
    for leaf in leaves:
        if isinstance(leaf, nn.Conv2d) and not _keeps_places(leaf):
            return Site(kind, problem='changes the size: a convolution in it has a stride, or pads too little or much')
    (layout, dim, _), (_, _, dim_out) = _widths(leaves[0]), _widths(leaves[-1])
    return Site(kind, dim, dim_out, layout)


def _widths(module: nn.Module) -> tuple[str, int, int] | None:
    """Layout, channels in and out of a layer that tells them."""
    if isinstance(module, nn.Linear):
        return 'bnc', module.in_features, module.out_features
    if isinstance(module, nn.LayerNorm):
        return 'bnc', module.normalized_shape[-1], module.normalized_shape[-1]
    if isinstance(module, nn.Conv2d):
        return 'bchw', module.in_channels, module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return 'bchw', module.num_features, module.num_features
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return 'bchw', module.num_parameters, module.num_parameters
    return None


def _keeps_places(conv: nn.Conv2d) -> bool:
    if conv.padding == 'same':
        return True
    padding = (0, 0) if conv.padding == 'valid' else conv.padding
    reach = [d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size)]
    return set(conv.stride) == {1} and list(padding) == reach


def _wanted(patterns: list[str], sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites that the patterns name, in their order, each with its parts."""
    split = [pattern.partition(':')[::2] for pattern in patterns]
    wanted = {}
    for name in match_names([pattern for pattern, _ in split], sites):
        letters = next(letters for pattern, letters in split if _matches(name, pattern))
        wanted[name] = _packed(name, sites[name], letters) if letters else sites[name]
    return wanted


def _packed(name: str, site: Site, letters: str) -> Site:
    """The site of a packed projection of which some parts are adapted."""
    if set(letters) - set(PACKED) or site.dim_out % len(PACKED):
        raise ValueError(
            f'target {name!r}: parts may be of {PACKED}, three alike, got {letters!r} of {site.dim_out} channels.'
        )
    third = site.dim_out // len(PACKED)
    parts = {letter: (n * third, (n + 1) * third) for n, letter in enumerate(PACKED) if letter in letters}
    return Site(site.kind, site.dim, site.dim_out, site.layout, site.problem, parts)


def _matches(name: str, pattern: str) -> bool:
    def match(parts: list[str], wanted: list[str]) -> bool:
        if not wanted:
            return not parts
        if wanted[0] == '**':
            return any(match(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
        return bool(parts) and fnmatchcase(parts[0], wanted[0]) and match(parts[1:], wanted[1:])

    return match(name.split('.'), pattern.split('.'))


def _injected(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with an injected layer, under each of their names; layers that a network brings itself do not count."""
    for name, module in net.named_modules(remove_duplicate=False):
        if hasattr(getattr(module, 'cea', None), 'hook_handle'):
            yield name, module


def _ranks(rank: int | Mapping[str, int], names: list[str]) -> dict[str, int]:
    if not isinstance(rank, Mapping):
        return dict.fromkeys(names, rank)
    match_names(list(rank), names)
    ranks = {}
    for name in names:
        fitting = [value for pattern, value in rank.items() if _matches(name, pattern)]
        if not fitting:
            raise ValueError(f'target {name!r}: no pattern of rank matches it, they are {", ".join(rank)}.')
        ranks[name] = fitting[0]
    return ranks


def _check_target(name: str, module: nn.Module, site: Site, rank: int) -> None:
    if site.problem:
        raise ValueError(f'target {name!r} {site.problem}.')
    if hasattr(module, 'cea'):
        raise ValueError(f'target {name!r} has something called cea already.')
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f'target {name!r}: rank must be a whole number, got {rank!r}.')
    if rank > (most := min(site.dim, site.dim_out)):
        raise ValueError(f'target {name!r}: rank must be at most its {most} channels, got {rank}.')
