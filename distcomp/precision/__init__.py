"""How many bits does a number have while we train?

>>> model = distcomp.precision.dorefa(model, weights=1, activations=2, gradients=6)     # doctest: +SKIP
>>> model = distcomp.precision.fixed_point(model, "Q4.12", rounding="stochastic")       # doctest: +SKIP

One call converts the Linear and Conv layers of an ordinary model in place; :func:`remove` gives a plain model
back. State dicts, DistributedDataParallel, ``torch.compile`` and ``distcomp.attach`` go on working.
"""

from distcomp.precision.binary import binary_connect, bnn, xnor_net
from distcomp.precision.checkpoint import packed_state_dict, unpacked_state_dict
from distcomp.precision.compact import bipolar_penalty, compact_binary, slow_groups
from distcomp.precision.convert import BitWidths, project, remove
from distcomp.precision.dorefa import dorefa
from distcomp.precision.entropy import weighted_entropy
from distcomp.precision.few import few_multiplications
from distcomp.precision.fixed import fixed_point
from distcomp.precision.iterative import Phase, bottom_to_top, gradual, set_activations, top_layers
from distcomp.precision.packed import BinaryConv2d, BinaryLinear, pack
from distcomp.precision.shift import ShiftAdaMax, ShiftBatchNorm, shift_norms
from distcomp.precision.summary import LayerSummary, Summary, summary
from distcomp.precision.ternary import ttq

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BitWidths",
    "LayerSummary",
    "Phase",
    "ShiftAdaMax",
    "ShiftBatchNorm",
    "Summary",
    "binary_connect",
    "bipolar_penalty",
    "bnn",
    "bottom_to_top",
    "compact_binary",
    "dorefa",
    "few_multiplications",
    "fixed_point",
    "gradual",
    "pack",
    "packed_state_dict",
    "project",
    "remove",
    "set_activations",
    "shift_norms",
    "slow_groups",
    "summary",
    "top_layers",
    "ttq",
    "unpacked_state_dict",
    "weighted_entropy",
    "xnor_net",
]
