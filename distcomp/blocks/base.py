"""What blocks share: a convolution's geometry, and what of its weight a block can take over."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError

Maker = Callable[[nn.Conv2d], nn.Module]
"""From a convolution what stands in its place."""


@dataclass(frozen=True)
class Geometry:
    """Of a block: channels in and out, the kernel's size, the stride. It pads so that stride 1 keeps the
    size."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1

    @staticmethod
    def of(conv: nn.Conv2d) -> Geometry:
        """Of a convolution. Raises DistcompError for one that no block stands in for."""
        height, width = conv.kernel_size
        same = (height // 2, width // 2)
        plain = height == width and height % 2 and conv.groups == 1 and conv.dilation == (1, 1)
        plain = plain and conv.padding_mode == "zeros"
        if not plain or conv.padding not in ("same", same) or conv.stride[0] != conv.stride[1]:
            raise DistcompError(
                f"a block stands in for a square, odd kernel with zeros as padding {same}, one group and no "
                f"dilation, not for {conv}; make it yourself and assign it"
            )
        return Geometry(conv.in_channels, conv.out_channels, height, conv.stride[0])


class Block(nn.Module):
    """A cheap building block. Its last layer has a bias, and no norm or activation follows it: those of the
    network that it stands in do."""

    geometry: Geometry

    @abstractmethod
    def last(self) -> nn.Conv2d:
        """The convolution whose bias is the block's."""

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        """Take over what can be; returns what was. The bias always can."""
        if conv.bias is None or self.last().bias is None:
            return []
        self.last().bias.copy_(conv.bias)  # type: ignore[union-attr]
        return ["bias"]


def pointwise(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """1 x 1."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=bias)


def normed(*layers: nn.Conv2d) -> list[nn.Module]:
    """Each followed by a batch norm and a ReLU."""
    return [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]


def divisor(wanted: int, *numbers: int) -> int:
    """The largest number up to ``wanted`` that divides all."""
    return next(
        count for count in range(max(1, wanted), 0, -1) if all(number % count == 0 for number in numbers)
    )


def identity_kernel(like: Tensor) -> Tensor:
    """Of a 1 x 1 convolution that gives its inputs, as far as there are outputs for them."""
    kernel = torch.zeros_like(like)
    kernel[:, :, 0, 0] = torch.eye(*like.shape[:2], dtype=like.dtype, device=like.device)
    return kernel
