"""Networks for other programs: ONNX files for pictures of any size, checked before they are kept."""

import argparse
import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.checkpoints import default_model, load_network
from cea_arch.errors import UserError
from cea_arch.files import written_beside

SIZES = ((16, 24), (33, 40), (64, 47), (17, 90), (8, 8))  # height, width: odd and even, other than the traced one
TRACED_SIZE = (40, 48)
TOLERANCE = 1e-4  # for images in [0, 1]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare what :func:`run` reads."""
    command.add_argument('output', help='NAME.onnx')
    command.add_argument('-m', '--model', help='file of weights, .pth or .safetensors')
    command.add_argument('--overwrite', action='store_true', help='replace a file that exists')


def run(args: argparse.Namespace) -> None:
    """Export a file of weights and say how far the result is from the network."""
    error = export_onnx(load_network(args.model or default_model()), args.output, args.overwrite)
    sizes = ', '.join(f'{width} x {height}' for height, width in SIZES)
    print(f'{args.output}: RGB in [0, 1], input lq, output restored; within {error:.1e} of the network at {sizes}.')


def export_onnx(net: nn.Module, path: str | os.PathLike, overwrite: bool = False) -> float:
    """Write ``net`` as ONNX for images of any size, beside and renamed, if onnxruntime computes from it what it does.

    Args:
        net: Network that maps RGB images ``(1, 3, H, W)``; it is put into evaluation mode.
        path: Ends in ``.onnx``. Its input is ``lq``, its output ``restored``.
        overwrite: Whether a file that exists is replaced.

    Returns:
        The largest difference between the network and the file, at the sizes of ``SIZES``.

    Raises:
        UserError: Another suffix, a file that exists, the extra is absent, or the difference is above ``TOLERANCE``.
    """
    path = Path(path)
    if path.suffix != '.onnx':
        raise UserError(f'{path}: expected a name that ends in .onnx.')
    if path.exists() and not overwrite:
        raise UserError(f'{path} exists; --overwrite replaces it.')
    _need('onnxscript')
    size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(net.eval(), (torch.rand(1, 3, *TRACED_SIZE),), dynamic_shapes=(size,))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter's, about its own future
        traced = torch.onnx.export(program, input_names=['lq'], output_names=['restored'], verbose=False, dynamo=True)
    with written_beside(path) as aside:
        traced.save(aside, external_data=False)  # one file
        error = _largest_difference(net, _reader(aside))
        if not error <= TOLERANCE:
            raise UserError(f'{path}: what was exported differs by {error:.1e}, more than {TOLERANCE}; it is not kept.')
    return error


def _reader(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function, computed by onnxruntime."""
    session = _need('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'lq': x.numpy()})[0])


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError('ONNX needs an extra: `pip install "cea-arch[export]"`.') from error


@torch.no_grad()
def _largest_difference(net: nn.Module, exported: Callable[[Tensor], Tensor]) -> float:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 3, *size, generator=generator) for size in SIZES]
    return max((exported(x) - net(x)).abs().max().item() for x in images)
