"""Networks in pure torch: nothing here imports basicsr."""

from cea_arch.networks.cea_ir import CEAIR

__all__ = ['CEAIR']
