"""The command ``cea restore``: picture files and folders in, the same names out."""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cea_arch import distributed
from cea_arch.data.pictures import Picture, picture_size, read_picture
from cea_arch.errors import UserError
from cea_arch.files import refuse_to_replace
from cea_arch.restoring.blending import tones_moved
from cea_arch.restoring.jobs import Job, Naming, Plan, find_jobs
from cea_arch.restoring.maps import RoutingMaps, draw_maps
from cea_arch.restoring.restorer import Restorer, enlarged, restore
from cea_arch.restoring.tiling import keep_freed_memory
from cea_arch.restoring.video import ENCODERS, clip_size, restore_clip
from cea_arch.restoring.writing import as_format, as_rgb8, write_picture
from cea_arch.threads import ThreadChooser

VISIBLE = 15  # levels, of tones that moved; noise, rain and snow alone move them less
MOST_NAMED = 3
PATIENCE = 7 * 24 * 3600  # seconds that a process which is done waits for the others


def run(args: argparse.Namespace) -> int:
    """Restore all pictures; returns 1 if one could not be, after all others are done.

    Of several processes that torchrun or srun started each takes its share; the first one says what became of all.
    """
    keep_freed_memory()
    inputs = args.inputs + args.input
    if not inputs:
        raise UserError('name pictures, folders of them, or patterns.')
    output = Path(args.output)
    plan = find_jobs(inputs, output, args.recursive, Naming(args.suffix, args.ext))
    if args.list:
        return _list(plan, args.overwrite)
    with _joined_processes():
        with distributed.together():
            restorer = _restorer(args)
        rank, failures, moved = distributed.rank(), [], []
        done = _restore_all(plan.jobs[rank :: distributed.size()], restorer, args, failures, moved)
        together = distributed.gather((done, failures, str(restorer.device), moved))
    if rank:
        return 0  # the first one answers for all
    done = sum(one[0] for one in together)
    failures = plan.failures + [failure for one in together for failure in one[1]]
    for failure in failures:
        print(f'cea restore: {failure}', file=sys.stderr)
    if plan.passed_over:
        print(f'{plan.passed_over} results of earlier runs were passed over.')
    moved = [] if args.keep_tones else [name for one in together for name in one[3]]
    if moved:
        names = ', '.join(moved[:MOST_NAMED]) + (f' and {len(moved) - MOST_NAMED} more' if moved[MOST_NAMED:] else '')
        print(f'Light or contrast changed visibly: {names}. Where it was meant so, --keep-tones keeps it.')
    devices = ', '.join(dict.fromkeys(one[2] for one in together))
    print(f'{done} restored to {output}, {len(failures)} failed ({devices}).')
    return 1 if failures else 0


def restore_file(job: Job, restorer: Restorer, overwrite: bool, compare: bool) -> float:
    """Restore one picture and write it, and on request the comparison and the maps; how far its tones moved."""
    for target in _targets(job, compare, bool(restorer.maps)):
        refuse_to_replace(target, overwrite)
    picture = read_picture(job.source)
    restored = restore(picture.pixels, restorer)
    result = replace(picture, pixels=restored)
    write_picture(job.target, as_format(result, job.format) if job.format else result, overwrite)
    before, after = as_rgb8(picture.pixels), as_rgb8(restored)
    if compare:
        pair = np.concatenate([enlarged(before, restorer.fit.scale), after], axis=1)
        write_picture(job.extra('compare'), Picture(pair, 'PNG', picture.icc), overwrite)
    if restorer.maps:
        write_picture(job.extra('maps'), Picture(draw_maps(restorer.maps.maps), 'PNG'), overwrite)
    return tones_moved(before, after)


def _restorer(args: argparse.Namespace) -> Restorer:
    device = args.device if args.gpu_id is None else f'cuda:{args.gpu_id}'
    if device == 'auto' and distributed.size() > 1:
        device = distributed.own_device()
    restorer = Restorer(
        args.model,
        device,
        args.precision,
        args.tile,
        args.overlap,
        args.conditioning,
        strength=args.strength,
        network_g=args.network_g,
        adapt=args.adapt,
        keep_tones=args.keep_tones,
    )
    if restorer.device.type == 'cpu':
        restorer.threads = ThreadChooser()
    if args.maps:
        restorer.maps = RoutingMaps(restorer.net, None if args.maps == 'last' else args.maps)
    return restorer


