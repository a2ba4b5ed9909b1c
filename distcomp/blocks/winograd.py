"""Winograd's minimal filtering: 3 x 3 convolutions with 2.25 or 4 times fewer multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError

Matrices = tuple[Tensor, Tensor, Tensor]
"""``B^T``, ``G``, ``A^T``."""

_F2 = (
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    [[1, 1, 1, 0], [0, 1, -1, -1]],
)
_F4 = (
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
)  # fmt: skip


def transforms(tile: int, like: Tensor) -> Matrices:
    """Of F(tile x tile, 3 x 3), in the type of ``like``."""
    if tile not in (2, 4):
        raise DistcompError(f"Winograd's outputs are tiles of 2 or 4, not {tile}")
    bt, g, at = (torch.tensor(rows, dtype=torch.float64).to(like) for rows in (_F2 if tile == 2 else _F4))
    return bt, g, at


def _tiles(x: Tensor, tile: int, padding: tuple[int, int]) -> Tensor:
    """``[n, c, rows, columns, t + 2, t + 2]``: overlapping tiles of the padded input."""
    height, width = (size + 2 * pad - 2 for size, pad in zip(x.shape[2:], padding, strict=True))
    bottom, right = -height % tile, -width % tile
    padded = nn.functional.pad(x, (padding[1], padding[1] + right, padding[0], padding[0] + bottom))
    return padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)


def _transformed(
    x: Tensor, w: Tensor, tile: int, padding: tuple[int, int]
) -> tuple[Tensor, Tensor, torch.Size]:
    """``V [t'^2, c, n rows columns]``, ``U [t'^2, o, c]``, and the shape of the tiles."""
    bt, g, _ = transforms(tile, x)
    tiles = _tiles(x, tile, padding)
    v = bt @ tiles @ bt.T
    u = g @ w @ g.T
    side = tile + 2
    return (
        v.permute(4, 5, 1, 0, 2, 3).reshape(side * side, x.shape[1], -1),
        u.permute(2, 3, 0, 1).reshape(side * side, *w.shape[:2]),
        tiles.shape,
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, tile: int, padding: tuple[int, int]) -> Tensor:
        v, u, (n, _, rows, columns, side, _) = _transformed(x, w, tile, padding)
        _, _, at = transforms(tile, x)
        ctx.save_for_backward(x, w)
        ctx.tile, ctx.padding = tile, padding
        products = (u @ v).view(side, side, w.shape[0], n, rows, columns)
        y = at @ products.permute(3, 2, 4, 5, 0, 1) @ at.T  # [n, o, rows, columns, t, t]
        height, width = (size + 2 * pad - 2 for size, pad in zip(x.shape[2:], padding, strict=True))
        return y.permute(0, 1, 2, 4, 3, 5).reshape(n, w.shape[0], rows * tile, columns * tile)[
            :, :, :height, :width
        ]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w = ctx.saved_tensors
        (dy,), tile, padding = gradients, ctx.tile, ctx.padding
        v, u, (n, c, rows, columns, side, _) = _transformed(x, w, tile, padding)
        bt, g, at = transforms(tile, x)
        whole = nn.functional.pad(dy, (0, columns * tile - dy.shape[3], 0, rows * tile - dy.shape[2]))
        tiles = whole.view(n, -1, rows, tile, columns, tile).permute(0, 1, 2, 4, 3, 5)
        dm = (at.T @ tiles @ at).permute(4, 5, 1, 0, 2, 3).reshape(side * side, w.shape[0], -1)
        du = (dm @ v.transpose(1, 2)).view(side, side, *w.shape[:2]).permute(2, 3, 0, 1)
        dv = (u.transpose(1, 2) @ dm).view(side, side, c, n, rows, columns).permute(3, 2, 4, 5, 0, 1)
        return _added(bt.T @ dv @ bt, x, tile, padding), g.T @ du @ g, None, None


def _added(tiles: Tensor, x: Tensor, tile: int, padding: tuple[int, int]) -> Tensor:
    """The sum of overlapping tiles ``[n, c, rows, columns, t + 2, t + 2]``, without the padding."""
    n, c, rows, columns, side, _ = tiles.shape
    size = (rows * tile + 2, columns * tile + 2)
    flat = tiles.permute(0, 1, 4, 5, 2, 3).reshape(n, c * side * side, rows * columns)
    whole = nn.functional.fold(flat, size, (side, side), stride=tile)
    return whole[:, :, padding[0] : padding[0] + x.shape[2], padding[1] : padding[1] + x.shape[3]]


def winograd_conv2d(x: Tensor, w: Tensor, tile: int = 2, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """``[n, c, h, w]`` convolved with ``[o, c, 3, 3]``, stride 1: F(tile x tile, 3 x 3), with a backward of
    its own.

    ::

        U = G g G^T;    V = B^T d B;    M = U V, summed over channels;    Y = A^T M A
        dM = A dY A^T;  dg = G^T (dM V^T) G;    dd = B (U^T dM) B^T, overlapping tiles added

    ``(t + 2)^2`` multiplications for ``9 t^2``: 2.25 times fewer for t = 2, 4 times for t = 4, whose matrices
    hold larger numbers: errors in few bits grow.

    Source: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
    """
    result: Tensor = _Winograd.apply(x, w, tile, padding)  # type: ignore[no-untyped-call]
    return result


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 by :func:`winograd_conv2d`; parameters as of ``nn.Conv2d``."""

    def __init__(
        self, inputs: int, outputs: int, *, padding: int = 1, bias: bool = True, tile: int = 2
    ) -> None:
        super().__init__(inputs, outputs, 3, padding=padding, bias=bias)
        transforms(tile, torch.zeros((), dtype=torch.float32))
        self.tile = tile

    def forward(self, x: Tensor) -> Tensor:
        padding: Any = self.padding
        y = winograd_conv2d(x, self.weight, self.tile, padding)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    @torch.no_grad()
    def copy_from(self, conv: nn.Conv2d) -> list[str]:
        """All of a convolution."""
        return copied_whole(self, conv)


def copied_whole(new: nn.Conv2d, conv: nn.Conv2d) -> list[str]:
    """Weight and bias of one convolution, for another of the same geometry."""
    new.weight.copy_(conv.weight)
    if conv.bias is None or new.bias is None:
        return ["weight"]
    new.bias.copy_(conv.bias)
    return ["weight", "bias"]


def winograd(tile: int = 2) -> Any:
    """:class:`WinogradConv2d` in a convolution's place. Raises DistcompError for another kernel or stride."""

    def make(conv: nn.Conv2d) -> nn.Module:
        square = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1)
        padding = (1, 1) if conv.padding == "same" else conv.padding
        if not square or conv.groups != 1 or conv.padding_mode != "zeros" or padding[0] != padding[1]:
            raise DistcompError(f"Winograd's convolution is 3 x 3 of stride 1 in one group, not {conv}")
        return WinogradConv2d(
            conv.in_channels,
            conv.out_channels,
            padding=int(padding[0]),
            bias=conv.bias is not None,
            tile=tile,
        )

    return make
