"""Check raw image sets before anything is written: pairs, sizes, damage, and test images among the training images."""

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from tqdm import tqdm

from cea_arch.data.benchmarks import KNOWN_LEAKS, LEAKS_BY_ID, ImageSet
from cea_arch.data.contents import Contents, look_at
from cea_arch.data.doubts import (
    cuts,
    doubts_of_colour,
    doubts_of_direction,
    doubts_of_pairs,
    doubts_of_pictures,
    doubts_of_scenes,
)
from cea_arch.data.image_store import decode
from cea_arch.data.pairing import describe, match_keys
from cea_arch.data.recognise import Found, Places, recognise
from cea_arch.errors import UserError

Item, Result = TypeVar('Item'), TypeVar('Result')


@dataclass
class Checked:
    """A set after the check.

    Attributes:
        found: The set, its layout and its files.
        pairs: ``(lq, gt)`` names of good pairs by degraded role; in a set without degraded images by the role ``gt``,
            twice the same name. Only these are written.
        matched: How many images or pairs were found, good or not.
        faults: What is wrong, in sentences, by column of the table: ``unmatched``, ``unequal``, ``unreadable``,
            ``twice``, ``duplicates``, ``doubtful``.
        counts: How many files or pairs each fault concerns.
        notes: What a user should know and need not mend.
        listed: Every file or pair that a fault of names, sizes or damage concerns, with the fault.
    """

    found: Found
    pairs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    matched: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notes: list[str] = field(default_factory=list)
    listed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def roles(self) -> tuple[str, ...]:
        """The degraded roles; the ground truth's where there are none."""
        return self.found.image_set.roles[1:] or self.found.image_set.roles

    def verdict(self) -> str:
        """``ok``, ``absent``, ``incomplete`` (fewer pairs than published, or faults) or ``more`` (than published)."""
        if not self.found.layout:
            return 'absent'
        counts = [len(self.pairs[role]) for role in self.roles]
        if self.faults or min(counts) < self.found.expected:
            return 'incomplete'
        return 'more' if max(counts) > self.found.expected else 'ok'

    def is_fine(self) -> bool:
        verdict = self.verdict()
        return verdict == 'ok' or (verdict == 'absent' and self.found.image_set.optional)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map`` on threads, in order, at most four items a thread ahead of what was taken."""
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def check_sets(
    image_sets: Iterable[ImageSet],
    places: Places,
    workers: int,
    trust: bool = False,
    named: Mapping[str, Found] = MappingProxyType({}),
) -> list[Checked]:
    """Recognise and check ``image_sets`` among the files of :func:`cea_arch.data.recognise.scan`.

    Every file is decoded once, on ``workers`` threads; nothing of it is kept but :class:`Contents`. With ``trust``,
    doubts about what pictures show are notes, and drop nothing. ``named`` are sets whose folders are known, by title.
    """
    found = [recognise(image_set, places) for image_set in image_sets]
    found = [named.get(one.title, one) for one in found]
    truths = {path for one in found for path in one.files.get(one.image_set.roles[0], {}).values()}
    paths = sorted({path for one in found for path in _paths(one)})
    inspected = in_order(lambda path: _inspect(path, path in truths), paths, workers)
    contents = dict(zip(paths, progress(inspected, len(paths), 'checking')))
    checked = [_check_set(one, contents) for one in found]
    _find_duplicates(checked, contents)
    for one in checked:
        _doubt(one, contents, trust)
        _note_release(one)
        _drop_incomplete_scenes(one)
    _note_shared_ids(checked)
    _note_cuts(checked, contents)
    return checked


def progress(items: Iterable[Item], total: int, name: str) -> Iterator[Item]:
    """The items, with a bar on a terminal, and else a line for every tenth of them."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=name, unit='file')
        return
    for number, item in enumerate(items, 1):
        yield item
        if total >= 1000 and number * 10 // total > (number - 1) * 10 // total:
            sys.stderr.write(f'{name}: {number:,} of {total:,} files\n')
            sys.stderr.flush()


def _paths(found: Found) -> Iterator[Path]:
    for names in found.files.values():
        yield from names.values()
    yield from (path for path, _ in found.copies)


def _inspect(path: Path, with_places: bool) -> Contents | None:
    """None where the file cannot be decoded."""
    try:
        return look_at(decode(path.read_bytes(), str(path)), with_places)
    except (UserError, OSError):
        return None


