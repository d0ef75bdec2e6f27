"""From raw downloads to verified LMDBs: what the scripts ``datasets_prep/prepare_*.py`` run."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2

from cea_arch.data.benchmarks import BENCHMARKS, GOPRO_TRAIN
from cea_arch.data.check import Checked, check_sets, in_order, progress
from cea_arch.data.image_store import decode
from cea_arch.data.lmdb_writer import write_lmdb
from cea_arch.data.recognise import Found, Places, by_hand, scan, unclaimed
from cea_arch.errors import UserError, suggest
from cea_arch.files import as_path, written_beside

MOST_REASONS = 10
FAULTS = ('unmatched', 'unequal', 'unreadable', 'twice', 'duplicates', 'doubtful')
COLUMNS = ('set', 'layout', 'found', 'good', 'expected', *FAULTS, 'verdict')
CROPS_GROW = 1.8  # bytes of a frame's crops, which overlap, to one of the frame
CROP_SIZE, CROP_OVERLAP = 512, 256  # pixels: with them Restormer, and after it MoCE-IR, cut GoPro's training frames


def main(benchmark: str, argv: list[str] | None = None) -> int:
    """Check, and unless ``--check`` write, the sets of a benchmark.

    Returns:
        The exit code: 0; 1 where the check found something missing or wrong; 2 for another mistake, such as a full
        disk; 130 when interrupted.
    """
    args = _parser(benchmark).parse_args(argv)
    try:
        return _run(benchmark, args)
    except UserError as error:
        print(f'{benchmark}: {error}', file=sys.stderr)
    except OSError as error:
        print(f'{benchmark}: {error}. The same command goes on from what is written.', file=sys.stderr)
    except KeyboardInterrupt:
        print(f'\n{benchmark}: interrupted. The same command goes on from what is written.', file=sys.stderr)
        return 130
    return 2


def _parser(benchmark: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f'Check the raw image sets of {benchmark} and write them as LMDBs. Nothing is downloaded.'
    )
    parser.add_argument(
        '--raw', type=as_path, nargs='+', required=True, help='folders that hold the downloads, unpacked'
    )
    parser.add_argument(
        '--output', type=as_path, default=Path('datasets'), help='folder to write to (default: datasets)'
    )
    parser.add_argument('--check', action='store_true', help='only check')
    parser.add_argument(
        '--set',
        nargs='+',
        action='append',
        default=[],
        dest='sets',
        metavar=('NAME', 'FOLDER'),
        help='name the folders of a set by hand: its name, as in the table, ground truths, degraded images',
    )
    parser.add_argument('--details', type=as_path, metavar='FILE', help='write every file with a fault to FILE')
    parser.add_argument(
        '--allow-partial', action='store_true', help='write what is good although something is missing or wrong'
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='take pictures for what their names say, though they are grey, the same, or unlike their partners',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace LMDBs that hold something else')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='threads (default: one a CPU core)')
    if benchmark == 'AIO-5':
        parser.add_argument(
            '--gopro-crops',
            action='store_true',
            help=f'write the training frames of GoPro as crops of {CROP_SIZE} pixels that overlap by {CROP_OVERLAP}, '
            'to gopro_crops_{lq,gt}.lmdb (PNG, 8 a frame)',
        )
    return parser


def _run(benchmark: str, args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise UserError(f'--workers must be at least 1, got {args.workers}.')
    places = scan(args.raw)
    named = dict(_named(words, benchmark) for words in args.sets)
    checked = check_sets(BENCHMARKS[benchmark], places, args.workers, args.trust, named)
    print(report(checked))
    print(''.join(f'{line}.\n' for line in reasons(checked, places)), end='')
    if args.details:
        lines = [f'{one.found.title}\t{fault}\t{item}\n' for one in checked for fault, item in one.listed]
        with written_beside(args.details) as aside:
            aside.write_text(''.join(lines), 'utf-8')
    fine = all(one.is_fine() for one in checked)
    if args.check or not (fine or args.allow_partial):
        if not fine:
            print('Something is missing or wrong. With --allow-partial what is good is written all the same.')
        return 0 if fine else 1
    jobs = plan(checked, getattr(args, 'gopro_crops', False))
    if not jobs:
        raise UserError(f'there is nothing good of its sets below {", ".join(map(str, args.raw))}; see above.')
    _check_space(jobs, args.output)
    for store, files in jobs.items():
        _write(args.output / f'{store}.lmdb', files, args)
    return 0


def _named(words: list[str], benchmark: str) -> tuple[str, Found]:
    """A set that ``--set`` names, by its title."""
    name, *folders = words
    titles = {f'{one.name} ({one.split})': one for one in BENCHMARKS[benchmark]}
    fitting = [title for title, one in titles.items() if name.casefold() in (title.casefold(), one.name.casefold())]
    if len(fitting) != 1:
        hint = f' It is one of {", ".join(fitting)}.' if fitting else suggest(name, titles)
        raise UserError(f'--set: {name!r} is no one set of {benchmark}.{hint}')
    if not 1 <= len(folders) <= 2:
        raise UserError(f'--set {name}: expected the folder of ground truths and of degraded images, got {folders}.')
    return fitting[0], by_hand(titles[fitting[0]], *map(as_path, folders))


def reasons(checked: list[Checked], places: Places) -> list[str]:
    """Why a set may be absent though it was downloaded, in sentences; none where nothing is missing."""
    wanting = [one.found.image_set for one in checked if not one.is_fine()]
    if not wanting:
        return []
    claimed = {path for one in checked for names in one.found.files.values() for path in names.values()}
    claimed |= {path for one in checked for path, _ in one.found.copies}
    said = unclaimed(places, claimed, wanting)
    if len(said) > MOST_REASONS:
        said = [*said[:MOST_REASONS], f'{len(said) - MOST_REASONS} more folders fit no set']
    said += [f'{path} is an archive: unpack it' for path in places.archives[:MOST_REASONS]]
    return said + [f'{folder} may not be read: no permission' for folder in places.closed]


def report(checked: list[Checked]) -> str:
    """The check's table; below it every fault and note, and where absent sets are to be had."""
    rows = [COLUMNS]
    for one in checked:
        layout = one.found.layout.name if one.found.layout else '-'
        for role in one.roles:
            name = one.found.title if role in ('lq', 'gt') else f'{one.found.title} {role}'
            found, good = one.matched.get(role, 0), len(one.pairs.get(role, ()))
            faults = (one.counts.get(fault, 0) if role == one.roles[0] else '' for fault in FAULTS)
            rows.append((name, layout, found, good, one.found.expected, *faults, one.verdict()))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(COLUMNS))]
    lines = ['  '.join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for one in checked:
        title = one.found.title
        lines += [f'{title}: {fault}: {text}.' for fault in FAULTS for text in one.faults.get(fault, ())]
        lines += [f'{title}: note: {note}' for note in one.notes]
        if not one.is_fine() or one.verdict() == 'absent':
            optional = ' (optional)' if one.found.image_set.optional else ''
            source, licence = one.found.image_set.source, one.found.image_set.licence
            lines.append(f'{title}: {one.verdict()}{optional}. To be had at {source}; licence: {licence}.')
    return '\n'.join(lines)


def plan(checked: list[Checked], gopro_crops: bool = False) -> dict[str, list[tuple[str, Path, bool]]]:
    """What goes into which LMDB: ``(key, file, whether to cut it into crops)`` by store, in order of key.

    Where two sets of one store have pictures of one name, the keys of that store begin with the name of the set.
    """
    jobs: dict[str, dict[tuple[str, str], tuple[Path, bool]]] = {}
    for one in checked:
        crops = gopro_crops and one.found.store == GOPRO_TRAIN.store
        store = one.found.store.replace('gopro', 'gopro_crops') if crops else one.found.store
        gt_role = one.found.image_set.roles[0]
        for role, pairs in one.pairs.items():
            for lq, gt in pairs:
                keys = one.found.image_set.stored_keys(lq, gt)
                for side, name, key in ((role, lq, keys[0]), (gt_role, gt, keys[1])):
                    files = jobs.setdefault(store.replace('<role>', side), {})
                    file = one.found.files[side][name]
                    if files.setdefault((one.found.image_set.name, key), (file, crops))[0] != file:
                        raise UserError(f'{file} and {files[one.found.image_set.name, key][0]} share the key {key!r}.')
    return {store: _keyed(files) for store, files in jobs.items()}


def _keyed(files: dict[tuple[str, str], tuple[Path, bool]]) -> list[tuple[str, Path, bool]]:
    apart = len({key for _, key in files}) < len(files)
    return sorted((f'{name}/{key}' if apart else key, *job) for (name, key), job in files.items())


def _check_space(jobs: dict[str, list[tuple[str, Path, bool]]], output: Path) -> None:
    """Raise UserError if the disk cannot hold what is still to be written."""
    output.mkdir(parents=True, exist_ok=True)
    needed = 0
    for store, files in jobs.items():
        sizes = sum(path.stat().st_size * (CROPS_GROW if crops else 1) for _, path, crops in files)
        there = (output / f'{store}.lmdb{end}/data.mdb' for end in ('', '.tmp'))
        written = sum(path.stat().st_blocks * 512 for path in there if path.is_file())
        needed += max(sizes - written, 0)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f'{output} has {free / 1e9:,.3f} GB free, what is still to be written needs some {needed / 1e9:,.3f} GB.'
        )


