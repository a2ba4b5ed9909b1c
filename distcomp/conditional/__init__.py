"""Which parts of the network run?"""

from distcomp.conditional.awake import AwakeLayers
from distcomp.conditional.depth import alternate_layers, freeze_layers, sample_layers, stochastic_depth
from distcomp.conditional.experts import (
    MixtureOfExperts,
    balance_loss,
    expert_optimizer_state,
    keep_experts_local,
    load_expert_optimizer_state,
)
from distcomp.conditional.gating import NoisyTopKGate
from distcomp.conditional.switch import LayerSwitch
from distcomp.conditional.units import UnitDropout

__all__ = [
    "AwakeLayers",
    "LayerSwitch",
    "MixtureOfExperts",
    "NoisyTopKGate",
    "UnitDropout",
    "alternate_layers",
    "balance_loss",
    "expert_optimizer_state",
    "freeze_layers",
    "keep_experts_local",
    "load_expert_optimizer_state",
    "sample_layers",
    "stochastic_depth",
]