def _check_set(found: Found, contents: dict[Path, Contents | None]) -> Checked:
    checked = Checked(found)
    unreadable = sorted(str(path) for path in _paths(found) if contents[path] is None)
    _blame(checked, 'unreadable', len(unreadable), _list(unreadable), unreadable)
    pointers = [
        path for path in map(Path, unreadable) if path.stat().st_size < 1024 and b'git-lfs' in path.read_bytes()
    ]
    if pointers:
        checked.notes.append(f'{len(pointers):,} files are pointers of Git LFS: `git lfs pull` fetches the images.')
    digests = {path: contents[path] and contents[path].digest for pair in found.copies for path in pair}
    twice = [(a, b) for a, b in found.copies if digests[a] != digests[b]]
    _blame(checked, 'twice', len(twice), _list(f'{a} and {b} are different' for a, b in twice))
    if len(found.copies) > len(twice):
        checked.notes.append(f'{len(found.copies) - len(twice):,} copies of the same images are left aside.')
    if found.others:
        checked.notes.append(f'other images in the layout {", ".join(found.others)} are left aside.')
    bad = {path for pair in twice for path in pair} | {path for path in _paths(found) if contents[path] is None}
    for role in checked.roles if found.layout else ():
        _pair_role(checked, role, contents, bad)
    return checked


def _pair_role(checked: Checked, role: str, contents: dict[Path, Contents | None], bad: set[Path]) -> None:
    gt_role = checked.found.image_set.roles[0]
    gt_files, lq_files = (checked.found.files.get(name, {}) for name in (gt_role, role))
    checked.matched[role], checked.pairs[role] = 0, []
    if not lq_files or not gt_files:
        absent, other = (role, gt_files) if gt_files else (gt_role, lq_files)
        return _blame(checked, 'unmatched', len(other), f'no images of {absent} found')
    matching = match_keys(lq_files, gt_files)
    if matching.conflict:
        return _blame(checked, 'unmatched', len(matching.pairs), matching.conflict)
    # where one ground truth has many versions, more ground truths than versions do no harm
    unused = [] if checked.found.image_set.shares_gt and not matching.lonely else matching.unused
    sides = (role, matching.lonely, gt_files), (gt_role, unused, lq_files)
    for side, keys, others in sides:
        said = f'{side} without a partner: {describe(keys, others)}' if keys else ''
        files = lq_files if side == role else gt_files
        _blame(checked, 'unmatched', len(keys), said, (str(files[key]) for key in keys))
    if len(unused) < len(matching.unused):
        checked.notes.append(f'{len(matching.unused):,} ground truths without a degraded image are left aside.')
    good = [(lq, gt) for lq, gt in matching.pairs if lq_files[lq] not in bad and gt_files[gt] not in bad]
    unequal = [(lq, gt) for lq, gt in good if contents[lq_files[lq]].size != contents[gt_files[gt]].size]
    sizes = [
        f'{lq_files[lq]} {contents[lq_files[lq]].size} and {gt_files[gt]} {contents[gt_files[gt]].size}'
        for lq, gt in unequal
    ]
    _blame(checked, 'unequal', len(unequal), _list(sizes, ' (height, width)'), sizes)
    checked.matched[role] = len(matching.pairs)
    checked.pairs[role] = sorted(set(good) - set(unequal))


def _drop_incomplete_scenes(checked: Checked) -> None:
    """Where a ground truth has one version of each of several roles, keep those that are good in every role at hand."""
    roles = [role for role in checked.roles if checked.pairs.get(role)]
    if len(roles) < 2:
        return
    whole = set.intersection(*({gt for _, gt in checked.pairs[role]} for role in roles))
    dropped = {gt for role in roles for _, gt in checked.pairs[role]} - whole
    for role in roles:
        checked.pairs[role] = [pair for pair in checked.pairs[role] if pair[1] in whole]
    if dropped:
        checked.notes.append(
            f'scenes that are not good in every role are left out of all: {describe(sorted(dropped), ())}'
        )


def _find_duplicates(checked: list[Checked], contents: dict[Path, Contents | None]) -> None:
    """Blame training images that are test images too, and leave them out of the pairs."""
    tests: dict[bytes, tuple[Checked, Path]] = {}
    for one in checked:
        if one.found.image_set.split == 'test':
            tests.update({contents[path].digest: (one, path) for path in _paths(one.found) if contents[path]})
    for one in checked:
        if one.found.image_set.split != 'train':
            continue
        same = [
            (p, *tests[contents[p].digest]) for p in _paths(one.found) if contents[p] and contents[p].digest in tests
        ]
        known = [{one.found.image_set.name, test.found.image_set.name} in KNOWN_LEAKS for _, test, _ in same]
        leaks = Counter(test.found.title for (_, test, _), is_known in zip(same, known) if is_known)
        for title, count in leaks.items():
            one.notes.append(f'{count:,} images have the pixels of one of {title}; the literature keeps them.')
        wrong = [(path, test, other) for (path, test, other), is_known in zip(same, known) if not is_known]
        _blame(one, 'duplicates', len(wrong), _list(f'{p} is {other} of {t.found.title}' for p, t, other in wrong))
        _drop_files(one, {path for path, _, _ in wrong})


