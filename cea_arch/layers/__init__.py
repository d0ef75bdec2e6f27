"""The mathematics, in pure torch: nothing here imports basicsr."""

from cea_arch.layers.cea import (
    CEALayer,
    CrossAttentionHyperAdapter,
    PooledHyperAdapter,
    StaticBank,
    assemble,
)
from cea_arch.layers.inject import (
    ModuleOutput,
    cea_parameters,
    cea_state_dict,
    inject_cea,
    remove_cea,
    survey_modules,
)
from cea_arch.layers.transformer import CEABlock, TransformerBlock

__all__ = [
    'CEABlock',
    'CEALayer',
    'CrossAttentionHyperAdapter',
    'ModuleOutput',
    'PooledHyperAdapter',
    'StaticBank',
    'TransformerBlock',
    'assemble',
    'cea_parameters',
    'cea_state_dict',
    'inject_cea',
    'remove_cea',
    'survey_modules',
]
