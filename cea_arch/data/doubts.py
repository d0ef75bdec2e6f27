"""Doubts about image sets that have the right names and numbers: is it what the names say?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cea_arch.data.benchmarks import ImageSet
from cea_arch.data.contents import UNLIKE, Contents, likeness

EXAMPLES = 3
MOST_ODD = 0.2  # share of pairs beyond which all of a set are in doubt
TRIED = 20  # doubtful pairs for which the right partner is looked for, among all of their set
ALIKE = 0.5  # likeness of pictures that surely show one scene
A_CUT = 4  # places that a picture and a cut of it share, at least
# by what a degradation does: which of two numbers is the smaller one in the degraded picture
DIRECTIONS: dict[str, Callable[[Contents, Contents], float]] = {
    'low': lambda lq, gt: gt.brightness - lq.brightness,
    'haze': lambda lq, gt: gt.contrast - lq.contrast,
    'blur': lambda lq, gt: gt.sharpness - lq.sharpness,
    'rain': lambda lq, gt: lq.sharpness - gt.sharpness,
}
Pairs = list[tuple[Path, Path]]


def doubts_of_pictures(paths: list[Path], contents: dict[Path, Contents]) -> tuple[str, int, set[Path]]:
    """Pictures of one role that are the same, in a sentence; how many, and which are too many."""
    first: dict[bytes, Path] = {}
    same = [
        (path, first[contents[path].digest]) for path in paths if first.setdefault(contents[path].digest, path) != path
    ]
    return _examples(f'{a} and {b} are the same picture' for a, b in same), len(same), {path for path, _ in same}


def doubts_of_colour(paths: list[Path], contents: dict[Path, Contents]) -> str:
    """A sentence, if most ground truths have no colour."""
    grey = [path for path in paths if contents[path].grey]
    if 2 * len(grey) <= len(paths):
        return ''
    return f'{len(grey)} of {len(paths)} pictures are grey, where colour is expected: ' + _examples(map(str, grey))


def doubts_of_scenes(image_set: ImageSet, expected: int, pairs: Pairs) -> str:
    """A sentence, if there are as many pairs as published, but of another number of scenes."""
    found = len({gt for _, gt in pairs})
    if not image_set.scenes or len(pairs) < expected or found == image_set.scenes:
        return ''
    return f'{len(pairs):,} pairs of {found:,} scenes, where {image_set.scenes:,} scenes are expected: another set'


def doubts_of_pairs(pairs: Pairs, contents: dict[Path, Contents]) -> tuple[str, int, set[tuple[Path, Path]], bool]:
    """Pairs of which one side does not show what the other does, in a sentence.

    Returns:
        The sentence; of how many pairs it speaks; those that are surely wrong, since the picture shows what another
        ground truth does; whether that is so of so many that all of the set are in doubt.
    """
    values = {pair: likeness(contents[pair[0]], contents[pair[1]]) for pair in pairs}
    odd = [pair for pair in pairs if values[pair] < UNLIKE]
    truths = sorted({gt for _, gt in pairs})
    tried = odd if len(odd) <= TRIED else [odd[int(i)] for i in np.linspace(0, len(odd) - 1, TRIED)]
    better = {pair: _better(*pair, truths, contents) for pair in tried}
    sure = {pair for pair, other in better.items() if other}
    told = [f'{lq} does not show what {gt} does, but {better[lq, gt]} does' for lq, gt in sorted(sure)]
    told += [f'{lq} does not show what {gt} does' for lq, gt in odd if (lq, gt) not in sure]
    all_of_them = len(odd) > max(MOST_ODD * len(pairs), 2) and 2 * len(sure) > len(tried)
    return _examples(told), len(odd), sure, all_of_them


def doubts_of_direction(task: str, pairs: Pairs, contents: dict[Path, Contents]) -> str:
    """A sentence, if the degraded side of most pairs looks like the clean one."""
    direction = DIRECTIONS.get(task)
    if direction is None or not pairs:
        return ''
    wrong = [(lq, gt) for lq, gt in pairs if direction(contents[lq], contents[gt]) < 0]
    if len(wrong) <= 0.8 * len(pairs):
        return ''
    words = {'low': 'brighter', 'haze': 'of more contrast', 'blur': 'sharper', 'rain': 'smoother'}
    told = _examples(f'{lq} than {gt}' for lq, gt in wrong)
    return f'degraded and clean seem swapped: the degraded ones are {words[task]} ({told})'


def cuts(train: dict[Path, Contents], test: dict[Path, Contents]) -> list[tuple[Path, Path]]:
    """Training pictures of which test pictures are cuts, or the other way round, to the pixel."""
    owners = defaultdict(list)
    for path, contents in test.items():
        for place in contents.places.tolist():
            owners[place].append(path)
    found = []
    for path, contents in train.items():
        hits = Counter(other for place in contents.places.tolist() for other in owners.get(place, ()))
        for other, count in hits.most_common(1):
            if count >= A_CUT and contents.digest != test[other].digest:
                found.append((path, other))
    return found


def _better(lq: Path, gt: Path, truths: list[Path], contents: dict[Path, Contents]) -> Path | None:
    """Another ground truth that surely shows what ``lq`` does."""
    alike = {other: likeness(contents[lq], contents[other]) for other in truths if other != gt}
    best = max(alike, key=alike.get, default=None)
    return best if best and alike[best] > ALIKE else None


def _examples(texts: Iterable[str]) -> str:
    texts = list(texts)
    return '; '.join(texts[:EXAMPLES]) + (f' and {len(texts) - EXAMPLES:,} more' if len(texts) > EXAMPLES else '')
