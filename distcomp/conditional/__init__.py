"""Which parts of the network run?"""

from distcomp.conditional.awake import AwakeLayers
from distcomp.conditional.depth import alternate_layers, freeze_layers, sample_layers, stochastic_depth
from distcomp.conditional.switch import LayerSwitch
from distcomp.conditional.units import UnitDropout

__all__ = [
    "AwakeLayers",
    "LayerSwitch",
    "UnitDropout",
    "alternate_layers",
    "freeze_layers",
    "sample_layers",
    "stochastic_depth",
]
