"""``cea profile``: what networks cost, CEA's share of it, and what CEA costs in one projection and one block."""

import argparse
import ast
import copy
import importlib
import importlib.util
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.compat import REMEDY, has_basicsr
from cea_arch.errors import UserError
from cea_arch.files import as_json, written_beside
from cea_arch.layers import CEABlock, HyperAdapter, assemble, remove_cea
from cea_arch.layers.tokens import as_tokens
from cea_arch.networks.cea_ir import CEAIR, SIZES
from cea_arch.profiling.costs import (
    Call,
    busy,
    by_stage,
    by_type,
    count_macs,
    interleaved,
    mac_breakdown,
    peak_memory,
    time_breakdown,
)
from cea_arch.profiling.starting import starting_times
from cea_arch.restoring.restorer import PRECISIONS, choose_device
from cea_arch.restoring.tiling import is_out_of_memory, keep_freed_memory

WITHOUT = ' without CEA'
SHARES = ('spread', 'more', 'share')  # words at the end of columns that are shown in per cent
CODE = re.compile(r'(?:([^=:(]+)=)?(.+?\.py):(\w+)(?:\((.*)\))?')  # NAME= and the arguments may be left out
CONVENTION = (
    'One multiply-accumulate (MAC) is one multiplication and one addition, in matrix products and convolutions; ms are '
    'medians of interleaved runs, spread is the distance of their quartiles; memory, on CUDA, is the peak of tensors '
    'beyond weights and images.'
)
Row = dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Measure and print tables in Markdown; write the figures to a file on request."""
    for name in ('repeats', 'batch', 'pixels', 'threads', *(['dim', 'rank', 'heads'] if args.layer else ())):
        given = getattr(args, name)
        least = min(given, default=1) if isinstance(given, list) else given
        if least < 1:
            raise UserError(f'--{name} must be at least 1, got {least}.')
    if args.start:
        rows = starting_times(args.repeats)
        print(f'Seconds of processor time, medians of {args.repeats}:\n\n{markdown(rows)}', end='')
        return
    if args.layer and (args.opt or args.code or args.size or args.layers or args.without_cea or args.threads):
        raise UserError('--layer measures one block: leave out what names and what parts networks, and --threads.')
    device = choose_device(args.device)
    keep_freed_memory()  # as cea restore does
    nets = {} if args.layer else _networks(args)
    figures: dict[str, Any] = {'settings': _settings(args, device)}
    with busy(args.busy):
        if args.layer:
            figures['layer'] = [row for side in args.pixels for row in layer_costs(args, side, device)]
        else:
            figures['networks'], shares = network_costs(nets, args, device)
            if args.without_cea:
                figures['CEA adds'] = shares
            if args.layers:
                parts = (row for name, net in nets.items() for row in _parts(name, net, args, device))
                figures[f'by {args.layers}'] = list(parts)
    print(', '.join(f'{key} {value}' for key, value in figures['settings'].items()))
    for title, rows in list(figures.items())[1:]:
        print(f'\n{title}:\n\n{markdown(rows)}', end='')
    print(f'\n{CONVENTION}')
    if args.output:
        with written_beside(args.output) as aside:
            aside.write_text(as_json(figures, indent=1), 'utf-8')


def network_costs(
    nets: Mapping[str, nn.Module], args: argparse.Namespace, device: torch.device
) -> tuple[list[Row], list[Row]]:
    """A row for each network, image size and number of threads, and one for what CEA adds; those of a size in turn."""
    rows, shares = [], []
    for side in args.pixels:
        once = {name: _call(net, side, args, device) for name, net in nets.items()}
        calls = {(name, n): _on_threads(call, n) for name, call in once.items() for n in args.threads or [None]}
        try:
            counts = {name: (*count_macs(call), peak_memory(call, device)) for name, call in once.items()}
            times = interleaved(calls, args.repeats, device)
        except RuntimeError as error:
            raise UserError(f'{side} x {side} pixels: {_reason(error)}') from error
        found: dict[tuple[str, int | None], Row] = {}
        for name, threads in calls:
            macs, uncounted, memory = counts[name]
            taken = times[name, threads]
            found[name, threads] = {
                'network': name,
                'pixels': side,
                **({'threads': threads} if threads else {}),
                'parameters': sum(p.numel() for p in nets[name].parameters()),
                'GMACs': macs / 1e9,
                'ms': taken.median * 1e3,
                'spread': taken.spread,
                'ns per pixel': taken.median / (args.batch * side**2) * 1e9,
                **_memory(memory),
                'time to first': taken.over(next(iter(times.values()))),
                **({'not counted': ', '.join(uncounted)} if uncounted else {}),
            }
        rows += found.values()
        for (name, threads), row in found.items():
            if bare := found.get((name + WITHOUT, threads)):
                shared = [key for key in ('parameters', 'GMACs', 'memory MiB') if key in row]
                more = {key: row[key] / bare[key] - 1 if bare[key] else None for key in shared}
                more['time'] = times[name, threads].over(times[name + WITHOUT, threads]) - 1
                shares.append(
                    {'network': name, 'pixels': side, **({'threads': threads} if threads else {})}
                    | {f'{key.split()[0]} more': value for key, value in more.items()}
                )
    return rows, shares


def _on_threads(call: Call, number: int | None) -> Call:
    if number is None:
        return call

    def run() -> None:
        torch.set_num_threads(number)
        call()

    return run


def _memory(count: int | None) -> Row:
    return {} if count is None else {'memory MiB': count / 2**20}


def without_cea(net: nn.Module, name: str) -> nn.Module:
    """A copy without its CEA, parameters and all.

    Raises:
        UserError: It has none.
    """
    bare = copy.deepcopy(net)
    inside = [path for path, module in bare.named_modules() if isinstance(module, HyperAdapter)]
    if not remove_cea(bare):
        for path in inside:
            parent, _, child = path.rpartition('.')
            setattr(bare.get_submodule(parent), child, None)
    if not inside:
        raise UserError(f'--without-cea: {name} has no CEA layers.')
    return bare


def layer_costs(args: argparse.Namespace, side: int, device: torch.device) -> list[Row]:
    """A row for the adapted projection of queries, keys and values, for its parts, and for the block around it."""
    dtype = PRECISIONS[args.precision]
    try:
        block = CEABlock(args.dim, rank=args.rank, heads=args.heads).to(device, dtype)
    except ValueError as error:
        raise UserError(f'--layer: {error}') from error
    bare = without_cea(block, 'the block')
    adapter, projection = block.attn.cea, block.attn.qkv
    x = torch.randn(args.batch, args.dim, side, side, device=device, dtype=dtype, requires_grad=args.train)

    def weights(*modules: nn.Module) -> list[Tensor]:
        return [p for module in modules for p in module.parameters()] if args.train else []

    def assembled(x: Tensor) -> Tensor:
        tokens, onto = (as_tokens(t, 'bchw') for t in (x, projection(x)))
        return assemble(onto, tokens, adapter(x), args.rank)

    calls = {
        'copy': _step(torch.clone, x, []),
        'projection C -> 3C': _step(projection, x, weights(projection)),
        'adapted by CEA, merged': _step(partial(adapter.project, projection), x, weights(adapter, projection)),
        'adapted by CEA, assembled': _step(assembled, x, weights(adapter, projection)),
        'its reading and writing': _step(
            lambda x: torch.cat([rows.flatten() for rows in adapter(x)]), x, weights(adapter)
        ),
        'block without CEA': _step(bare, x, weights(bare)),
        'block with CEA': _step(block, x, weights(block)),
    }
    memory = {name: peak_memory(call, device) for name, call in calls.items()}
    times = interleaved(calls, args.repeats, device)
    return [
        {
            'part': name,
            'C': args.dim,
            'r': args.rank,
            'pixels': side,
            'MMACs': count_macs(calls[name])[0] / 1e6,
            'ms': times[name].median * 1e3,
            'spread': times[name].spread,
            'to projection': times[name].over(times['projection C -> 3C']),
            'to block': times[name].over(times['block without CEA']),
            **_memory(memory[name]),
        }
        for name in calls
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table of rows that have the same keys; words to the left, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbers = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = [names, ['---:' if number else '---' for number in numbers]]
    lines += [[_word(name, row.get(name)) for name in names] for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _word(name: str, value: object) -> str:
    if value is None:
        return '-'
    if name.endswith(SHARES):
        return f'{100 * value:.1f} %'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if isinstance(value, float) else str(value)


def _networks(args: argparse.Namespace) -> dict[str, nn.Module]:
    nets: dict[str, nn.Module] = {}
    for size in args.size:
        if size not in SIZES:
            raise UserError(f'--size: CEAIR comes in {", ".join(SIZES)}, not {size!r}; image sizes go to --pixels.')
        nets[f'CEA-IR-{size}'] = CEAIR(size=size)
    if args.opt and not has_basicsr():
        raise UserError(f'-opt: {REMEDY} Without it there is --size.')
    for path in args.opt:
        nets[Path(path).stem] = importlib.import_module('cea_arch.training.options').read_network(path)
    nets |= dict(map(network_of_code, args.code))
    if not nets:
        raise UserError('name networks, by -opt, --size or --code, or use --layer.')
    if args.without_cea:  # each beside its own, so that one is timed right after the other
        pairs = [((name, net), (name + WITHOUT, without_cea(net, name))) for name, net in nets.items()]
        nets = dict(named for pair in pairs for named in pair)
    return {name: net.train(args.train) for name, net in nets.items()}


def network_of_code(code: str) -> tuple[str, nn.Module]:
    """A name and a network from a Python file, which is run; UserError if that fails or ``code`` is not as ``CODE``."""
    try:
        if not (found := CODE.fullmatch(code)):
            raise ValueError('it is not of that form.')
        name, file, kind, words = found.groups()
        given = ast.parse(f'f({words or ""})', mode='eval').body.keywords
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return name or kind, getattr(module, kind)(**{word.arg: ast.literal_eval(word.value) for word in given})
    except Exception as error:  # whatever the file does
        raise UserError(f"--code {code}: expected 'NAME=FILE.py:Class(word=value)'; {error}") from error


def _call(net: nn.Module, side: int, args: argparse.Namespace, device: torch.device) -> Call:
    """One run on random RGB images of ``side`` x ``side`` pixels."""
    dtype = PRECISIONS[args.precision]

    def forward(image: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(image)

    weights = [p for p in net.to(device).parameters() if p.requires_grad]
    return _step(forward, torch.rand(args.batch, 3, side, side, device=device), weights if args.train else [])


def _step(function: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> Call:
    """Run ``function`` without gradients or, where there are weights or ``x`` wants one, forward and backward."""
    inputs = [t for t in (x, *weights) if t.requires_grad] if weights or x.requires_grad else []

    def step() -> None:
        with torch.set_grad_enabled(bool(inputs)):
            out = function(x)
        if inputs:
            out.backward(torch.ones_like(out))
            for tensor in inputs:
                tensor.grad = None

    return step


def _parts(name: str, net: nn.Module, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows of a network's modules by type, or of its stages, at each image size; forward alone."""
    labels = (by_type if args.layers == 'type' else by_stage)(net)
    for side in args.pixels:
        call = _call(net, side, argparse.Namespace(precision=args.precision, train=False, batch=args.batch), device)
        times = time_breakdown(labels, call, args.repeats, device)
        macs = mac_breakdown(labels, call)
        total = sum(t.median for t in times.values())
        for label in sorted(times, key=lambda label: -times[label].median):
            yield {
                'network': name,
                'pixels': side,
                args.layers: label,
                'modules': sum(value == label for value in labels.values()),
                'GMACs': macs[label] / 1e9,
                'ms': times[label].median * 1e3,
                'time share': times[label].median / total,
            }


def _settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()
    return {
        'device': f'{device} ({name})',
        'threads': ' and '.join(map(str, args.threads)) or torch.get_num_threads(),
        'busy processes beside it': args.busy,
        'batch': args.batch,
        'torch': torch.__version__,
        'precision': args.precision,
        'mode': 'training' if args.train else 'inference',
        'repeats': args.repeats,
    }


def _reason(error: RuntimeError) -> str:
    return 'memory does not suffice.' if is_out_of_memory(error) else str(error).splitlines()[0]
