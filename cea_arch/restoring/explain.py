"""``cea explain``: where CEA's probes look in a picture, what each layer adds, how far pictures are from each other."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from cea_arch.data.degradations import TASKS, quantize, synthesize
from cea_arch.data.pictures import Picture, read_picture
from cea_arch.errors import UserError, suggest
from cea_arch.files import refuse_to_replace
from cea_arch.layers import HyperAdapter
from cea_arch.layers.cea import DynamicFactors
from cea_arch.layers.observing import Residual, keeping, observing, silenced, sites
from cea_arch.restoring.fitting import Fit
from cea_arch.restoring.jobs import find_jobs
from cea_arch.restoring.maps import RoutingMaps, draw_maps, laid_out
from cea_arch.restoring.restorer import Restorer
from cea_arch.restoring.tiling import spans
from cea_arch.restoring.writing import as_rgb8, write_picture

SIDE = 512  # pixels, of the part of a picture that is looked at
PANEL = 560  # pixels, width of a picture of a sheet
BAND = 24  # pixels, of a caption
CELL = 480  # pixels, of a plot of distances
DISTANCES = 'distances.png'


@dataclass(frozen=True)
class Layer:
    """What one layer does in one picture.

    Attributes:
        size: |dY| / |XW|.
        used: How many components share its energy, as if evenly.
        rank: How many directions its dW has, in the same sense, by its singular values.
        change: What the result would be without it, in 8-bit levels, root of the mean square.
    """

    size: float
    used: float
    rank: float
    change: float


def run(args: argparse.Namespace) -> int:
    """Explain each picture by a sheet and a table, and several by their distances; 1 if one could not be read."""
    restorer = Restorer(args.model, args.device, network_g=args.network_g)
    names = sites(restorer.net)
    if not names:
        raise UserError(f'{args.model} holds a network without CEA layers.')
    if args.layer and args.layer not in names:
        raise UserError(f'no CEA layer {args.layer!r}.{suggest(args.layer, names)} There are {", ".join(names)}.')
    if args.keep and not args.synthetic:
        raise UserError('--keep compares with the picture as it was: it needs --synthetic.')
    layer = args.layer or list(names)[-1]
    output, factors, pairs = Path(args.output), {}, {}
    plans = [find_jobs([name], output, recursive=True) for name in args.inputs]  # equal names are two kinds' pictures
    if failures := [failure for plan in plans for failure in plan.failures]:
        raise UserError(failures[0])
    sources = list(dict.fromkeys(job.source for plan in plans for job in plan.jobs))
    kinds = {source: TASKS if args.synthetic else (source.absolute().parent.name,) for source in sources}
    count = sum(map(len, kinds.values()))
    targets = {}
    if count <= args.sheets:
        for source, name in zip(sources, _names(sources)):
            for kind in kinds[source]:
                targets[source, kind] = output / f'{name}{f"_{kind}" if args.synthetic else ""}_explained.png'
    for target in [*targets.values(), *([output / DISTANCES] if count > 1 else [])]:
        refuse_to_replace(target, args.overwrite)
    code = 0
    for source in sources:
        try:
            pixels = _middle(as_rgb8(read_picture(source).pixels))
        except UserError as error:
            print(f'cea explain: {error}', file=sys.stderr)
            code = 1
            continue
        for kind, degraded in zip(kinds[source], _versions(pixels) if args.synthetic else [pixels]):
            image = _tensor(degraded).to(restorer.device)
            restored, seen = observe(restorer.net, restorer.fit, image)
            factors.setdefault(kind, []).append(seen)
            if args.keep:
                pairs.setdefault(kind, []).append((image, _tensor(pixels).to(restorer.device)))
            if target := targets.get((source, kind)):
                layers = explain(restorer.net, restorer.fit, image, restored, seen)
                sheet = draw_sheet(restorer.net, restorer.fit, image, restored, layer)
                write_picture(target, Picture(sheet, 'PNG'), args.overwrite)
                print(f'{target}, layer {layer}:\n\n{layer_table(layers)}')
    if sum(map(len, factors.values())) > 1:
        _explain_distances(factors, output / DISTANCES, args.overwrite)
    if pairs:
        print(f'\n{sparsity_table(restorer.net, restorer.fit, pairs, factors, args.keep)}')
    return code


@torch.no_grad()
def observe(net: nn.Module, fit: Fit, image: Tensor) -> tuple[Tensor, dict[str, Residual]]:
    """Restore an image ``(1, 3, H, W)`` in [0, 1]; the result, and what each layer that ran has added."""
    with observing(net) as seen:
        restored = fit.run(net, image).clamp(0, 1)
    return restored, {name: found[0] for name, found in seen.items() if found}


@torch.no_grad()
def explain(
    net: nn.Module, fit: Fit, image: Tensor, restored: Tensor, residuals: Mapping[str, Residual]
) -> dict[str, Layer]:
    """What each layer does in an image, from what :func:`observe` has given."""
    layers = {}
    for name, residual in residuals.items():
        with silenced(net, [name]):
            without = fit.run(net, image).clamp(0, 1)
        singular = torch.linalg.svdvals(residual.bases.mT.float() @ residual.directions.float())
        change = (without - restored).square().mean().sqrt().item() * 255
        layers[name] = Layer(residual.size, effective(residual.shares), effective(singular.square()), change)
    return layers


def effective(energies: Tensor) -> float:
    """How many parts share a sum, as if evenly: the exponential of the entropy of their shares."""
    shares = energies / energies.sum().clamp_min(1e-30)
    return torch.special.entr(shares).sum().exp().item()


def distances(factors: list[Mapping[str, Residual]], which: str) -> np.ndarray:
    """Cosine distances between pictures ``(n, n)``: of all rows of ``which``, ``bases`` or ``directions``, together."""
    rows = torch.stack(
        [
            torch.cat([nn.functional.normalize(getattr(r, which).float(), dim=-1).flatten() for r in one.values()])
            for one in factors
        ]
    )
    rows = nn.functional.normalize(rows, dim=-1)
    return (1 - rows @ rows.mT).clamp_min(0).cpu().numpy()


def layer_table(layers: Mapping[str, Layer]) -> str:
    """Markdown: a row a layer."""
    lines = ['| layer | size | components used | rank of dW | result without it |', '|---|---:|---:|---:|---:|']
    lines += [f'| {n} | {x.size:.2f} | {x.used:.1f} | {x.rank:.1f} | {x.change:.2f} |' for n, x in layers.items()]
    said = 'Size: |dY| / |XW|. Used, rank: as if evenly. Without it: how far the result would be, in levels of 255.'
    return '\n'.join([*lines, '', said, ''])


@torch.no_grad()
def sparsity_table(
    net: nn.Module,
    fit: Fit,
    pairs: Mapping[str, list[tuple[Tensor, Tensor]]],
    factors: Mapping[str, list[Mapping[str, Residual]]],
    counts: Sequence[int],
) -> str:
    """Markdown: PSNR by kind with all components, and what is lost with fewer.

    Args:
        net: Network with CEA layers.
        fit: Which sizes it takes.
        pairs: By kind, degraded images ``(1, 3, H, W)`` in [0, 1] and what they were.
        factors: By kind, what the layers have added to each of them.
        counts: How many components are kept.
    """
    every = [one for members in factors.values() for one in members]
    mean = {name: torch.stack([one[name].shares for one in every]).mean(0) for name in every[0]}
    order = {name: shares.argsort(descending=True) for name, shares in mean.items()}
    ways = {'none': silenced(net)}
    for count in counts:
        ways |= {
            f'{count} strongest of each picture': keeping(net, count),
            f'{count} strongest of all': keeping(net, count, order),
            f'dW of rank {count}': keeping(net, count, merged=True),
        }

    def scores() -> list[float]:
        return [np.mean([psnr(fit.run(net, image), clean) for image, clean in members]) for members in pairs.values()]

    whole = scores()
    lines = [f'| kept | {" | ".join(pairs)} | mean |', f'|---|{"---:|" * (len(pairs) + 1)}']
    lines.append(f'| all | {" | ".join(f"{value:.2f}" for value in (*whole, np.mean(whole)))} |')
    for name, way in ways.items():
        with way:
            losses = [value - full for value, full in zip(scores(), whole)]
        lines.append(f'| {name} | {" | ".join(f"{value:+.2f}" for value in (*losses, np.mean(losses)))} |')
    return '\n'.join([*lines, '', 'PSNR in dB; below the first row what changes against it.'])


def psnr(restored: Tensor, clean: Tensor) -> float:
    """PSNR in dB of images in [0, 1], the first clipped: for what is asked of a network, without a protocol."""
    return -10 * (restored.clamp(0, 1) - clean).square().mean().log10().item()


def draw_sheet(net: nn.Module, fit: Fit, image: Tensor, restored: Tensor, name: str) -> np.ndarray:
    """The picture and its restoration, where the probes of one layer look, and its routing; RGB uint8."""
    layer = sites(net)[name]
    adapter = layer if isinstance(layer, HyperAdapter) else layer.adapter
    looks: list[Tensor] = []
    maps = RoutingMaps(net, name)
    handle = adapter.factors.register_forward_pre_hook(lambda factors, args: looks.append(_looks(factors, args[0])))
    try:
        with torch.no_grad(), maps.recording():
            fit.run(net, image)
    finally:
        handle.remove()
    size = tuple(image.shape[-2:])
    maps.place(spans(size[0], size[0], 0)[0], spans(size[1], size[1], 0)[0], size)
    parts = [
        _captioned(_resized(quantize(one[0].permute(1, 2, 0).cpu().numpy())), text)
        for one, text in ((image, 'picture'), (restored, f'restored; below: {name}'))
    ]
    for part, factor in zip(looks[0] if looks else (), 'AB'):
        places = part if part.ndim == 3 else laid_out(part, size)
        text = f'where the probes of {factor} look: red more than evenly, blue less'
        parts.append(_captioned(_resized(draw_maps(places.log2().clamp(-4, 4))), text))
    text = f'who takes which component of {maps.target}: blue with the other sign'
    parts.append(_captioned(_resized(draw_maps(maps.maps)), text))
    rows = [
        np.hstack([_to_height(part, max(p.shape[0] for p in row)) for part in row]) for row in (parts[:2], parts[2:])
    ]
    width = max(row.shape[1] for row in rows)
    return np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])


def _looks(factors: nn.Module, x: Tensor) -> Tensor:
    """Attention as a multiple of even attention: ``(2, r, h, w)`` of a plan, else ``(2, r, N)``; of the first image."""
    if not isinstance(factors, DynamicFactors):
        return torch.ones(0)
    weights = factors.attention(x[:1])[0].cpu()
    weights = weights * weights.shape[-1]
    if factors.condense is None:
        return weights
    stride = factors.condense.stride
    return weights.unflatten(-1, [-(-length // stride) for length in x.shape[-2:]])


def _explain_distances(factors: Mapping[str, list[Mapping[str, Residual]]], target: Path, overwrite: bool) -> None:
    """Print the mean distances within and between groups, and draw all of them."""
    every = [one for members in factors.values() for one in members]
    owner = np.repeat(np.arange(len(factors)), [len(members) for members in factors.values()])
    same = (owner[:, None] == owner) & ~np.eye(len(every), dtype=bool)
    plots, lines = [], ['| cosine distance | within | between |', '|---|---:|---:|']
    for which, letter in (('bases', 'A'), ('directions', 'B')):
        found = distances(every, which)
        cells = [f'{found[mask].mean():.3f}' if mask.any() else '' for mask in (same, owner[:, None] != owner)]
        lines.append(f'| of {letter} | {cells[0]} | {cells[1]} |')
        plots.append(_captioned(_plot(found, owner, list(factors)), f'{letter}: distances, up to {found.max():.2f}'))
    write_picture(target, Picture(np.hstack(plots), 'PNG'), overwrite)
    print(f'{len(every)} pictures, {len(factors)} kinds ({", ".join(factors)}); {target}:\n\n' + '\n'.join(lines))


def _plot(found: np.ndarray, owner: np.ndarray, names: list[str]) -> np.ndarray:
    """Distances as a square, dark where they are large, with a line and a name for each group; RGB uint8."""
    grey = (255 * (1 - found / max(found.max(), 1e-9))).astype(np.uint8)
    square = cv2.resize(grey, (CELL, CELL), interpolation=cv2.INTER_NEAREST)
    picture = cv2.cvtColor(square, cv2.COLOR_GRAY2RGB)
    for number, name in enumerate(names):
        start = round(CELL * int((owner < number).sum()) / len(owner))
        if number:
            picture[start, :] = picture[:, start] = (220, 60, 60)
        _write(picture, name, (4, start + 14), (200, 0, 0))
    return np.pad(picture, ((0, 0), (0, 8), (0, 0)), constant_values=255)


def _versions(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The picture degraded by each of ``TASKS``."""
    for number, task in enumerate(TASKS):
        yield quantize(synthesize(pixels / 255, [task], np.random.default_rng(number)))