def _write(destination: Path, files: list[tuple[str, Path, bool]], args: argparse.Namespace) -> None:
    read = progress(in_order(_read, files, args.workers), len(files), destination.name)
    images = (image for several in read for image in several)
    written = write_lmdb(images, destination, args.overwrite)
    kept = f', {written.kept:,} of them kept from an earlier run' if written.kept else ''
    print(f'{destination}: {written.images:,} images, complete and verified{kept}')


def _read(job: tuple[str, Path, bool]) -> list[tuple[str, bytes]]:
    key, path, crops = job
    data = path.read_bytes()
    return list(cut(key, data, str(path))) if crops else [(key, data)]


def cut(key: str, data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Crops of an image file as PNGs, keyed ``<key>_s001`` and so on, by rows; the last ones end at the border."""
    img = decode(data, where)
    corners = [(top, left) for top in _starts(img.shape[0]) for left in _starts(img.shape[1])]
    for number, (top, left) in enumerate(corners, 1):
        crop = img[top : top + CROP_SIZE, left : left + CROP_SIZE, ::-1]
        yield f'{key}_s{number:03d}', cv2.imencode('.png', crop)[1].tobytes()


def _starts(size: int) -> list[int]:
    if size <= CROP_SIZE:
        return [0]
    return [*range(0, size - CROP_SIZE, CROP_SIZE - CROP_OVERLAP), size - CROP_SIZE]
