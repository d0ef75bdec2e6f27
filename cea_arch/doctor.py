"""What is installed and what a file holds: ``cea doctor`` and ``cea info``."""

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

import cea_arch
from cea_arch.checkpoints import WEIGHT_KEYS, check_fit, read_checkpoint, weights_of
from cea_arch.compat import BASICSR, REMEDY, REPLACEMENTS, has_basicsr
from cea_arch.errors import told
from cea_arch.networks.from_file import build_stored, network_options
from cea_arch.networks.with_cea import holds_layers_alone

PACKAGES = ('torch', 'torchvision', 'numpy', 'opencv-python', 'pillow', 'scikit-image', 'lmdb', 'tqdm')
EXTRAS = {
    'safetensors': ('safetensors',),
    'export': ('onnx', 'onnxruntime', 'onnxscript'),
    'spandrel': ('spandrel',),
    'demo': ('gradio',),
    'video': ('av',),
    'lpips': ('lpips',),
}


def run(args: argparse.Namespace) -> int:
    """Print versions, devices, what the compatibility layer did and remedies; returns 1 if something is not right."""
    print(f'cea_arch {cea_arch.__version__} in {Path(cea_arch.__file__).parent}')
    print(f'Python {platform.python_version()}, {platform.platform()}')
    print(', '.join(f'{name} {_version(name) or "absent"}' for name in PACKAGES))
    for device in _devices():
        print(f'device {device}')
    for extra, names in EXTRAS.items():
        print(f'extra {extra}: ' + ', '.join(f'{name} {_version(name) or "absent"}' for name in names))
    problems = list(_problems())
    if basicsr := sys.modules.get('basicsr'):
        print(f'basicsr {_version_of(basicsr)} in {Path(basicsr.__file__).parent}')
        replaced = [name for name in REPLACEMENTS if _is_replaced(name)]
        print(f'replaced in memory for basicsr: {", ".join(replaced) or "nothing"}')
    for problem in problems:
        print(f'NOT RIGHT: {problem}')
    print('All is well.' if not problems else f'{len(problems)} to mend.')
    return 1 if problems else 0


def show_weights(args: argparse.Namespace) -> None:
    """Print what network a file holds, how large it is, and what else stands in the file; checks that they fit."""
    content = read_checkpoint(args.file)
    weights = weights_of(content, args.file)
    sets = [key for key in WEIGHT_KEYS if key in content]
    dtypes = sorted({str(value.dtype).removeprefix('torch.') for value in weights.values()})
    count = sum(value.numel() for value in weights.values())
    print(f'{args.file}: {len(weights)} weights, {count:,} numbers, {", ".join(dtypes)}')
    print(f'weights under: {", ".join(sets) if sets else "no key"}')
    source = 'said by the file' if isinstance(content.get('network_g'), dict) else 'recognised by its shapes'
    options = network_options(content, args.file, args.network_g)
    print(f'network: {options} ({f"of {args.opt}" if args.network_g else source})')
    if holds_layers_alone(weights):
        print('CEA layers alone: `cea merge` makes a whole file of them and their base.')
    else:
        expected = build_stored(content, options).state_dict()
        check_fit(expected, weights, f'{args.file} does not fit {options.get("type")}')
    for key, value in content.items():
        if key not in (*WEIGHT_KEYS, 'network_g') and key not in weights:
            print(f'{key}: {value}')


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f'cuda:{number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB'
    if torch.backends.mps.is_available():
        yield 'mps: Apple'
    yield f'cpu: {torch.get_num_threads()} threads'


def _is_replaced(name: str) -> bool:
    spec = getattr(sys.modules.get(name), '__spec__', None)
    return getattr(spec, 'origin', None) == 'cea_arch.compat'


def _version_of(package: ModuleType) -> str:
    """What a package says of itself; one that lies in front of the installed one is another."""
    return getattr(package, '__version__', 'of no version')


def _problems() -> Iterator[str]:
    if has_basicsr():
        yield from _problems_of_basicsr()
    else:
        yield REMEDY
    if _version('torch') and torch.cuda.device_count() and not torch.cuda.is_available():
        yield 'there is a GPU that this torch cannot use: install a torch for your driver, see pytorch.org.'
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        yield f'torch and numpy do not fit each other ({error}): upgrade both.'


def _problems_of_basicsr() -> Iterator[str]:
    installed, folder = _version('basicsr'), Path(importlib.util.find_spec('basicsr').origin).parent
    in_front = f'{folder} lies in front of the installed one: run from another folder, or take it off PYTHONPATH.'
    try:
        found = _version_of(importlib.import_module('basicsr'))
    except Exception as error:  # of whatever goes by this name
        yield f'the basicsr in {folder} cannot be imported: {told(error)}. If it is a changed copy, {in_front}'
        return
    if installed != BASICSR:
        yield (
            f'basicsr is {installed or "no installed package"}, expected {BASICSR}: other repositories '
            'bring changed copies under this name. `pip uninstall basicsr`, then `cea setup`.'
        )
    if found != installed:
        yield f'the basicsr {found} in {in_front}'