def _restore_all(
    jobs: list[Job], restorer: Restorer, args: argparse.Namespace, failures: list[str], moved: list[str]
) -> int:
    """Restore what can be restored; returns how many are done.

    Adds to ``failures`` what cannot be, and to ``moved`` the pictures whose tones are no longer theirs.
    """
    done, written = 0, {}
    sizes = [_pixels(job) for job in jobs]
    shown = '{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}'
    off = True if distributed.rank() else None
    with tqdm(total=sum(sizes), bar_format=shown, disable=off) as bar:
        for number, (job, pixels) in enumerate(zip(jobs, sizes), 1):
            bar.set_description(f'{job.source.name} ({number} of {len(jobs)})')
            advance = partial(_advance, bar, bar.n, pixels)
            try:
                for target in _targets(job, args.compare, bool(args.maps)):
                    if (other := written.setdefault(target, job.source)) != job.source:
                        raise UserError(f'{target} is written already, for {other}.')
                if job.source.suffix.lower() in ENCODERS:
                    _restore_clip(job, restorer, args, advance)
                else:
                    restorer.progress = advance
                    if restore_file(job, restorer, args.overwrite, args.compare) > VISIBLE:
                        moved.append(job.target.name)
                done += 1
            except Exception as error:  # whatever is wrong with one, the others are done
                failures.append(_said(error, job.source))
                if args.debug:
                    tqdm.write(traceback.format_exc(), file=sys.stderr)
            advance(1, 1)
    return done


def _targets(job: Job, compare: bool, maps: bool) -> list[Path]:
    return [job.target] + [job.extra('compare')] * compare + [job.extra('maps')] * maps


def _advance(bar: tqdm, before: float, pixels: int, part: int, parts: int) -> None:
    """Show that so many parts of a picture are done."""
    bar.update(before + pixels * part / parts - bar.n)


def _said(error: Exception, source: Path) -> str:
    known = isinstance(error, (UserError, OSError, MemoryError))
    text = str(error) if known else f'{type(error).__name__}: {error} (--debug shows where)'
    return text if str(source) in text else f'{source}: {text}'


def _restore_clip(job: Job, restorer: Restorer, args: argparse.Namespace, advance: Callable[[int, int], None]) -> None:
    if args.compare or restorer.maps or args.adapt:
        raise UserError(f'{job.source}: --compare, --maps and --adapt are for pictures, not for clips.')
    refuse_to_replace(job.target, args.overwrite)
    restorer.progress = lambda part, parts: None
    restore_clip(job.source, job.target, restorer, lambda done, total: advance(min(done, total), max(total, 1)))


def _pixels(job: Job) -> int:
    """How many are to be restored; 0 for a file that is about to fail."""
    try:
        frames, height, width = _size(job)
        return max(frames, 1) * height * width
    except Exception:  # it will be said when its turn comes
        return 0


def _size(job: Job) -> tuple[int, int, int]:
    """Number of frames, 0 where a clip does not say, height and width."""
    if job.source.suffix.lower() in ENCODERS:
        return clip_size(job.source)
    return 1, *picture_size(job.source, str(job.source))


def _list(plan: Plan, overwrite: bool) -> int:
    """Say what would be read and written; nothing is."""
    failures, fine = list(plan.failures), 0
    for job in plan.jobs:
        try:
            refuse_to_replace(job.target, overwrite)
            frames, height, width = _size(job)
            many = f', {frames or "?"} frames' if job.source.suffix.lower() in ENCODERS else ''
            print(f'{job.source} ({width} x {height}{many}) -> {job.target}')
            fine += 1
        except (UserError, OSError) as error:
            failures.append(_said(error, job.source))
    for failure in failures:
        print(f'cea restore: {failure}', file=sys.stderr)
    earlier = f'{plan.passed_over} results of earlier runs passed over'
    print(f'{fine} would be restored, {earlier}, {len(failures)} mistakes.')
    return 1 if failures else 0


@contextmanager
def _joined_processes() -> Iterator[None]:
    """Have what torchrun or srun started work together."""
    launcher = distributed.launcher()
    if launcher:
        distributed.start(launcher, cuda=False, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.stop()
