"""The layer and the block by name, for ``build_network`` and YAML files."""

from cea_arch.compat import ARCH_REGISTRY
from cea_arch.layers import CEABlock, CEALayer

ARCH_REGISTRY.register(CEALayer)
ARCH_REGISTRY.register(CEABlock)
