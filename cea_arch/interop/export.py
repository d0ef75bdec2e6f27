"""Networks for other programs: ONNX and torch.export files for any number of pictures of any size, checked before kept.

And weights alone, as ``.safetensors``: those that restore, once, in half precision if wished.
"""

import argparse
import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from cea_arch.checkpoints import read_checkpoint, write_checkpoint
from cea_arch.errors import UserError, need
from cea_arch.files import refuse_to_replace, written_beside
from cea_arch.networks.from_file import load_network, network_in, network_options
from cea_arch.plugins import loaded_plugins
from cea_arch.restoring.fitting import find_fit

WEIGHTS_ALONE = '.safetensors'
SIZES = ((17, 24), (33, 40), (64, 47), (19, 90), (18, 31))  # height, width: odd and even, other than the traced one
BATCHES = (1, 2, 4)  # in turn
TRACED_SIZE = (40, 48)
TOLERANCE = 1e-4  # for images in [0, 1]
TOLERANCE_HALF = 1e-2  # measured: 6e-4 with trained weights, 5e-3 with random ones
CANNOT = 'the network cannot be exported for pictures of any size: {}'


def run(args: argparse.Namespace) -> None:
    """Export a file of weights and say how far the result is from the network."""
    if args.output.endswith(WEIGHTS_ALONE):
        found = export_weights(args.model, args.output, args.fp16, args.overwrite, args.network_g)
    else:
        net = load_network(args.model, args.network_g)
        found = export_network(net, args.output, args.fp16, args.overwrite)
    words = 'float16' if args.fp16 else 'float32'
    said = ', '.join(f'{width} x {height}' for height, width in found.sizes)
    names = ', input lq, output restored' if args.output.endswith('.onnx') else ''
    batch = '' if found.any_batch else ' One picture at a time: the network itself asks for the batch in Python.'
    print(f'{args.output}: RGB in [0, 1], {words}{names}; within {found.error:.1e} of the network at {said}.{batch}')


class Exported(NamedTuple):
    """What a file was found to be.

    Attributes:
        error: The largest difference to the network in float32.
        sizes: Of the images that were tried, (height, width).
        any_batch: Whether it takes several images at once.
    """

    error: float
    sizes: list[tuple[int, int]]
    any_batch: bool = True


