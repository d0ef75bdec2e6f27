"""Tables of a study: variants of a network, trained alike for several seeds; from what ``cea study`` has stored."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from cea_arch.errors import UserError
from cea_arch.files import from_json
from cea_arch.rules import differences

CONFIDENCE = 0.95


def tables(content: dict[str, Any]) -> str:
    """Markdown of a ``study.json``: scores by variant, CEA's lead over each, its test-time ablation, its residuals."""
    runs, variants = content['runs'], content['variants']
    if not runs:
        return ''
    parts = [_scores(runs, variants), _leads(runs, content['reference']), _ablations(runs), _residuals(runs)]
    return '\n'.join(part for part in parts if part)


def merged(studies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Studies with the same data and training, such as of several machines, as one; the others as they are.

    Raises:
        UserError: A variant is not the same network in two that would be one.
    """
    found: dict[Any, dict[str, Any]] = {}
    for study in studies:
        key = (study['reference'], *sorted({run.get('recipe') for run in study['runs']}))
        whole = found.setdefault(key, study | {'variants': {}, 'runs': []})
        before, now = ({name: one['network_g'] for name, one in part['variants'].items()} for part in (whole, study))
        same_networks(before, now, 'among the files before')
        known = {(run['variant'], run['seed']) for run in whole['runs']}
        whole['runs'] += [run for run in study['runs'] if (run['variant'], run['seed']) not in known]
        whole['variants'] |= {
            name: variant for name, variant in study['variants'].items() if name not in whole['variants']
        }
    return list(found.values())


def same_networks(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise a UserError if a variant's network is another one in two mappings, since one row is to hold both."""
    for name in before.keys() & now.keys():
        change = next(differences(before[name], now[name], 'network_g.'), None)
        if change:
            raise UserError(
                f'variant {name} is another network {where}: {change}. Give this study a name of its own, by '
                '--set name=..., and report them one by one.'
            )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % confidence interval; without a width for one value alone."""
    count = len(values)
    if count < 2:
        return mean(values), math.nan
    deviation = float(np.std(values, ddof=1))
    return mean(values), float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)


def mean(values: Sequence[float]) -> float:
    """Not a number where one of them is none, or where there are none."""
    return float(np.mean(values)) if len(values) else math.nan


def _scores(runs: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> str:
    columns = _columns(runs)
    lines = _head(['variant', 'parameters', 'steps', 'core-hours', 'seeds', *columns])
    for name, variant in variants.items():
        mine = [run for run in runs if run['variant'] == name]
        hours = [run['core_seconds'] / 3600 for run in mine if run.get('core_seconds')]
        cells = [name, f'{variant["parameters"]:,}', f'{variant["steps"]:,}']
        cells += [f'{mean(hours):.2f}' if hours else '-', str(len(mine))]
        lines.append(_row(cells + [_spread([run['psnr'][column] for run in mine]) for column in columns]))
    return '\n'.join([*lines, '', 'PSNR in dB: mean and standard deviation over the seeds.', ''])


def _leads(runs: list[dict[str, Any]], reference: str) -> str:
    """What the reference is ahead of each other variant, seed by seed."""
    columns = _columns(runs)
    ours = {run['seed']: run['psnr'] for run in runs if run['variant'] == reference}
    lines = _head([f'{reference} ahead of', 'seeds', *columns])
    for name in dict.fromkeys(run['variant'] for run in runs if run['variant'] != reference):
        pairs = [(ours[run['seed']], run['psnr']) for run in runs if run['variant'] == name and run['seed'] in ours]
        if pairs:
            gains = [[mine[column] - theirs[column] for mine, theirs in pairs] for column in columns]
            lines.append(_row([name, str(len(pairs)), *map(_with_interval, gains)]))
    if len(lines) == 2:
        return ''
    said = 'dB, pairs of one seed: mean ± half of the 95 % interval (Student); a smaller difference could not be seen.'
    return '\n'.join([*lines, '', said, ''])


def _ablations(runs: list[dict[str, Any]]) -> str:
    """What silencing CEA costs a trained network."""
    ablated = [run for run in runs if run.get('ablated')]
    if not ablated:
        return ''
    columns = list(ablated[0]['ablated'])
    lines = _head(['without its dY', 'seeds', *columns])
    for name in dict.fromkeys(run['variant'] for run in ablated):
        mine = [run['ablated'] for run in ablated if run['variant'] == name]
        lines.append(_row([name, str(len(mine)), *(_spread([one[c] for one in mine], '+') for c in columns)]))
    return '\n'.join([*lines, '', 'dB against the same network with it, on the first pictures of each set.', ''])


def _residuals(runs: list[dict[str, Any]]) -> str:
    first = {run['variant']: run['residuals'] for run in reversed(runs) if run.get('residuals')}
    if not first:
        return ''
    lines = _head(['variant', 'site', 'size, fresh', 'trained', 'cosine, fresh', 'trained'])
    for variant, by_site in first.items():
        for site, (fresh, trained) in by_site.items():
            cells = [f'{value:.2f}' for pair in zip(fresh, trained) for value in pair]
            lines.append(_row([variant, site, *cells]))
    said = 'Size: |dY| / |XW|. Cosine: of the rows of A, between two pictures. Of the first seed.'
    return '\n'.join([*lines, '', said, ''])


def _columns(runs: list[dict[str, Any]]) -> list[str]:
    """Sets that every run was scored on."""
    return [column for column in runs[0]['psnr'] if all(column in run['psnr'] for run in runs)]


def _head(words: list[str]) -> list[str]:
    return [_row(words), f'|{"---|" * len(words)}']


def _row(cells: list[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _spread(values: list[float], sign: str = '') -> str:
    deviation = f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
    return f'{mean(values):{sign}.2f}{deviation}'


def _with_interval(values: list[float]) -> str:
    mean, half = interval(values)
    return f'{mean:+.2f}' if math.isnan(half) else f'{mean:+.2f} ± {half:.2f}'


def read_study(path: str | os.PathLike) -> dict[str, Any] | None:
    """The content of a ``study.json``; ``None`` if the file is another."""
    try:
        content = from_json(Path(path).read_text('utf-8'))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {'runs', 'variants', 'reference'} <= content.keys() else None
