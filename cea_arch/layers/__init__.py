"""The mathematics, in pure torch: nothing here imports basicsr."""

from cea_arch.layers.cea import (
    CEALayer,
    CrossAttentionHyperAdapter,
    PooledHyperAdapter,
    StaticBank,
    assemble,
)
from cea_arch.layers.transformer import CEABlock, TransformerBlock

__all__ = [
    'CEABlock',
    'CEALayer',
    'CrossAttentionHyperAdapter',
    'PooledHyperAdapter',
    'StaticBank',
    'TransformerBlock',
    'assemble',
]
