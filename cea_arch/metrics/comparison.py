"""Result files side by side, and beside them what others have published."""

import csv
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from cea_arch.errors import UserError, suggest

PUBLISHED = ('aio3', 'aio5', 'cdd11')
Scores = dict[str, tuple[float, float | None]]


@dataclass
class Method:
    """One row of the comparison.

    Attributes:
        name: Of the network or run.
        protocol: By which it was scored.
        scores: PSNR in dB and SSIM (``None`` where there is none) by set.
        source: Where the figures stand.
        params: Number of parameters as published, or empty.
    """

    name: str
    protocol: str
    scores: Scores
    source: str
    params: str = ''


def read_results(path: str) -> Method:
    """Read a ``results.json`` that ``cea train``, ``test`` or ``score`` wrote.

    Raises:
        UserError: No such file, or another content.
    """
    try:
        content = json.loads(Path(path).read_text('utf-8'))
        means = {name: result['means'] for name, result in content['sets'].items()}
        scores = {
            name: (float(mean['psnr']), None if mean.get('ssim') is None else float(mean['ssim']))
            for name, mean in means.items()
        }
        return Method(content['name'], content['protocol'] or 'own metrics', scores, path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}.') from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is not a results.json with psnr for each set: {error!r}.') from error


def published(benchmark: str) -> list[Method]:
    """The published rows of ``aio3``, ``aio5`` or ``cdd11``, in the papers' order of columns.

    Raises:
        UserError: Another benchmark.
    """
    if benchmark not in PUBLISHED:
        raise UserError(
            f'published figures are here for {", ".join(PUBLISHED)}, not for {benchmark!r}.'
            f'{suggest(benchmark, PUBLISHED)}'
        )
    text = (resources.files('cea_arch.metrics') / 'published' / f'{benchmark}.csv').read_text('utf-8')
    methods = []
    for row in csv.DictReader(text.splitlines()):
        name, params, protocol, source = (row.pop(key) for key in ('method', 'params', 'protocol', 'source'))
        cells = {column: cell.partition('/') for column, cell in row.items() if cell}
        scores = {column: (float(psnr), float(ssim) if ssim else None) for column, (psnr, _, ssim) in cells.items()}
        methods.append(Method(name, protocol, scores, source, params))
    return methods


def side_by_side(methods: list[Method]) -> str:
    """A markdown table: a row a method, PSNR/SSIM a set, and the mean where every set of the table is there.

    The columns are the sets of the first method that has the most; sets that only others have follow.
    """
    longest = max(methods, key=lambda method: len(method.scores))
    columns = list(dict.fromkeys(name for method in (longest, *methods) for name in method.scores))
    head = ['method', 'protocol', 'parameters', *columns, 'mean', 'source']
    lines = [f'| {" | ".join(head)} |', f'|{"---|" * 3}{"---:|" * (len(columns) + 1)}---|']
    for method in methods:
        scores = [method.scores.get(column) for column in columns]
        mean = None
        if all(scores):
            psnr, ssim = zip(*scores)
            mean = float(np.mean(psnr)), None if None in ssim else float(np.mean(ssim))
        cells = [method.name, method.protocol, method.params, *map(_cell, scores), _cell(mean), method.source]
        lines.append(f'| {" | ".join(cells)} |')
    protocols = list(dict.fromkeys(method.protocol for method in methods))
    if len(protocols) > 1:
        lines += ['', f'{len(protocols)} protocols ({", ".join(protocols)}): compare rows of one and the same.']
    return '\n'.join(lines) + '\n'


def _cell(scores: tuple[float, float | None] | None) -> str:
    if scores is None:
        return ''
    psnr, ssim = scores
    return f'{psnr:.2f}' if ssim is None else f'{psnr:.2f}/{ssim:.3f}'.replace('/0.', '/.')