def _names(sources: list[Path]) -> list[str]:
    """What the sheets of pictures are called by: as short as it can be without two being equal."""
    paths = [source.absolute() for source in sources]
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else f'{path.parent.name}_{path.stem}' for path in paths]
    return names if len({*names}) == len(names) else ['_'.join(path.parts[1:]) for path in paths]


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None]


def _middle(pixels: np.ndarray) -> np.ndarray:
    top, left = (max(length - SIDE, 0) // 2 for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])


def _resized(picture: np.ndarray) -> np.ndarray:
    """A picture as wide as ``PANEL``."""
    height, width = picture.shape[:2]
    way = cv2.INTER_AREA if width > PANEL else cv2.INTER_NEAREST
    return cv2.resize(picture, (PANEL, max(round(height * PANEL / width), 1)), interpolation=way)


def _to_height(picture: np.ndarray, height: int) -> np.ndarray:
    return np.pad(picture, ((0, height - picture.shape[0]), (0, 8), (0, 0)), constant_values=255)


def _captioned(picture: np.ndarray, text: str) -> np.ndarray:
    band = np.full((BAND, picture.shape[1], 3), 255, np.uint8)
    _write(band, text, (4, BAND - 8), (0, 0, 0))
    return np.vstack([band, picture])


def _write(picture: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
