"""All that ARCH_REGISTRY gets from us, by name, for ``build_network`` and YAML files."""

from cea_arch.compat import arch_registry
from cea_arch.layers import CEABlock, CEALayer
from cea_arch.networks import CEAIR, WithCEA

registry = arch_registry()
for known in (CEAIR, WithCEA, CEABlock, CEALayer):
    registry.register(known)
