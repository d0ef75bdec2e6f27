"""Our entries in BasicSR's registries: importing it makes them."""

from cea_arch.archs import cea_arch

__all__ = ['cea_arch']
