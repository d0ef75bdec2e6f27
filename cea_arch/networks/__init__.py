"""Networks in pure torch; WithCEA takes its base from BasicSR's registry."""

from cea_arch.networks.cea_ir import CEAIR
from cea_arch.networks.with_cea import WithCEA

__all__ = ['CEAIR', 'WithCEA']
