"""The mathematics, in pure torch: nothing here imports basicsr."""

from cea_arch.layers.blocks import CEABlock, ConvBlock
from cea_arch.layers.cea import assemble, merge, rank_norm
from cea_arch.layers.cea_layer import CEALayer
from cea_arch.layers.hyper_adapter import HyperAdapter
from cea_arch.layers.inject import (
    Site,
    cea_parameters,
    cea_state_dict,
    find_sites,
    inject_cea,
    remove_cea,
)

__all__ = [
    'CEABlock',
    'CEALayer',
    'ConvBlock',
    'HyperAdapter',
    'Site',
    'assemble',
    'cea_parameters',
    'cea_state_dict',
    'find_sites',
    'inject_cea',
    'merge',
    'rank_norm',
    'remove_cea',
]
