"""What a study compares: networks that differ from the option file's in one thing each."""

import re
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from cea_arch.errors import UserError, suggest
from cea_arch.networks.cea_ir import FFN_EXPANSION_FACTOR
from cea_arch.networks.from_file import build_network

OF_LAYERS = {
    'static': {'factors': 'static'},
    'pooled': {'factors': 'pooled'},
    'topk': {'routing': 'topk'},
    'static_topk': {'factors': 'static', 'routing': 'topk'},
    'no_rank_norm': {'rank_norm': False},
    'r2': {'rank': 2},
    'r4': {'rank': 4},
    'r16': {'rank': 16},
    'cea': {},
}
OF_CEAIR = OF_LAYERS | {  # the paper's ablations by name, and ours of T
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
    'scale': {'pooled_scale': True},
    'none_scale': {'modulate': [], 'pooled_scale': True},
}
DEFAULT = ('none', 'static', 'pooled', 'topk', 'cea')
REFERENCE = 'cea'  # the network as the file says
MOST_DIFFERENCE = 0.02  # of the number of parameters, between variants of CEAIR
SAME = 0.002  # and what is not worth a change
WIDEST = 4096
_NAME = re.compile(r'([^*]+)(?:\*(\d+(?:\.\d+)?))?')  # none*1.2: none, for 1.2 times as many steps


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared.

    Attributes:
        name: Of the variant.
        network: Its options, as in ``network_g``.
        parameters: Their number.
        longer: It trains for so many times the option file's steps.
    """

    name: str
    network: dict[str, Any]
    parameters: int
    longer: float = 1.0


def find_variants(opt: dict[str, Any], names: list[str], match: bool) -> list[Variant]:
    """The variants of a study by their names, each built once.

    Args:
        opt: Options, whose ``network_g`` is CEAIR, WithCEA or any other; of the latter there are those alone that
            ``study.variants`` has, and ``cea``, the file's own.
        names: Words of the tables above, or of ``study.variants``; ``none*1.2`` trains for 1.2 times the steps.
        match: Make them as large as the file's network: CEAIR by its feed-forwards, WithCEA, and what the file has
            itself, by ``study.width``; as near as that comes where heads must divide it.

    Raises:
        UserError: No such variant, one that cannot be built, or no width that fits.
    """
    network, section = opt['network_g'], opt.get('study') or {}
    own = section.get('variants') or {}
    known = _of_kind(network) | own
    variants = []
    for word in names:
        found = _NAME.fullmatch(word)
        name, longer = (found[1], float(found[2] or 1)) if found else (word, 1)
        if name not in known:
            raise UserError(f'variant {name!r} is not known.{suggest(name, known)} Known: {", ".join(known)}.')
        if not longer:
            raise UserError(f'variant {word}: it must train for some steps.')
        options = known[name]
        if match and (name not in own or section.get('width') in options.get('base', options)):
            options = matched(options, opt, name)
        variants.append(Variant(word.replace('*', '_x'), options, parameters(options), longer))
    return variants


def matched(network: dict[str, Any], opt: dict[str, Any], name: str) -> dict[str, Any]:
    """A variant's options with about as many parameters as ``opt['network_g']`` has.

    Raises:
        UserError: There is no width to change, or CEAIR's numbers cannot be brought within two per cent of each other.
    """
    wanted = parameters(opt['network_g'])
    lacking = wanted - parameters(network)
    if abs(lacking) <= SAME * wanted:
        return network
    if network['type'] == 'CEAIR':
        start = network.get('ffn_expansion_factor', FFN_EXPANSION_FACTOR)
        for_one = parameters(network | {'ffn_expansion_factor': start + 1}) - parameters(network)
        network = network | {'ffn_expansion_factor': round(start + lacking / for_one, 3)}
        if abs(parameters(network) - wanted) > MOST_DIFFERENCE * wanted:
            raise UserError(f'variant {name}: no width gives about the {wanted:,} parameters that the option file has.')
        return network
    width = (opt.get('study') or {}).get('width')
    start = network.get('base', network).get(width)
    if not isinstance(start, int):
        raise UserError(
            f'variant {name}: --match needs study.width, the name of an option of the base that sets its channels and '
            f'stands in the file; got {width!r}.',
            'study.width',
        )
    widths = range(start, WIDEST) if lacking > 0 else range(start, 0, -1)
    near = [(abs(lacking), network)]
    for channels in widths:
        options = _widened(network, width, channels)
        try:
            count = parameters(options)
        except UserError:  # as where heads do not divide it
            continue
        near.append((abs(count - wanted), options))
        if (count >= wanted) == (lacking > 0):
            break
    return min(near, key=itemgetter(0))[1]


def parameters(network: dict[str, Any]) -> int:
    """How many a network has, counted without making them where its constructor lets itself be called so."""
    try:
        with torch.device('meta'):
            net = build_network(network)
    except RuntimeError:
        net = build_network(network)
    return sum(p.numel() for p in net.parameters())


def _of_kind(network: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if network['type'] == 'CEAIR':
        return {name: network | changes for name, changes in OF_CEAIR.items()}
    if network['type'] == 'WithCEA':
        return {'none': network['base']} | {name: network | changes for name, changes in OF_LAYERS.items()}
    return {REFERENCE: network}


def _widened(network: dict[str, Any], width: str, channels: int) -> dict[str, Any]:
    if 'base' in network:
        return network | {'base': network['base'] | {width: channels}}
    return network | {width: channels}
