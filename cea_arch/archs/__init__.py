"""Networks and layers in BasicSR's ARCH_REGISTRY: importing a ``*_arch.py`` registers what it holds."""

from cea_arch.archs import cea_arch

__all__ = ['cea_arch']
