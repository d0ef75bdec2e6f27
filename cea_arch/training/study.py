"""``cea study``: does CEA earn its place, and what does it do? The same training with the paper's ablations."""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.errors import UserError, suggest
from cea_arch.files import as_json, written_beside
from cea_arch.layers import HyperAdapter
from cea_arch.layers.cea import assemble
from cea_arch.layers.tokens import as_tokens, from_tokens
from cea_arch.networks.cea_ir import FFN_EXPANSION_FACTOR
from cea_arch.networks.from_file import build_network, load_network
from cea_arch.training.option_files import Options, write_options
from cea_arch.training.options import check_options, read_options
from cea_arch.training.pipeline import parsed_options

VARIANTS = {  # the paper's ablations by name, and ours of T: what of network_g each changes
    'none': {'modulate': []},
    'q': {'modulate': ['q']},
    'k': {'modulate': ['k']},
    'v': {'modulate': ['v']},
    'qk': {'modulate': ['q', 'k']},
    'qkv': {'modulate': ['q', 'k', 'v']},
    'ffn': {'modulate': ['ffn']},
    'mixer': {'modulate': ['mixer']},
    'mixed': {'modulate': ['mixed']},
    'fuse': {'modulate': ['fuse']},
    'static': {'factors': 'static'},
    'pooled': {'factors': 'pooled'},
    'topk': {'routing': 'topk'},
    'static_topk': {'factors': 'static', 'routing': 'topk'},
    'no_rank_norm': {'rank_norm': False},
    'r4': {'rank': 4},
    'r16': {'rank': 16},
    'scale': {'pooled_scale': True},
    'none_scale': {'modulate': [], 'pooled_scale': True},
    'cea': {},
}
DEFAULT = ('none', 'static', 'pooled', 'topk', 'cea')
MOST_DIFFERENCE = 0.02  # of the number of parameters, between variants
SAME = 0.002  # and what is not worth a change
Scores = dict[str, float]


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then write ``study.md`` and ``study.json``; returns 1 if a training failed."""
    opt = read_options(args.opt, args.set, args.force_yml)
    if opt['network_g']['type'] != 'CEAIR':
        raise UserError(f'cea study varies CEAIR; network_g is {opt["network_g"]["type"]}.')
    if 'psnr' not in (opt['val'].get('metrics') or {}):
        raise UserError('cea study needs psnr among val.metrics, such as by val.protocol: aio.')
    if opt['path'].get('pretrain_network_g'):
        raise UserError('cea study trains from nothing: path.pretrain_network_g must be ~.')
    variants = args.variants or DEFAULT
    for name in variants:
        if name not in VARIANTS:
            raise UserError(f'variant {name!r} is not known.{suggest(name, VARIANTS)} Known: {", ".join(VARIANTS)}.')
    networks = {name: opt['network_g'] | VARIANTS[name] for name in variants}
    if args.match:
        networks = {name: matched(network, opt['network_g'], name) for name, network in networks.items()}
    counts = {name: _parameters(network) for name, network in networks.items()}  # each is built, before any trains
    folder = Path(args.root, 'experiments', f'{opt["name"]}_study')
    folder.mkdir(parents=True, exist_ok=True)
    runs = {(name, seed): f'{opt["name"]}_{name}_s{seed}' for seed in args.seeds for name in variants}

    def train(variant: str, seed: int) -> bool:
        name = runs[variant, seed]
        changed = {'name': name, 'manual_seed': seed, 'network_g': networks[variant]}
        file = folder / f'{name}.yml'
        write_options(opt | changed, file, f'cea study -opt {args.opt}: {variant}, seed {seed}')
        return _train(file, name, args.root, opt['train']['total_iter'])

    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda key: train(*key), runs))
    failed = [name for name, good in zip(runs.values(), done, strict=True) if not good]
    results = {key: _scores(args.root, name) for key, name in runs.items() if name not in failed}
    content = {'parameters': counts, 'psnr': {f'{name}_s{seed}': scores for (name, seed), scores in results.items()}}
    trained = {name: run for (name, seed), run in runs.items() if seed == args.seeds[0] and run not in failed}
    images = _first_images(args, opt)
    content['residuals'] = {
        name: (
            residuals(build_network(networks[name]), images),
            residuals(load_network(_weights(args.root, run)), images),
        )
        for name, run in trained.items()
        if networks[name].get('modulate') != []
    }
    text = table(results, counts) + residual_table(content['residuals'])
    for file, written in (('study.md', text), ('study.json', as_json(content))):
        with written_beside(folder / file) as aside:
            aside.write_text(written, 'utf-8')
    print(text, end='')
    for name in failed:
        print(f'{name} failed; see {folder / name}.log', file=sys.stderr)
    return 1 if failed else 0


def matched(network: dict[str, Any], model: dict[str, Any], name: str) -> dict[str, Any]:
    """A variant's options with as many parameters as ``model`` has, by the width of its feed-forward.

    Raises:
        UserError: The numbers of parameters cannot be brought within two per cent of each other.
    """
    wanted = _parameters(model)
    lacking = wanted - _parameters(network)
    if abs(lacking) > SAME * wanted:
        start = network.get('ffn_expansion_factor', FFN_EXPANSION_FACTOR)
        for_one = _parameters(network | {'ffn_expansion_factor': start + 1}) - _parameters(network)
        network = network | {'ffn_expansion_factor': round(start + lacking / for_one, 3)}
    if abs(_parameters(network) - wanted) > MOST_DIFFERENCE * wanted:
        raise UserError(f'variant {name}: no width gives about the {wanted:,} parameters that the option file has.')
    return network


def table(results: dict[tuple[str, int], Scores], counts: dict[str, int]) -> str:
    """Mean and standard deviation over the seeds by variant, then CEA's lead over each, paired by seed; PSNR in dB."""
    sets = list(next(iter(results.values()), {}))
    head = '| variant | parameters | seeds | ' + ' | '.join(sets) + ' |\n|---|---:|---:|' + '---:|' * len(sets)
    lines = [head]
    by_variant = {name: {s: v for (n, s), v in results.items() if n == name} for name in counts}
    for name, runs in by_variant.items():
        cells = [_spread([scores[column] for scores in runs.values()]) for column in sets]
        lines.append(f'| {name} | {counts[name]:,} | {len(runs)} | ' + ' | '.join(cells) + ' |')
    for name, runs in by_variant.items():
        pairs = [
            (by_variant['cea'][seed], scores) for seed, scores in runs.items() if seed in by_variant.get('cea', {})
        ]
        if name != 'cea' and pairs:
            cells = [_spread([ours[column] - theirs[column] for ours, theirs in pairs], '+') for column in sets]
            lines.append(f'| cea - {name} | | {len(pairs)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n\nPSNR in dB: mean and standard deviation over the seeds.\n'


def residuals(net: nn.Module, images: list[Tensor]) -> dict[str, tuple[float, float]]:
    """What CEA does, by site.

    Args:
        net: A network with hyper-adapters.
        images: RGB ``(1, 3, H, W)`` in [0, 1], two or more.

    Returns:
        The mean of |dY| / |XW| over the images, and of the cosine between the rows of A of any two of them.
    """
    adapters = {name: m for name, m in net.named_modules() if isinstance(m, HyperAdapter)}
    seen = {name: [] for name in adapters}
    for name, adapter in adapters.items():
        adapter.project = partial(_project_seen, adapter, seen[name])
    try:
        with torch.no_grad():
            for image in images:
                net.eval()(image)
    finally:
        for adapter in adapters.values():
            del adapter.project
    found = {}
    for name, calls in seen.items():
        sizes, bases = zip(*calls)
        cosines = [F.cosine_similarity(a, b, dim=-1).mean() for n, a in enumerate(bases) for b in bases[:n]]
        found[name] = (statistics.mean(sizes), torch.stack(cosines).mean().item())
    return found


def residual_table(found: dict[str, dict[str, Any]]) -> str:
    """What :func:`residuals` gave of a fresh and of a trained network of each variant."""
    lines = [
        '',
        '| variant | site | size, fresh | trained | cosine, fresh | trained |',
        '|---|---|---:|---:|---:|---:|',
    ]
    for variant, (fresh, trained) in found.items():
        for site, before in fresh.items():
            cells = (f'{value:.2f}' for pair in zip(before, trained[site]) for value in pair)
            lines.append(f'| {variant} | {site} | ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, '', 'Size: |dY| / |XW|. Cosine: of the rows of A, between two pictures.', ''])


def _first_images(args: argparse.Namespace, opt: Options) -> list[Tensor]:
    """The first image of each validation set, at most 256 x 256 of it."""
    with opt.placing():
        datasets = check_options(parsed_options(args, opt, is_train=True)).datasets
    return [dataset[0]['lq'][None, :, :256, :256] for phase, dataset in datasets.items() if phase != 'train']


def _weights(root: str, name: str) -> Path:
    return Path(root, 'experiments', name, 'models', 'net_g_latest.pth')


def _project_seen(adapter: HyperAdapter, seen: list, projection: nn.Module, x: Tensor) -> Tensor:
    """As :meth:`HyperAdapter.project`, noting the size of the residual and the routing bases."""
    tokens, plain, factors = as_tokens(x, 'bchw'), as_tokens(projection(x), 'bchw'), adapter(x)
    residual = assemble(torch.zeros_like(plain), tokens, factors, adapter.spec.rank, adapter.routing)
    beside = torch.cat([plain[..., a:b] for a, b in adapter.spec.parts.values()], dim=-1)
    seen.append(((residual.norm() / beside.norm()).item(), factors[0][0]))
    return from_tokens(plain + residual, x, 'bchw')


def _train(file: Path, name: str, root: str, total: int) -> bool:
    """Train in a process of its own, from its last checkpoint if there is one; whether it came to its end."""
    results = Path(root, 'experiments', name, 'results.json')
    if results.is_file() and json.loads(results.read_text('utf-8'))['iteration'] == total:
        return True
    command = [sys.executable, '-m', 'cea_arch.train', '-opt', str(file), '--root', root, '--auto_resume']
    print(f'{name}: training', file=sys.stderr)
    with file.with_suffix('.log').open('w') as log:
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode == 0


def _scores(root: str, name: str) -> Scores:
    """PSNR by set, and the mean of each group."""
    sets = json.loads(Path(root, 'experiments', name, 'results.json').read_text('utf-8'))['sets']
    scores = {key: result['means']['psnr'] for key, result in sets.items()}
    for group in dict.fromkeys(result['group'] for result in sets.values() if result['group']):
        members = [scores[key] for key, result in sets.items() if result['group'] == group]
        scores[f'**mean of {group}**'] = statistics.mean(members)
    return scores


def _parameters(network: dict[str, Any]) -> int:
    with torch.device('meta'):  # counted, not made
        return sum(p.numel() for p in build_network(network).parameters())


def _spread(values: list[float], sign: str = '') -> str:
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.2f}{deviation}'
