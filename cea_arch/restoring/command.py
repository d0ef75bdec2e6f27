"""The command ``cea restore``: picture files and folders in, the same names out."""

import argparse
import glob
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cea_arch.errors import UserError
from cea_arch.files import refuse_to_replace
from cea_arch.restoring.maps import RoutingMaps, draw_maps
from cea_arch.restoring.pictures import FORMAT_OF, SUFFIXES, Picture, as_format, as_rgb8, read_picture, write_picture
from cea_arch.restoring.restorer import Restorer, enlarged, restore
from cea_arch.restoring.tiling import keep_freed_memory
from cea_arch.restoring.video import ENCODERS, restore_clip
from cea_arch.threads import ThreadChooser


@dataclass(frozen=True)
class Job:
    """One picture: where it is, its path below the output folder, and the format to write if it is another one."""

    source: Path
    target: Path
    format: str | None = None


@dataclass(frozen=True)
class Naming:
    """What is put at the end of names, and the extension of pictures, ``auto`` for their own."""

    suffix: str = ''
    ext: str = 'auto'

    def job(self, source: Path, target: Path) -> Job:
        """The job of a file that would be written to ``target`` under its own name; clips keep their extension."""
        keep = self.ext == 'auto' or target.suffix.lower() in ENCODERS
        ext = target.suffix if keep else f'.{self.ext}'
        return Job(source, target.with_name(f'{target.stem}{self.suffix}{ext}'), None if keep else FORMAT_OF[ext])


def run(args: argparse.Namespace) -> int:
    """Restore all pictures; returns 1 if one could not be, after all others are done."""
    keep_freed_memory()
    output = Path(args.output)
    inputs = args.inputs + args.input
    if not inputs:
        raise UserError('name pictures, folders of them, or patterns.')
    jobs, failures = find_jobs(inputs, output, args.recursive, Naming(args.suffix, args.ext))
    done = 0
    with _warnings_as_lines(), tqdm(total=len(jobs), unit='picture', disable=None) as bar:
        restorer = Restorer(
            args.model,
            args.device if args.gpu_id is None else f'cuda:{args.gpu_id}',
            args.precision,
            args.tile,
            args.overlap,
            args.conditioning,
            lambda tile, total: bar.set_postfix_str(f'tile {tile} of {total}') if total > 1 else None,
            args.strength,
        )
        if restorer.device.type == 'cpu':
            restorer.threads = ThreadChooser()
        if args.maps:
            restorer.maps = RoutingMaps(restorer.net, None if args.maps == 'last' else args.maps)
        for job in jobs:
            bar.set_description(job.source.name)
            try:
                if job.source.suffix.lower() in ENCODERS:
                    _restore_clip(job, restorer, args.overwrite, args.compare, bar)
                else:
                    restore_file(job, restorer, args.overwrite, args.compare)
                done += 1
            except (UserError, OSError, RuntimeError, MemoryError) as error:
                failures.append(str(error) if str(job.source) in str(error) else f'{job.source}: {error}')
            bar.update()
    for failure in failures:
        print(f'cea restore: {failure}', file=sys.stderr)
    print(f'{done} restored to {output}, {len(failures)} failed ({restorer.device}).')
    return 1 if failures else 0


def find_jobs(
    inputs: list[str], output: Path, recursive: bool, naming: Naming = Naming()
) -> tuple[list[Job], list[str]]:
    """What to restore, and for each input that gives nothing, why."""
    jobs: dict[Path, Job] = {}
    failures = []
    for text in inputs:
        matches = [text] if Path(text).exists() else sorted(glob.glob(text))  # noqa: PTH207  Path's takes no absolute
        found = [Path(match) for match in matches]
        if not found:
            failures.append(f'{text} does not exist.')
        for path in found:
            pictures = _pictures_below(path, output, recursive) if path.is_dir() else [(path, Path(path.name))]
            if not pictures:
                failures.append(
                    f'{path} holds no pictures{"" if recursive else "; -r looks into the folders below it"}.'
                )
            for source, relative in pictures:
                job = naming.job(source, output / relative)
                other = jobs.setdefault(job.target, job)
                if other.source != source:
                    failures.append(f'{source}: {other.source} is written to {job.target} already.')
    return list(jobs.values()), failures


def _pictures_below(folder: Path, output: Path, recursive: bool) -> list[tuple[Path, Path]]:
    """Picture files in ``folder``, each with its path relative to it; not those that are results."""
    return [
        (path, path.relative_to(folder))
        for path in sorted(folder.rglob('*') if recursive else folder.glob('*'))
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith('.')
        and path.is_file()
        and (output == folder or output not in path.parents)
    ]


def restore_file(job: Job, restorer: Restorer, overwrite: bool, compare: bool) -> None:
    """Restore one picture and write it, and on request the comparison and the maps."""
    extras = [job.target.with_name(f'{job.target.stem}_{word}.png') for word in ('compare', 'maps')]
    wanted = [job.target] + extras[:1] * compare + extras[1:] * bool(restorer.maps)
    for target in wanted:
        refuse_to_replace(target, overwrite)
    picture = read_picture(job.source)
    restored = restore(picture.pixels, restorer)
    result = replace(picture, pixels=restored)
    write_picture(job.target, as_format(result, job.format) if job.format else result, overwrite)
    if compare:
        pair = np.concatenate([enlarged(as_rgb8(picture.pixels), restorer.fit.scale), as_rgb8(restored)], axis=1)
        write_picture(extras[0], Picture(pair, 'PNG', picture.icc), overwrite)
    if restorer.maps:
        write_picture(extras[1], Picture(draw_maps(restorer.maps.maps), 'PNG'), overwrite)


def _restore_clip(job: Job, restorer: Restorer, overwrite: bool, compare: bool, bar: tqdm) -> None:
    if compare or restorer.maps:
        raise UserError(f'{job.source}: --compare and --maps are for pictures, not for clips.')
    refuse_to_replace(job.target, overwrite)
    restore_clip(
        job.source, job.target, restorer, lambda done, total: bar.set_postfix_str(f'frame {done} of {total or "?"}')
    )


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print warnings as the command's own lines, above the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter('always', UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f'cea restore: {message}', file=sys.stderr)
        yield
