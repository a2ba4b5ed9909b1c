"""Depthwise separable convolutions (MobileNets), and groups followed by a mix of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.blocks.base import Block, Geometry, Maker, divisor, identity_kernel, normed, pointwise


class _SpaceThenChannels(Block):
    """A k x k convolution in groups, which mixes space, batch norm, ReLU, and 1 x 1, which mixes channels."""

    def __init__(self, geometry: Geometry, groups: int) -> None:
        super().__init__()
        self.geometry = g = geometry
        self.groups = groups
        spatial = nn.Conv2d(g.inputs, g.inputs, g.kernel, g.stride, g.kernel // 2, groups=groups, bias=False)
        self.layers = nn.Sequential(*normed(spatial), pointwise(g.inputs, g.outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y

    def last(self) -> nn.Conv2d:
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d)
        return last


class Separable(_SpaceThenChannels):
    """A k x k convolution of each channel, batch norm, ReLU, 1 x 1: ``k^2 C + C O`` numbers for ``k^2 C O``.

    From a convolution it takes the nearest: of each input channel, the rank-1 term of ``W[:, c]`` (Eckart and
    Young).

    Source: Howard et al., MobileNets, 2017. Width and resolution multipliers are arguments of the network
    (``examples/architectures.py``): parameters go with the square of the width, multiplications with both
    squares.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry, geometry.inputs)

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        u, s, v = torch.linalg.svd(
            conv.weight.float().transpose(0, 1).flatten(2), full_matrices=False
        )  # [C, O, k^2]
        root = s[:, :1].sqrt()
        self.layers[0].weight.copy_((root * v[:, 0]).view_as(self.layers[0].weight))  # type: ignore[operator]
        self.last().weight.copy_((root * u[:, :, 0]).T.view_as(self.last().weight))
        return ["weight (its nearest separable one)", *super().copy_from(conv)]


class Grouped(_SpaceThenChannels):
    """A k x k convolution in groups, batch norm, ReLU, 1 x 1: ``k^2 C^2 / g + C O`` numbers.

    From a convolution it takes the weights within the groups, where outputs are as many as inputs.
    """

    def __init__(self, geometry: Geometry, groups: int) -> None:
        super().__init__(geometry, divisor(groups, geometry.inputs))

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        if self.geometry.inputs != self.geometry.outputs:
            return super().copy_from(conv)
        size = self.geometry.inputs // self.groups
        within = [
            conv.weight[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(self.groups)
        ]
        self.layers[0].weight.copy_(torch.cat(within))  # type: ignore[operator]
        self.last().weight.copy_(identity_kernel(self.last().weight))
        return ["weight (within the groups)", *super().copy_from(conv)]


def separable() -> Maker:
    """:class:`Separable` in a convolution's place."""
    return lambda conv: Separable(Geometry.of(conv))


def grouped(groups: int = 8) -> Maker:
    """:class:`Grouped`; ``groups`` where that divides the inputs, or the next number below that does."""
    return lambda conv: Grouped(Geometry.of(conv), groups)
