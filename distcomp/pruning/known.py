"""The operations that :mod:`distcomp.pruning.shrinking` walks through, as modules, functions and methods."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGES = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
PASSING: tuple[Any, ...] = (
    *MAX_POOLS, *AVERAGES, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    functional.max_pool1d, functional.max_pool2d, functional.max_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, functional.dropout, "contiguous",
)  # fmt: skip
"""What mixes no channels and leaves a constant what it is (away from padding)."""
ELEMENTWISE: tuple[Any, ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish,
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu,
    functional.silu, functional.softplus, functional.hardswish,
    torch.relu, torch.tanh, torch.sigmoid, "relu", "relu_", "tanh", "sigmoid",
)  # fmt: skip
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
