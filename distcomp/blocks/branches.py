"""Blocks of several paths side by side: Fire and Inception; and mlpconv."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcomp.blocks.base import Block, Geometry, Maker, identity_kernel, normed, pointwise


class Fire(Block):
    """1 x 1 to few channels and ReLU (squeeze); then 1 x 1 and k x k side by side (expand).

    ``s C + (1 + k^2) s O / 2`` numbers for a squeeze to s. The stride is that of the expansion. Its bias is
    two: that of a convolution is cut in the same place.

    Source: Iandola et al., SqueezeNet, 2016.
    """

    def __init__(self, geometry: Geometry, squeeze: float) -> None:
        super().__init__()
        self.geometry = g = geometry
        width, half = max(1, round(squeeze * g.outputs)), g.outputs // 2
        self.squeeze = pointwise(g.inputs, width)
        self.small = pointwise(width, g.outputs - half, g.stride)
        self.large = nn.Conv2d(width, half, g.kernel, g.stride, g.kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.squeeze(x))
        return torch.cat([self.small(squeezed), self.large(squeezed)], 1)

    def last(self) -> nn.Conv2d:
        return self.large

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        if conv.bias is None:
            return []
        cut = self.small.out_channels
        self.small.bias.copy_(conv.bias[:cut])  # type: ignore[union-attr]
        self.large.bias.copy_(conv.bias[cut:])  # type: ignore[union-attr]
        return ["bias"]


class Inception(nn.Module):
    """Four paths side by side: 1 x 1; 1 x 1 and 3 x 3; 1 x 1 and 5 x 5; 3 x 3 max pooling and 1 x 1.

    A quarter of the outputs, a half, an eighth and an eighth, as in GoogLeNet; paths reduce to half of what
    they give first. Batch norm and ReLU between (the paper has ReLU alone), none behind.

    Source: Szegedy et al., Going deeper with convolutions, CVPR 2015.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = g = geometry
        eighth = max(1, g.outputs // 8)
        quarter, half = max(1, g.outputs // 4), g.outputs - max(1, g.outputs // 4) - 2 * eighth
        self.one = pointwise(g.inputs, quarter, g.stride)
        self.three = _reduced(g, half, 3)
        self.five = _reduced(g, eighth, 5)
        self.pool = nn.Sequential(nn.MaxPool2d(3, g.stride, 1), pointwise(g.inputs, eighth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        """The bias, path by path."""
        if conv.bias is None:
            return []
        start = 0
        for layer in (self.one, self.three[-1], self.five[-1], self.pool[-1]):
            count: int = layer.out_channels  # type: ignore[assignment]
            layer.bias.copy_(conv.bias[start : start + count])  # type: ignore[operator]
            start += count
        return ["bias"]


def _reduced(g: Geometry, outputs: int, kernel: int) -> nn.Sequential:
    width = max(1, outputs // 2)
    return nn.Sequential(
        *normed(pointwise(g.inputs, width, bias=False)),
        nn.Conv2d(width, outputs, kernel, g.stride, kernel // 2),
    )


class MlpConv(Block):
    """k x k, ReLU, 1 x 1, ReLU, 1 x 1: a perceptron slides over the image. It takes over the whole
    convolution, and what follows begins as the identity.

    With :class:`GlobalAveragePool` behind the last one, a network has no dense layer.

    Source: Lin et al., Network in network, ICLR 2014.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = g = geometry
        self.convolution = nn.Conv2d(g.inputs, g.outputs, g.kernel, g.stride, g.kernel // 2)
        self.first, self.second = pointwise(g.outputs, g.outputs), pointwise(g.outputs, g.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(torch.relu(self.convolution(x)))))
        return y

    def last(self) -> nn.Conv2d:
        return self.second

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        self.convolution.weight.copy_(conv.weight)
        for layer in (self.first, self.second):
            layer.weight.copy_(identity_kernel(layer.weight))
            layer.bias.zero_()  # type: ignore[union-attr]
        if conv.bias is not None:
            self.convolution.bias.copy_(conv.bias)  # type: ignore[union-attr]
        return ["weight", *(["bias"] if conv.bias is not None else [])]


class GlobalAveragePool(nn.Module):
    """``[n, c, h, w] -> [n, c]``: the mean of each channel, a class's score where there are as many
    channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def fire(squeeze: float = 0.125) -> Maker:
    """:class:`Fire` in a convolution's place; ``squeeze`` is a share of its outputs."""
    return lambda conv: Fire(Geometry.of(conv), squeeze)


def inception() -> Maker:
    """:class:`Inception` in a convolution's place."""
    return lambda conv: Inception(Geometry.of(conv))


def mlpconv() -> Maker:
    """:class:`MlpConv` in a convolution's place."""
    return lambda conv: MlpConv(Geometry.of(conv))
