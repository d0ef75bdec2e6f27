"""CEA (Continuous Expert Assembly, arXiv 2605.06127) as a plugin for BasicSR. Importing it registers everything."""

from cea_arch import archs as archs
from cea_arch.compat import HAS_BASICSR

if HAS_BASICSR:
    from cea_arch import data as data
    from cea_arch import losses as losses
    from cea_arch import metrics as metrics
    from cea_arch import models as models
    from cea_arch.training.options import extend_parser

    extend_parser()
from cea_arch.restoring.restorer import Restorer as Restorer
from cea_arch.restoring.restorer import restore as restore

__version__ = '0.1.0'
