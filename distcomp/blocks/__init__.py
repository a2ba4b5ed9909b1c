"""Which cheap building blocks stand in for a convolution?

>>> distcomp.blocks.swap(model, "conv2", distcomp.blocks.shift(expansion=3))     # doctest: +SKIP

Blocks have fewer parameters or multiplications; :mod:`distcomp.blocks.winograd` and
:mod:`distcomp.blocks.mec` compute the same convolution otherwise. Swap before the optimizer and
DistributedDataParallel are made.
"""

from distcomp.blocks.accnet import AccNet, CPLayer, bilateral, imitate
from distcomp.blocks.base import Block, Geometry
from distcomp.blocks.bottlenecks import (
    Bottleneck,
    ENetBottleneck,
    ENetInitial,
    bottleneck,
    enet,
    resnext,
)
from distcomp.blocks.branches import Fire, GlobalAveragePool, Inception, MlpConv, fire, inception, mlpconv
from distcomp.blocks.mec import MECConv2d, lowered_bytes, mec, mec_conv2d
from distcomp.blocks.separable import Grouped, Separable, grouped, separable
from distcomp.blocks.shift import ShiftBlock, shift, shifted_channels
from distcomp.blocks.swap import Swapped, swap
from distcomp.blocks.winograd import WinogradConv2d, winograd, winograd_conv2d

__all__ = [
    "AccNet",
    "Block",
    "Bottleneck",
    "CPLayer",
    "ENetBottleneck",
    "ENetInitial",
    "Fire",
    "Geometry",
    "GlobalAveragePool",
    "Grouped",
    "Inception",
    "MECConv2d",
    "MlpConv",
    "Separable",
    "ShiftBlock",
    "Swapped",
    "WinogradConv2d",
    "bilateral",
    "bottleneck",
    "enet",
    "fire",
    "grouped",
    "imitate",
    "inception",
    "lowered_bytes",
    "mec",
    "mec_conv2d",
    "mlpconv",
    "resnext",
    "separable",
    "shift",
    "shifted_channels",
    "swap",
    "winograd",
    "winograd_conv2d",
]
