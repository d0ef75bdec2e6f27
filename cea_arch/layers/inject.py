"""CEA layers inside a network that this package did not write.

Each chosen module gets a child ``cea``, a :class:`CEALayer`, and a forward hook that applies it to the module's output.
So the module keeps its type and the network its keys; new are ``<path>.cea.*``. Which axis of an output holds the
channels is found by running the network twice, on images of different size.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.layers.cea import CEALayer

# 16 suits windows of 4, 8 and 16 pixels and strides up to 16; 56 a window of 7; 128 deep pyramids
EXAMPLE_SIZES = (16, 56, 128)
EXAMPLE_CHANNELS = (3, 1)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# number of axes, and which of them (besides the batch) keep their length when height and width of the image change
_LAYOUT_OF = {(4, (1,)): 'bchw', (3, (2,)): 'bnc', (4, (3,)): 'bhwc'}


@dataclass(frozen=True)
class ModuleOutput:
    """What dry runs saw of one module.

    Attributes:
        kind: Name of the module's class.
        shape: Of its first output, for a batch of two images; empty where it returned no tensor.
        layout: ``bchw``, ``bnc`` or ``bhwc``; empty where the module cannot be a target.
        dim: Channels; 0 where the module cannot be a target.
        device, dtype: Of its output.
        problem: Why it cannot be a target; empty where it can.
    """

    kind: str
    shape: tuple[int, ...] = ()
    layout: str = ''
    dim: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    problem: str = ''


def inject_cea(
    net: nn.Module,
    targets: str | Sequence[str],
    rank: int | Mapping[str, int] = 8,
    width: int = 32,
    num_heads: int = 2,
    conditioning: str = 'cross_attention',
    routing: str = 'signed',
    example: Tensor | None = None,
) -> list[str]:
    """Give the modules of ``net`` that match ``targets`` a CEA layer each, in place; the output does not change yet.

    A module that the network holds under several names gets one layer. New layers take the device and dtype of their
    module's output, and train; what else trains is left as it is, see :func:`cea_parameters`. Torch's random numbers
    go on as if nothing had been drawn. Everything is checked before anything changes.

    Args:
        net: Network whose forward takes one tensor.
        targets: Patterns over qualified module names, as for paths: ``*`` stays between two dots, a part ``**`` stands
            for any number of parts; ``?`` and ``[0-3]`` work as well. Each must match something.
        rank: Components of each layer, at most the channels of its target; or a mapping from patterns to that number,
            of which the first that matches counts.
        width, num_heads, conditioning, routing: As for :class:`CEALayer`.
        example: Image ``(1, C, H, W)`` that the network accepts, also at twice the height and width. By default images
            of 3 or 1 channels and 16, 56 or 128 pixels a side are tried.

    Returns:
        Names of the targets, in ``named_modules`` order.

    Raises:
        ValueError: There are CEA layers already, a pattern matches nothing, a target is a container or its output has
            no known layout, a size is wrong, or the network accepts none of the examples.
        TypeError: A rank is not a whole number.
    """
    present = [name for name, _ in _injected(net)]
    if present:
        raise ValueError(
            f'the network has CEA layers already, the first in {present[0]!r}: inject once, with all patterns, or call '
            'remove_cea before.'
        )
    modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    names = match_names([targets] if isinstance(targets, str) else list(targets), modules)
    ranks = _ranks(rank, names)
    outputs = survey_modules(net, example)
    layers: dict[nn.Module, CEALayer] = {}
    with torch.random.fork_rng(devices=[]):  # runs with and without layers, or with other ones, draw the same data
        for name in names:
            _check_target(name, modules[name], outputs[name], ranks[name])
            if modules[name] not in layers:
                output = outputs[name]
                try:
                    layer = CEALayer(output.dim, ranks[name], width, num_heads, conditioning, routing, output.layout)
                except ValueError as error:
                    raise ValueError(f'target {name!r}: {error}') from error
                layers[modules[name]] = layer.to(output.device, output.dtype).train(modules[name].training)
    for module, layer in layers.items():
        module.cea = layer
        layer.hook_handle = module.register_forward_hook(apply_cea)
    return names


def apply_cea(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook of a target. A function of its own, so that networks can be copied and pickled."""
    return module.cea(output)


def remove_cea(net: nn.Module) -> list[str]:
    """Take out what :func:`inject_cea` put in; returns the names of the modules that had a layer."""
    targets = list(_injected(net))
    for _, module in targets:
        if hasattr(module, 'cea'):  # a shared module comes under each of its names
            module.cea.hook_handle.remove()
            del module.cea
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


