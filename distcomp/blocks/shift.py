"""Shift: channels move by a pixel, and 1 x 1 convolutions mix them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.blocks.base import Block, Geometry, Maker, normed, pointwise


def shifted_channels(x: Tensor, kernel: int = 3) -> Tensor:
    """``[n, c, h, w]``: of ``kernel^2`` groups of channels each moves by one offset; what comes in is zero.

    ``y[n, c, i, j] = x[n, c, i + di(c), j + dj(c)]``. Channels that the number of offsets does not divide
    stay with the middle one. No parameters, no multiplications.
    """
    reach, (height, width) = kernel // 2, x.shape[2:]
    size = max(1, x.shape[1] // kernel**2)
    padded = nn.functional.pad(x, (reach, reach, reach, reach))
    parts, start = [], 0
    for di in range(kernel):
        for dj in range(kernel):
            stop = min(start + size, x.shape[1])
            if (di, dj) != (reach, reach):
                parts.append(padded[:, start:stop, di : di + height, dj : dj + width])
                start = stop
    return torch.cat([*parts, x[:, start:]], 1)  # what is left, the middle group among it, does not move


class ShiftBlock(Block):
    """1 x 1 to ``expansion`` times the inputs, batch norm, ReLU, shift, 1 x 1: ``e C^2 + e C O`` numbers.

    A stride is that of the last convolution.

    Source: Wu et al., Shift: a zero FLOP, zero parameter alternative to spatial convolutions, CVPR 2018.
    """

    def __init__(self, geometry: Geometry, expansion: int) -> None:
        super().__init__()
        self.geometry = g = geometry
        between = expansion * g.inputs
        self.expand = nn.Sequential(*normed(pointwise(g.inputs, between, bias=False)))
        self.mix = pointwise(between, g.outputs, g.stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(shifted_channels(self.expand(x), self.geometry.kernel))
        return y

    def last(self) -> nn.Conv2d:
        return self.mix


def shift(expansion: int = 3) -> Maker:
    """:class:`ShiftBlock` in a convolution's place."""
    return lambda conv: ShiftBlock(Geometry.of(conv), expansion)
