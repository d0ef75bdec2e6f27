"""Weights in files: read safely, compared with what a network expects, merged, and written beside and renamed."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cea_arch.errors import UserError

WEIGHT_KEYS = ('params_ema', 'params')
SHOWN = 3


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of tensors and plain values; code in it is not run.

    Raises:
        UserError: No such file, or not a file of weights.
    """
    if not Path(path).is_file():
        raise UserError(f'file {str(path)!r} does not exist.')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f'{path} is not a file of weights: {str(error).splitlines()[0]}') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a file of weights: expected a dict, found {type(content).__name__}.')
    return content


def weights_of(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in the content of a file: under ``params_ema``, else ``params``, else the content itself.

    A ``module.`` before every name, which DataParallel leaves there, is dropped.
    """
    weights = next((content[key] for key in WEIGHT_KEYS if key in content), content)
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f'{path} holds no weights: expected tensors by name, alone or under params or params_ema.')
    wrapped = all(name.startswith('module.') for name in weights)
    return {name.removeprefix('module.') if wrapped else name: value for name, value in weights.items()}


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


def merge(base: str, cea: str, out: str) -> int:
    """Write a whole checkpoint from a base network's and one that holds CEA layers alone; returns its weights' number.

    ``out`` has the keys (``params``, ``params_ema``) and the names of ``cea``, so it loads where ``cea`` would.

    Raises:
        UserError: ``out`` exists, ``cea`` holds more than CEA layers, or layers of modules that ``base`` lacks.
    """
    if Path(out).exists():
        raise UserError(f'{out} exists already.')
    base_weights = weights_of(read_checkpoint(base), base)
    content = read_checkpoint(cea)
    keys = [key for key in WEIGHT_KEYS if key in content]
    parts = {key: weights_of({key: content[key]}, cea) for key in keys} or {'params': weights_of(content, cea)}
    merged = {key: _merged(base_weights, part, base, cea) for key, part in parts.items()}
    options = content.get('network_g')
    if isinstance(options, dict):
        merged['network_g'] = options | {'pretrained_base': None}
    write_checkpoint(merged, out)
    return len(next(iter(merged.values())))


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Save beside and rename, so that ``path`` is whole at all times.

    Raises:
        UserError: It cannot be written, as when the disk is full; what was at ``path`` is still there.
    """
    aside = Path(f'{path}.{os.getpid()}.tmp')
    try:
        torch.save(content, aside)
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
        raise UserError(f'{path} could not be written: {error}') from error
    finally:
        aside.unlink(missing_ok=True)


def _merged(base: dict[str, Tensor], cea: dict[str, Tensor], base_path: str, cea_path: str) -> dict[str, Tensor]:
    prefix = 'base.' if all(name.startswith('base.') for name in cea) else ''
    whole = {f'{prefix}{name}': value for name, value in base.items()}
    for name in cea:
        target, has_layer, _ = name.rpartition('.cea.')
        if not has_layer:
            raise UserError(f'{cea_path} holds more than CEA layers: {name}.')
        # a target may have no weights of its own, such as an activation: then its parent has
        parents = (f'{target}.', f'{target.rpartition(".")[0]}.')
        if not any(key.startswith(parents) for key in whole) or name in whole:
            raise UserError(
                f'{cea_path} does not fit {base_path}, which has no module {target.removeprefix(prefix)!r}.'
            )
    return whole | cea
