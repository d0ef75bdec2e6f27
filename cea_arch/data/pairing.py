"""Which ground truth belongs to which degraded image."""

import bisect
import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cea_arch.errors import UserError

_NUMBER = re.compile(r'[0-9]+(?:\.[0-9]+)?')


@dataclass
class Matching:
    """What :func:`match_keys` found.

    Attributes:
        pairs: ``(lq, gt)`` for every degraded image that has a ground truth, in order of ``lq``.
        lonely: Degraded images without a ground truth, in order.
        unused: Ground truths without a degraded image, in order.
        conflict: Where another rule leaves as few images alone and pairs them otherwise, what both say of one image.
    """

    pairs: list[tuple[str, str]]
    lonely: list[str]
    unused: list[str]
    conflict: str = ''


def match_keys(lq_keys: Iterable[str], gt_keys: Iterable[str]) -> Matching:
    """Pair degraded images with ground truths by name; several degraded images may share one.

    One rule decides for the whole set, the first of those that leave the fewest images alone, so that a missing ground
    truth never hands its images to another one. The rules: the names are the same (``0001``); the ground truth's name
    comes before the first ``_`` (``cat_0.8`` and ``cat``); its numbers are the first numbers of the degraded image's
    name (``rain-001`` and ``norain-1``, ``0025_0.8_0.04`` and ``25``); or the last ones (``low_00002`` and ``2``). Zero
    padding and the text around the numbers do not count, but each side must put one text in front of them, or the
    ground truths none; and the last numbers count only where all in front of them are the same for all (``v2_00002``),
    for else the first ones tell the scenes. Folders in the keys must agree, unless no rule pairs anything that way.
    Accents count alike whether they are composed with their letter or stand behind it, as file systems of Macs have
    them.
    """
    lq_composed, gt_composed = _composed(lq_keys), _composed(gt_keys)
    found = _match(sorted(lq_composed), sorted(gt_composed))
    return Matching(
        sorted((lq_composed[lq], gt_composed[gt]) for lq, gt in found.pairs),
        sorted(lq_composed[lq] for lq in found.lonely),
        sorted(gt_composed[gt] for gt in found.unused),
        found.conflict,
    )


def _match(lq_keys: list[str], gt_keys: list[str]) -> Matching:
    best, alone = Matching([], lq_keys, gt_keys), len(lq_keys) + len(gt_keys)
    for scope in (str, _file_name):
        for rule in (_by_name, _by_first_part, _by_first_numbers, _by_last_numbers):
            pairs = rule(lq_keys, gt_keys, scope)
            paired, used = {lq for lq, _ in pairs}, {gt for _, gt in pairs}
            left = len(lq_keys) - len(paired) + len(gt_keys) - len(used)
            if pairs and left < alone:
                lonely = [key for key in lq_keys if key not in paired]
                best, alone = Matching(pairs, lonely, [key for key in gt_keys if key not in used]), left
            elif pairs and left == alone and rule is not _by_name:
                best.conflict = best.conflict or _difference(best.pairs, pairs)
        if best.pairs:
            break
    if all(scope(lq) == scope(gt) for lq, gt in best.pairs):
        best.conflict = ''  # the same names are beyond doubt
    return best


