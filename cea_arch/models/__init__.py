"""Models in BasicSR's MODEL_REGISTRY: importing a ``*_model.py`` registers what it holds."""

from cea_arch.models import cea_model

__all__ = ['cea_model']
