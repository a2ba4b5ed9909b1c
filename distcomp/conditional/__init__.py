"""Which parts of the network run?"""

from distcomp.conditional.awake import AwakeLayers
from distcomp.conditional.clipping import clip_experts_grad_norm_
from distcomp.conditional.controller import QController
from distcomp.conditional.depth import alternate_layers, freeze_layers, sample_layers, stochastic_depth
from distcomp.conditional.early_exits import Exits, average_products, exits
from distcomp.conditional.experts import (
    MixtureOfExperts,
    balance_loss,
    expert_optimizer_state,
    keep_experts_local,
    load_expert_optimizer_state,
)
from distcomp.conditional.gating import NoisyTopKGate
from distcomp.conditional.halting import SpatialHalting
from distcomp.conditional.policy import BlockPolicy, PolicyLosses
from distcomp.conditional.split_groups import merge_groups, spread_groups
from distcomp.conditional.stages import GatedStage, rate_loss, taken_shares
from distcomp.conditional.switch import LayerSwitch
from distcomp.conditional.units import UnitDropout

__all__ = [
    "AwakeLayers",
    "BlockPolicy",
    "Exits",
    "GatedStage",
    "LayerSwitch",
    "MixtureOfExperts",
    "NoisyTopKGate",
    "PolicyLosses",
    "QController",
    "SpatialHalting",
    "UnitDropout",
    "alternate_layers",
    "average_products",
    "balance_loss",
    "clip_experts_grad_norm_",
    "exits",
    "expert_optimizer_state",
    "freeze_layers",
    "keep_experts_local",
    "load_expert_optimizer_state",
    "merge_groups",
    "rate_loss",
    "sample_layers",
    "spread_groups",
    "stochastic_depth",
    "taken_shares",
]
