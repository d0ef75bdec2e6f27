"""Which ground truth belongs to which degraded image."""

import difflib
from collections.abc import Iterable

from cea_arch.errors import UserError


def _candidates(key: str) -> tuple[str, ...]:
    """Names a ground truth may have: the same, ``norain-1`` for ``rain-1``, the id before ``_`` (``0001_0.8_0.2``)."""
    folder, slash, name = key.rpartition('/')
    return tuple(folder + slash + stem for stem in (name, f'no{name}', name.split('_')[0]))


def pair_keys(lq_keys: Iterable[str], gt_keys: Iterable[str], label: str) -> list[tuple[str, str]]:
    """Pair degraded images with ground truths by name; several degraded images may share one.

    Args:
        lq_keys, gt_keys: Keys of the two stores.
        label: The data set's option, for the message.

    Returns:
        ``(lq, gt)`` for every degraded image, in order of ``lq``.

    Raises:
        UserError: An image of either side has no partner; names the first five and the nearest name of each.
    """
    lq_keys, gt_keys = sorted(lq_keys), set(gt_keys)
    pairs, lonely = [], []
    for lq in lq_keys:
        gt = next((name for name in _candidates(lq) if name in gt_keys), None)
        if gt is None:
            lonely.append(lq)
        else:
            pairs.append((lq, gt))
    unused = sorted(gt_keys - {gt for _, gt in pairs})
    if lonely or unused:
        lines = [_describe('degraded', lonely, unused or gt_keys), _describe('ground truth', unused, lonely or lq_keys)]
        raise UserError(f'{label}: images without a partner. ' + ' '.join(line for line in lines if line))
    return pairs


def _describe(side: str, keys: list[str], others: Iterable[str]) -> str:
    if not keys:
        return ''
    shown = []
    for key in keys[:5]:
        near = difflib.get_close_matches(key, list(others), n=1, cutoff=0)
        shown.append(f'{key!r}' + (f' (nearest: {near[0]!r})' if near else ''))
    more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
    return f'{len(keys)} {side}: {", ".join(shown)}{more}.'
