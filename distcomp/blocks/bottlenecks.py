"""Bottlenecks: ResNet's, ResNeXt's in groups, and ENet's asymmetric and dilated ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.blocks.base import Block, Geometry, Maker, divisor, normed, pointwise
from distcomp.errors import DistcompError

KINDS = ("regular", "dilated", "asymmetric")


class Bottleneck(Block):
    """1 x 1 to fewer channels, k x k in groups, 1 x 1 back, around a shortcut: ``y = x + f(x)``.

    ``reduction`` 4 and one group: ResNet's. ``reduction`` 2 and more groups: ResNeXt's ("cardinality"). The
    shortcut is a 1 x 1 convolution where channels or the stride change it.

    Source: He et al., CVPR 2016; Xie et al., Aggregated residual transformations, CVPR 2017.
    """

    def __init__(self, geometry: Geometry, reduction: int, groups: int = 1) -> None:
        super().__init__()
        self.geometry = g = geometry
        width = max(1, g.outputs // reduction)
        between = nn.Conv2d(
            width, width, g.kernel, g.stride, g.kernel // 2, groups=divisor(groups, width), bias=False
        )
        self.layers = nn.Sequential(*normed(pointwise(g.inputs, width, bias=False), between))
        self.widen = pointwise(width, g.outputs)
        self.shortcut = shortcut(g)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + self.widen(self.layers(x))
        return y

    def last(self) -> nn.Conv2d:
        return self.widen


def shortcut(geometry: Geometry) -> nn.Module:
    """What is added: the input itself where it fits."""
    if geometry.inputs == geometry.outputs and geometry.stride == 1:
        return nn.Identity()
    return pointwise(geometry.inputs, geometry.outputs, geometry.stride, bias=False)


class ENetBottleneck(Block):
    """ENet's bottleneck: 1 x 1 down by 4, a regular, dilated or asymmetric convolution, 1 x 1 up, a shortcut.

    Asymmetric: 5 x 1, then 1 x 5: 10 taps for 25. Dilated: 3 x 3 of a dilation, which sees ``2 d + 1``
    pixels. With stride 2 the shortcut is max pooling, padded with zero channels. PReLU, as in the paper;
    spatial dropout is left to the network.

    Source: Paszke et al., ENet, 2016.
    """

    def __init__(self, geometry: Geometry, kind: str = "regular", dilation: int = 2) -> None:
        super().__init__()
        if kind not in KINDS:
            raise DistcompError(f"ENet's bottlenecks are {', '.join(KINDS)}, not {kind!r}")
        self.geometry = g = geometry
        width = max(1, g.outputs // 4)
        reduce = nn.Conv2d(g.inputs, width, g.stride, g.stride, bias=False)  # 2 x 2 where it halves the size
        self.layers = nn.Sequential(
            *_prelu(reduce), *(part for c in _between(width, kind, dilation) for part in _prelu(c))
        )
        self.widen = pointwise(width, g.outputs)
        self.activation = nn.PReLU(g.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self._shortcut(x) + self.widen(self.layers(x)))
        return y

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.geometry.stride > 1:
            x = nn.functional.max_pool2d(x, self.geometry.stride)
        more = self.geometry.outputs - x.shape[1]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, more)) if more > 0 else x[:, : self.geometry.outputs]

    def last(self) -> nn.Conv2d:
        return self.widen


def _between(width: int, kind: str, dilation: int) -> list[nn.Conv2d]:
    if kind == "asymmetric":
        return [
            nn.Conv2d(width, width, (5, 1), padding=(2, 0), bias=False),
            nn.Conv2d(width, width, (1, 5), padding=(0, 2), bias=False),
        ]
    spread = dilation if kind == "dilated" else 1
    return [nn.Conv2d(width, width, 3, padding=spread, dilation=spread, bias=False)]


def _prelu(layer: nn.Conv2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.PReLU(layer.out_channels)]


class ENetInitial(nn.Module):
    """ENet's first block: a 3 x 3 convolution of stride 2 beside 2 x 2 max pooling of the input, side by
    side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(x, 2, ceil_mode=True)
        y: Tensor = self.activation(self.norm(torch.cat([self.convolution(x), pooled], 1)))
        return y


def bottleneck(reduction: int = 4) -> Maker:
    """:class:`Bottleneck` of one group in a convolution's place."""
    return lambda conv: Bottleneck(Geometry.of(conv), reduction)


def resnext(groups: int = 8, reduction: int = 2) -> Maker:
    """:class:`Bottleneck` in groups."""
    return lambda conv: Bottleneck(Geometry.of(conv), reduction, groups)


def enet(kind: str = "asymmetric", dilation: int = 2) -> Maker:
    """:class:`ENetBottleneck` of a kind."""
    return lambda conv: ENetBottleneck(Geometry.of(conv), kind, dilation)