def survey_modules(net: nn.Module, example: Tensor | None = None) -> dict[str, ModuleOutput]:
    """Run ``net`` twice, in evaluation mode, and tell of each module by name what it returns.

    Args and errors as for :func:`inject_cea`. A name stands for its module under each of the names that it has.
    """
    first, second = _dry_runs(net, example)
    return {
        name: _judge(module, first[module], second[module])
        for name, module in net.named_modules(remove_duplicate=False)
        if name
    }


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


def _check_target(name: str, module: nn.Module, output: ModuleOutput, rank: int) -> None:
    if output.problem:
        raise ValueError(f'target {name!r} {output.problem}.')
    if hasattr(module, 'cea'):
        raise ValueError(f'target {name!r} has something called cea already.')
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f'target {name!r}: rank must be a whole number, got {rank!r}.')
    if rank > output.dim:
        raise ValueError(f'target {name!r}: rank must be at most its {output.dim} channels, got {rank}.')


def _dry_runs(net: nn.Module, example: Tensor | None) -> tuple[dict[nn.Module, list], dict[nn.Module, list]]:
    """Outputs of each module for two small images, then for one of twice the height and width."""
    if example is not None:
        if example.ndim != 4:
            raise ValueError(f'example must be an image (1, C, H, W), got {tuple(example.shape)}.')
        examples = [example[:1]]
    else:
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        sizes = itertools.product(EXAMPLE_SIZES, EXAMPLE_CHANNELS)
        examples = (like.new_full((1, channels, size, size), 0.5) for size, channels in sizes)
    for image in examples:
        try:
            return _record(net, image.repeat(2, 1, 1, 1)), _record(net, image.repeat(1, 1, 2, 2))
        except Exception as error:  # whatever the foreign forward raises for a size or channel count that it refuses
            failure = error
    tried = f'{tuple(example[:1].shape)}' if example is not None else '3 or 1 channels, 16, 56 and 128 pixels a side'
    raise ValueError(
        f'the network does not run on an example image ({tried}) and on one twice as large, so its layouts cannot be '
        f'found: {failure} Give an example that it accepts.'
    ) from failure


def _record(net: nn.Module, images: Tensor) -> dict[nn.Module, list[ModuleOutput]]:
    seen = {module: [] for module in net.modules()}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kind = type(module).__name__
        if isinstance(output, Tensor):
            seen[module].append(ModuleOutput(kind, tuple(output.shape), device=output.device, dtype=output.dtype))
        else:
            seen[module].append(ModuleOutput(kind, problem=f'returns a {type(output).__name__}, not a tensor'))

    modes = {module: module.training for module in seen}
    handles = [module.register_forward_hook(note) for module in seen]
    try:
        net.eval()
        with torch.no_grad():
            net(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _judge(module: nn.Module, first: list[ModuleOutput], second: list[ModuleOutput]) -> ModuleOutput:
    kind = type(module).__name__
    if isinstance(module, CONTAINERS):
        shape = first[0].shape if first else ()
        return ModuleOutput(kind, shape, problem='is a container: name the modules inside it')
    if not first or len(first) != len(second):
        return ModuleOutput(kind, problem='did not run in the dry run')
    layouts = [_layout(small, large) for small, large in zip(first, second)]
    problems = [layout.problem for layout in layouts if layout.problem]
    if problems:
        return ModuleOutput(kind, first[0].shape, problem=problems[0])
    if len({(layout.layout, layout.dim) for layout in layouts}) > 1:
        shapes = ' and '.join(str(call.shape) for call in first)
        return ModuleOutput(kind, first[0].shape, problem=f'runs several times, with different channels: {shapes}')
    return layouts[0]


def _layout(small: ModuleOutput, large: ModuleOutput) -> ModuleOutput:
    """The output of one call with its layout: the axis that does not follow the image's size holds the channels."""
    if small.problem:
        return small
    fixed = tuple(axis for axis, lengths in enumerate(zip(small.shape, large.shape)) if axis and len(set(lengths)) == 1)
    layout = _LAYOUT_OF.get((len(small.shape), fixed))
    has_batch = (small.shape[:1], large.shape[:1]) == ((2,), (1,))
    if not (layout and has_batch and len(large.shape) == len(small.shape) and small.dtype.is_floating_point):
        return ModuleOutput(
            small.kind,
            small.shape,
            problem=f'returns {small.shape} for two images and {large.shape} for one of twice the size: none of '
            '(B, C, H, W), (B, N, C), (B, H, W, C)',
        )
    dim = small.shape[fixed[0]]
    return ModuleOutput(small.kind, small.shape, layout, dim, small.device, small.dtype)