def _drop_files(checked: Checked, bad: set[Path]) -> None:
    gt_files = checked.found.files.get(checked.found.image_set.roles[0], {})
    for role, pairs in checked.pairs.items():
        lq_files = checked.found.files.get(role, {})
        checked.pairs[role] = [(lq, gt) for lq, gt in pairs if lq_files[lq] not in bad and gt_files[gt] not in bad]


def _doubt(checked: Checked, contents: dict[Path, Contents | None], trust: bool) -> None:
    """Look at what pictures show; a set that is not what its names say keeps no pairs, unless it is to be trusted."""
    image_set, files = checked.found.image_set, checked.found.files
    gt_role = image_set.roles[0]
    said: list[tuple[str, int]] = []
    bad: set[Path] = set()
    wrong: dict[str, set] = {}
    whole = False
    for role in {gt_role, *checked.pairs}:
        names = (pair[role == gt_role] for other in _pairs_of(checked, role) for pair in checked.pairs[other])
        used = sorted({files[role][name] for name in names})
        sentence, count, too_many = doubts_of_pictures(used, contents)
        said.append((sentence, count))
        bad |= too_many
        if role == gt_role:
            grey = doubts_of_colour(used, contents)
            said.append((grey, len(used)))
            whole |= bool(grey)
    for role, names in checked.pairs.items():
        if role == gt_role:
            continue
        pairs = [(files[role][lq], files[gt_role][gt]) for lq, gt in names]
        sentence, count, odd, all_of_them = doubts_of_pairs(pairs, contents)
        said.append((sentence, count))
        swapped = '' if all_of_them else doubts_of_direction(image_set.task or role, pairs, contents)
        scenes = doubts_of_scenes(image_set, checked.found.expected, pairs)
        said += [(swapped, len(pairs)), (scenes, len(pairs))]
        wrong[role] = odd
        whole |= all_of_them or bool(swapped) or bool(scenes)
    for sentence, count in said:
        if sentence and trust:
            checked.notes.append(f'trusted all the same: {sentence}.')
        elif sentence:
            _blame(checked, 'doubtful', count, sentence)
    if trust:
        return
    _drop_files(checked, bad)
    for role, names in checked.pairs.items():
        odd = wrong.get(role, set())
        good = [(lq, gt) for lq, gt in names if (files[role][lq], files[gt_role][gt]) not in odd]
        checked.pairs[role] = [] if whole else good


def _note_release(checked: Checked) -> None:
    releases = checked.found.image_set.releases
    for count in {len(pairs) for pairs in checked.pairs.values()} & releases.keys():
        checked.notes.append(f'{count:,} pairs: this is {releases[count]}.')


def _pairs_of(checked: Checked, role: str) -> list[str]:
    """The roles whose pairs have pictures of ``role``."""
    return list(checked.pairs) if role == checked.found.image_set.roles[0] else [role]


def _note_cuts(checked: list[Checked], contents: dict[Path, Contents | None]) -> None:
    """Name training sets with pictures of which test pictures are cuts."""
    by_split = {'train': [], 'test': []}
    for one in checked:
        truths = one.found.files.get(one.found.image_set.roles[0], {}).values()
        by_split[one.found.image_set.split].append((one, {path: contents[path] for path in truths if contents[path]}))
    for train, pictures in by_split['train']:
        for test, others in by_split['test']:
            if found := cuts(pictures, others):
                train.notes.append(
                    f'{len(found):,} images share a part, to the pixel, with images of {test.found.title}, which the '
                    f'literature keeps: {_list(f"{a} and {b}" for a, b in found)}.'
                )


def _note_shared_ids(checked: list[Checked]) -> None:
    """OTS and SOTS share scenes: count the ids that occur in both."""
    ids = {
        one.found.image_set.name: {gt.lstrip('0') for pairs in one.pairs.values() for _, gt in pairs}
        for one in checked
        if one.found.image_set.name in LEAKS_BY_ID
    }
    shared = set.intersection(*ids.values()) if len(ids) > 1 else set()
    if shared:
        note = f'{len(shared):,} scene ids occur in RESIDE-beta OTS too, which is known; the literature keeps both.'
        next(one for one in checked if one.found.image_set.name == LEAKS_BY_ID[1]).notes.append(note)


def _blame(checked: Checked, fault: str, count: int, sentence: str, items: Iterable[str] = ()) -> None:
    if count:
        checked.counts[fault] += count
        checked.faults[fault].append(sentence)
        checked.listed += [(fault, item) for item in items]


def _list(items: Iterable[str], unit: str = '') -> str:
    items = list(items)
    return '; '.join(items[:5]) + unit + (f' and {len(items) - 5:,} more' if len(items) > 5 else '')
