"""Networks, blocks and the layer by name, for ``build_network`` and YAML files."""

from cea_arch.compat import ARCH_REGISTRY
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.networks import CEAIR

for known in (CEAIR, CEABlock, CEALayer):
    ARCH_REGISTRY.register(known)
