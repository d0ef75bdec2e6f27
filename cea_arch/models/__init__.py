"""Models in BasicSR's MODEL_REGISTRY: importing a ``*_model.py`` registers what it holds."""

import basicsr  # noqa: F401  first: once it is imported, it has all of ours registered

from cea_arch.models import cea_model

__all__ = ['cea_model']
