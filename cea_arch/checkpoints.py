"""Weights in files that explain themselves: read without running code, compared, and written.

A file holds tensors by name, alone or, as BasicSR writes it, under ``params_ema`` and ``params``, and beside them the
network's options, ``network_g`` as in an option file. A ``.safetensors`` file holds them as JSON in its metadata.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cea_arch.errors import UserError, need
from cea_arch.files import written_beside

WEIGHT_KEYS = ('params_ema', 'params')
PREFIXES = ('module.', '_orig_mod.')  # DataParallel and torch.compile leave them before every name
SAFETENSORS = 'writing .safetensors'
DTYPES = {'F16': torch.float16, 'BF16': torch.bfloat16, 'F32': torch.float32, 'F64': torch.float64, 'I64': torch.int64}
METADATA_KEY = 'cea_arch'  # of the JSON in a .safetensors file
SHOWN = 3
# what torch's reader raises for bytes that are no weights
BAD_FILE = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of tensors and plain values; code in it is not run.

    Raises:
        UserError: No such file, or not a file of weights.
    """
    if not Path(path).is_file():
        raise UserError(f'file {str(path)!r} does not exist.')
    if Path(path).suffix == '.safetensors':
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except BAD_FILE as error:  # not with torch's words, which recommend to run what the file says
        raise UserError(
            f"{path} is not a file of weights: not in torch's format, or it holds more than tensors and plain values."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a file of weights: expected a dict, found {type(content).__name__}.')
    return content


def weights_of(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in the content of a file: under ``params_ema``, else ``params``, else the content itself.

    What DataParallel and torch.compile put before every name is dropped.
    """
    weights = next((content[key] for key in WEIGHT_KEYS if key in content), content)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f'{path} holds no weights: expected tensors by name, alone or under params or params_ema.')
    while wrapped := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(wrapped[0]): value for name, value in weights.items()}
    return dict(weights)


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], label: str) -> None:
    """Raise UserError unless both have the same names and shapes; says how many differ, and the first few."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f'{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}'
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    complaints = [
        f'{len(names)} {word} ({", ".join(names[:SHOWN])}{", ..." if len(names) > SHOWN else ""})'
        for word, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes))
        if names
    ]
    if complaints:
        raise UserError(f'{label}: of {len(expected)} weights, {"; ".join(complaints)}.')


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Save beside and rename, so that ``path`` is whole at all times; the suffix chooses the format.

    Raises:
        UserError: It cannot be written, as when the disk is full; what was at ``path`` is still there.
    """
    try:
        with written_beside(path) as aside:
            if Path(path).suffix == '.safetensors':
                weights = {name: value.contiguous() for name, value in weights_of(content, path).items()}
                rest = {k: v for k, v in content.items() if k not in WEIGHT_KEYS and not isinstance(v, Tensor)}
                save = need('safetensors.torch', 'safetensors', SAFETENSORS).save
                aside.write_bytes(save(weights, metadata={METADATA_KEY: json.dumps(rest)}))
            else:
                torch.save(dict(content), aside)
    except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
        raise UserError(f'{path} could not be written: {error}') from error


def _read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Length of the header, header (JSON), little-endian numbers: read here, so that packaged weights need no extra."""
    data = memoryview(Path(path).read_bytes())
    try:
        start = 8 + int.from_bytes(data[:8], 'little')
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop('__metadata__', {})
        weights = {name: _tensor(data[start:], **entry) for name, entry in header.items()}
        return {'params': weights, **json.loads(metadata.get(METADATA_KEY, '{}'))}
    except BAD_FILE as error:
        raise UserError(f'{path} is not a file of weights: {error}') from error


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    part = bytearray(data[slice(*data_offsets)])
    tensor = torch.frombuffer(part, dtype=DTYPES[dtype]) if part else torch.empty(0, dtype=DTYPES[dtype])
    return tensor.view(shape)