def _difference(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> str:
    others = dict(other)
    lq, gt = next(((lq, gt) for lq, gt in one if others.get(lq, gt) != gt), ('', ''))
    return f'{lq!r} may belong to {gt!r}, or to {others[lq]!r}' if lq else ''


def pair_keys(lq_keys: Iterable[str], gt_keys: Iterable[str], label: str) -> list[tuple[str, str]]:
    """The pairs of :func:`match_keys`, where all images of both sides must have a partner.

    Args:
        lq_keys, gt_keys: Keys of the two stores.
        label: The data set's option, for the message.

    Raises:
        UserError: An image of either side has no partner; names the first five and the nearest name of each. Or two
            rules pair otherwise.
    """
    lq_keys, gt_keys = list(lq_keys), list(gt_keys)
    found = match_keys(lq_keys, gt_keys)
    if found.conflict:
        raise UserError(f'{label}: {found.conflict}: name the images so that one rule tells which.')
    if found.lonely or found.unused:
        sides = ('degraded', found.lonely, gt_keys), ('ground truth', found.unused, lq_keys)
        lines = [f'{len(keys)} {side}: {describe(keys, others)}.' for side, keys, others in sides if keys]
        raise UserError(f'{label}: images without a partner. ' + ' '.join(lines))
    return found.pairs


def describe(keys: list[str], others: Iterable[str]) -> str:
    """The first five of ``keys``, each with the most similar of ``others``."""
    others = sorted(others)
    shown = []
    for key in keys[:5]:
        place = bisect.bisect(others, key)  # comparing with all of 70,000 names would take minutes
        near = difflib.get_close_matches(key, others[max(0, place - 500) : place + 500], n=1, cutoff=0)
        shown.append(f'{key!r}' + (f' (nearest: {near[0]!r})' if near else ''))
    return ', '.join(shown) + (f' and {len(keys) - 5} more' if len(keys) > 5 else '')


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key by which ``rain-2`` comes before ``rain-10``."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in re.split('([0-9]+)', name)]


def _composed(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its composed form; by itself where two would be one."""
    keys = list(keys)
    found = {unicodedata.normalize('NFC', key): key for key in keys}
    return found if len(found) == len(keys) else {key: key for key in keys}


def _file_name(key: str) -> str:
    return key.rpartition('/')[2]


def _by_name(lq_keys: list[str], gt_keys: list[str], scope: Callable[[str], str]) -> list[tuple[str, str]]:
    known = _unique((scope(gt), gt) for gt in gt_keys)
    return [(lq, known[scope(lq)]) for lq in lq_keys if scope(lq) in known]


def _by_first_part(lq_keys: list[str], gt_keys: list[str], scope: Callable[[str], str]) -> list[tuple[str, str]]:
    known = _unique((scope(gt), gt) for gt in gt_keys)
    parts = ((lq, scope(lq)[: len(scope(lq)) - len(_file_name(lq))] + _file_name(lq).split('_')[0]) for lq in lq_keys)
    return [(lq, known[part]) for lq, part in parts if part in known]


def _by_first_numbers(lq_keys: list[str], gt_keys: list[str], scope: Callable[[str], str]) -> list[tuple[str, str]]:
    return _by_numbers(lq_keys, gt_keys, scope, lambda found, count: found[:count])


def _by_last_numbers(lq_keys: list[str], gt_keys: list[str], scope: Callable[[str], str]) -> list[tuple[str, str]]:
    if len({_numbers(key)[:-1] for key in lq_keys}) > 1:
        return []
    return _by_numbers(lq_keys, gt_keys, scope, lambda found, count: found[-count:])


def _by_numbers(
    lq_keys: list[str], gt_keys: list[str], scope: Callable[[str], str], take: Callable[[tuple, int], tuple]
) -> list[tuple[str, str]]:
    lq_texts, gt_texts = ({key: _text_before(key) for key in keys} for keys in (lq_keys, gt_keys))
    lq_usual, gt_usual = (Counter([*texts.values(), '']).most_common(1)[0][0] for texts in (lq_texts, gt_texts))
    known = _unique((_identity(gt, scope), gt) for gt in gt_keys if gt_texts[gt] == gt_usual and _numbers(gt))
    pairs = []
    for lq in lq_keys:
        if gt_usual and lq_texts[lq] != lq_usual:
            continue
        folder, numbers = _identity(lq, scope)
        candidates = ((folder, take(numbers, count)) for count in range(len(numbers), 0, -1))
        gt = next((known[candidate] for candidate in candidates if candidate in known), None)
        if gt is not None:
            pairs.append((lq, gt))
    return pairs


def _identity(key: str, scope: Callable[[str], str]) -> tuple[str, tuple[str, ...]]:
    return scope(key).rpartition('/')[0], _numbers(key)


def _numbers(key: str) -> tuple[str, ...]:
    """The numbers of a file's name without zero padding: ``('25', '.8', '.04')`` of ``0025_0.8_0.04``."""
    return tuple(number.lstrip('0') or '0' for number in _NUMBER.findall(_file_name(key)))


def _text_before(key: str) -> str:
    return _NUMBER.split(_file_name(key), maxsplit=1)[0].casefold()


def _unique(items: Iterable[tuple]) -> dict:
    """A mapping of the items whose first half occurs once; the others would be ambiguous."""
    items = list(items)
    counts = Counter(identity for identity, _ in items)
    return {identity: key for identity, key in items if counts[identity] == 1}
