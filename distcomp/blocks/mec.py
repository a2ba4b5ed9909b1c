"""Memory-efficient convolution: only the width is unrolled, and rows are products over shifted views."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.blocks.base import Maker
from distcomp.blocks.winograd import copied_whole
from distcomp.errors import DistcompError


def lowered_bytes(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: int, itemsize: int = 4
) -> tuple[int, int]:
    """Of an input ``[n, c, h, w]`` (padding included): what im2col lowers it to, and what MEC does."""
    n, c, height, width = shape
    rows, columns = (height - kernel[0]) // stride + 1, (width - kernel[1]) // stride + 1
    return (
        itemsize * n * rows * columns * kernel[0] * kernel[1] * c,
        itemsize * n * columns * height * kernel[1] * c,
    )


def lowered(x: Tensor, columns: int, width: int, stride: int) -> Tensor:
    """``[n, columns, height, width, c]``: of each column of the output the strip of the input that it
    sees."""
    strips = x.unfold(3, width, stride)[:, :, :, :columns]  # [n, c, h, columns, width]
    return strips.permute(0, 3, 2, 4, 1).contiguous()


def _row(strips: Tensor, row: int, height: int, stride: int) -> Tensor:
    """``[n columns, height width c]``: a view of what one row of the output sees."""
    n, columns, whole, width, c = strips.shape
    each = whole * width * c
    return strips.as_strided((n * columns, height * width * c), (each, 1), row * stride * width * c)


class _MEC(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int) -> Tensor:
        o, _, height, width = w.shape
        rows, columns = (x.shape[2] - height) // stride + 1, (x.shape[3] - width) // stride + 1
        strips = lowered(x, columns, width, stride)
        kernel = w.permute(2, 3, 1, 0).reshape(-1, o)
        y = x.new_empty(x.shape[0] * columns, rows, o)
        for row in range(rows):
            torch.mm(_row(strips, row, height, stride), kernel, out=y[:, row])
        ctx.save_for_backward(x, w)  # the strips are made again: they are larger than the input
        ctx.stride = stride
        return y.view(x.shape[0], columns, rows, o).permute(0, 3, 2, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        (dy,), stride = gradients, ctx.stride
        o, c, height, width = w.shape
        n, _, rows, columns = dy.shape
        strips = lowered(x, columns, width, stride)
        kernel = w.permute(2, 3, 1, 0).reshape(-1, o)
        dkernel, dstrips = torch.zeros_like(kernel), torch.zeros_like(strips)
        for row in range(rows):
            drow = dy[:, :, row].permute(0, 2, 1).reshape(n * columns, o)
            dkernel.addmm_(_row(strips, row, height, stride).T, drow)
            _row(dstrips, row, height, stride).addmm_(drow, kernel.T)
        dx = torch.zeros_like(x)
        for column in range(columns):
            start = column * stride
            dx[:, :, :, start : start + width] += dstrips[:, column].permute(0, 3, 1, 2)
        return dx, dkernel.view(height, width, c, o).permute(3, 2, 0, 1), None


def mec_conv2d(x: Tensor, w: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """``[n, c, h, w]`` convolved with ``[o, c, kh, kw]``: lowered once along the width, with a backward of
    its own.

    ::

        L[n, j, i, b, c] = x[n, c, i, s j + b]
        y[n, :, r, j]    = L[n, j, s r : s r + kh].flatten() W

    L has ``n ow H kw C`` numbers, where im2col's matrix has ``n oh ow kh kw C``; each row r of the output is
    one product of matrices, on a view of L.

    Source: Cho and Brand, MEC: memory-efficient convolution for deep neural network, ICML 2017.
    """
    padded = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    result: Tensor = _MEC.apply(padded, w, stride)  # type: ignore[no-untyped-call]
    return result


class MECConv2d(nn.Conv2d):
    """A convolution by :func:`mec_conv2d`; parameters as of ``nn.Conv2d``.

    Raises DistcompError for dilation, groups, uneven strides, and padding other than by numbers of zeros.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _check_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        padding: Any = self.padding
        y = mec_conv2d(x, self.weight, self.stride[0], padding)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        """All of a convolution."""
        return copied_whole(self, conv)


def _check_plain(conv: nn.Conv2d) -> None:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or conv.stride[0] != conv.stride[1]:
        raise DistcompError(
            f"MEC takes one group, one stride, a padding in numbers of zeros and no dilation, not {conv}"
        )


def mec() -> Maker:
    """:class:`MECConv2d` in a convolution's place. Raises DistcompError as that does."""

    def make(conv: nn.Conv2d) -> nn.Module:
        _check_plain(conv)
        kernel: Any = conv.kernel_size
        padding: Any = conv.padding
        return MECConv2d(
            conv.in_channels,
            conv.out_channels,
            kernel,
            conv.stride[0],
            padding,
            bias=conv.bias is not None,
        )

    return make