def export_network(net: nn.Module, path: str | os.PathLike, half: bool = False, overwrite: bool = False) -> Exported:
    """Write ``net`` for batches of any size of images of any size, beside and renamed, if it computes the same.

    A network that computes with the batch in Python, as SwinIR does, is written for one image at a time.

    Args:
        net: Network that maps RGB images ``(B, 3, H, W)``; it is put into evaluation mode.
        path: Ends in ``.onnx``, input ``lq`` and output ``restored``, checked with onnxruntime; or in ``.pt2``, for
            ``torch.export.load``.
        half: Whether weights, images and results are float16.
        overwrite: Whether a file that exists is replaced.

    Raises:
        UserError: Another suffix, a file that exists, the extra is absent, a network that cannot be traced, or the
            difference is above ``TOLERANCE``, or ``TOLERANCE_HALF``.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f'{path}: expected a name that ends in {", ".join(FORMATS)} or {WEIGHTS_ALONE}.')
    _check_target(path, overwrite)
    write, read = FORMATS[path.suffix]
    dtype, tolerance = (torch.float16, TOLERANCE_HALF) if half else (torch.float32, TOLERANCE)
    multiple = find_fit(net.eval().cpu(), torch.device('cpu')).multiple
    built_for = {m.img_size for m in net.modules() if isinstance(getattr(m, 'img_size', None), tuple)}  # as SwinIR is
    sizes = [tuple(math.ceil(n / multiple) * multiple for n in size) for size in (TRACED_SIZE, *SIZES, *built_for)]
    image, any_batch = torch.rand(2, 3, *sizes[0]).to(dtype), True
    try:
        program = _traced(copy.deepcopy(net).to(dtype), image, multiple)
    except UserError:
        program, any_batch = _traced(copy.deepcopy(net).to(dtype), image[:1], multiple), False
    with written_beside(path) as aside:
        write(program, aside)
        exported = read(aside)
        batches = BATCHES if any_batch else (1,)
        try:
            error = _largest_difference(net, lambda x: exported(x.to(dtype)).float(), sizes[1:], batches)
        except (AssertionError, RuntimeError) as failure:  # a guard that the traced size alone passes
            raise UserError(CANNOT.format(str(failure).strip().splitlines()[0])) from failure
        if not error <= tolerance:
            raise UserError(f'{path}: what was exported differs by {error:.1e}, over {tolerance:.1e}; it is not kept.')
    return Exported(error, sizes[1:], any_batch)


def export_weights(
    model: str | os.PathLike,
    path: str | os.PathLike,
    half: bool = False,
    overwrite: bool = False,
    network_g: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the weights of a file that restore, with what it says of its network, as ``.safetensors``.

    Args:
        model: A file of weights; of ``params_ema`` and ``params``, the former counts.
        path: Where to write.
        half, overwrite: As for :func:`export_network`; half precision is rounded from float32, and restores in it.
        network_g: Options of the network, where the file ``model`` does not say them.

    Raises:
        UserError: A file that exists, or the extra ``safetensors`` is absent.
    """
    _check_target(Path(path), overwrite)
    content = read_checkpoint(model)
    net, options = network_in(content, model, network_g), network_options(content, model, network_g)
    fit = find_fit(net, torch.device('cpu'))
    content.pop('params_ema', None)
    weights = copy.deepcopy(net).to(torch.float16 if half else torch.float32).state_dict()
    told = {'params': weights, 'network_g': options}
    if plugins := loaded_plugins(with_folders=False):
        told.setdefault('plugins', plugins)
    sizes = [(64, 64), (97, 130)]
    with written_beside(path, WEIGHTS_ALONE) as aside:
        write_checkpoint(content | told, aside)
        kept = load_network(aside)
        error = _largest_difference(partial(fit.run, net), partial(fit.run, kept), sizes)
    return Exported(error, sizes)


def _check_target(path: Path, overwrite: bool) -> None:
    refuse_to_replace(path, overwrite)
    if not path.parent.is_dir():
        raise UserError(f'{path}: there is no folder {path.parent}.')


def _traced(net: nn.Module, image: Tensor, multiple: int) -> torch.export.ExportedProgram:
    size = {axis: Dim.DYNAMIC if multiple == 1 else multiple * Dim(f'cells{axis}') for axis in (2, 3)}
    if len(image) > 1:
        size[0] = Dim.DYNAMIC
    try:
        program = torch.export.export(net, (image,), dynamic_shapes=(size,))
    except (RuntimeError, ValueError) as error:
        raise UserError(CANNOT.format(str(error).strip().splitlines()[0])) from error
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop('stack_trace', None)  # with paths of this machine
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    need('onnxscript', 'export', 'ONNX')
    logging.getLogger('onnxscript').setLevel(logging.ERROR)  # what it does not simplify is of no concern to users
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter's, about its own future
        traced = torch.onnx.export(program, input_names=['lq'], output_names=['restored'], verbose=False, dynamo=True)
    graph = traced.model.graph
    for node in graph.all_nodes():  # notes for those who mend exporters: a third of the file, with this machine's paths
        for noted in (node, *node.outputs):
            noted.metadata_props.clear()
    for noted in (graph, *graph.inputs, *graph.initializers.values()):
        noted.metadata_props.clear()
    traced.save(path, external_data=False)  # one file


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = need('onnxruntime', 'export', 'ONNX').InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'lq': x.numpy()})[0])


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open('wb') as file:
        torch.export.save(program, file)


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open('rb') as file:
        return torch.export.load(file).module()


FORMATS = {'.onnx': (_write_onnx, _read_onnx), '.pt2': (_write_program, _read_program)}


@torch.no_grad()
def _largest_difference(
    net: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int] = BATCHES,
) -> float:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(batch, 3, *size, generator=generator) for batch, size in zip(cycle(batches), sizes)]
    return max((exported(x) - net(x)).abs().max().item() for x in images)
