"""How do the ranks agree on a gradient, round by round?"""

from distcomp.methods.active_only import ActiveOnly
from distcomp.methods.allocate import Allocate, allocate
from distcomp.methods.base import AggregateResult, Method, PerParameter, StepContext
from distcomp.methods.basic import bf16, except_small, fp16, identity, none, qsgd, with_feedback
from distcomp.methods.compact import compact_residuals
from distcomp.methods.correction import MomentumCorrection, momentum_correction
from distcomp.methods.deep_gradient import Clipped, dgc
from distcomp.methods.demo import DecoupledMomentum, demo
from distcomp.methods.dion import Dion, dion
from distcomp.methods.ef21 import EF21, ef21
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.fixed_point import FixedPointAllReduce, fixed_point
from distcomp.methods.formats import fp8, mxfp4, mxfp8, nvfp4
from distcomp.methods.from_compressor import AllGatherMean, AllReduceMean, ReduceScatterMean, from_compressor
from distcomp.methods.gradiveq import GradiVeQ, gradiveq
from distcomp.methods.integers import HomomorphicQuantizer, RandomHadamard, TernGrad, shared_range, terngrad
from distcomp.methods.lossless import Lossless, lossless
from distcomp.methods.majority_vote import MajorityVote, majority_vote
from distcomp.methods.onebit_adam import OneBitAdam, onebit_adam
from distcomp.methods.partition import Partition, Rule
from distcomp.methods.powersgd import PowerSGD, powersgd
from distcomp.methods.quantizers import ef_signsgd, natural, nuqsgd, onebit
from distcomp.methods.registry import compressor_of, method_of, parse, register
from distcomp.methods.scheduled import Scheduled, Warmup
from distcomp.methods.slices import Cycle, Slicing, Subspace
from distcomp.methods.sparsifiers import (
    CyclicTopK,
    SharedRandomK,
    cyclic_topk,
    random_k,
    topk,
)
from distcomp.methods.two_level import TwoLevel, nodes_of, two_level
from distcomp.methods.warmup import warmup
from distcomp.registry import METHODS, Entry

__all__ = [
    "EF21",
    "METHODS",
    "ActiveOnly",
    "AggregateResult",
    "AllGatherMean",
    "AllReduceMean",
    "Allocate",
    "Clipped",
    "Cycle",
    "CyclicTopK",
    "DecoupledMomentum",
    "Dion",
    "Entry",
    "ErrorFeedback",
    "FixedPointAllReduce",
    "GradiVeQ",
    "HomomorphicQuantizer",
    "Lossless",
    "MajorityVote",
    "Method",
    "MomentumCorrection",
    "OneBitAdam",
    "Partition",
    "PerParameter",
    "PowerSGD",
    "RandomHadamard",
    "ReduceScatterMean",
    "Rule",
    "Scheduled",
    "SharedRandomK",
    "Slicing",
    "StepContext",
    "Subspace",
    "TernGrad",
    "TwoLevel",
    "Warmup",
    "allocate",
    "bf16",
    "compact_residuals",
    "compressor_of",
    "cyclic_topk",
    "demo",
    "dgc",
    "dion",
    "ef21",
    "ef_signsgd",
    "except_small",
    "fixed_point",
    "fp8",
    "fp16",
    "from_compressor",
    "gradiveq",
    "identity",
    "lossless",
    "majority_vote",
    "method_of",
    "momentum_correction",
    "mxfp4",
    "mxfp8",
    "natural",
    "nodes_of",
    "none",
    "nuqsgd",
    "nvfp4",
    "onebit",
    "onebit_adam",
    "parse",
    "powersgd",
    "qsgd",
    "random_k",
    "register",
    "shared_range",
    "terngrad",
    "topk",
    "two_level",
    "warmup",
    "with_feedback",
]
