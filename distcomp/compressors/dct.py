"""The largest coefficients of a cosine transform, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import register_compressor
from distcomp.compressors.grid import WHOLE
from distcomp.compressors.sparse import Rows, RowSet, kept_layout
from distcomp.compressors.topk import Sparsifier
from distcomp.errors import DistcompError
from distcomp.kernels import dct as kernel
from distcomp.kernels.dct import Grid, Grids
from distcomp.kernels.dispatch import served_by_c
from distcomp.layout import Layout, ParamSlice
from distcomp.payload import Part, Payload
from distcomp.randomness import Key


@register_compressor("dct_topk")
@dataclass(frozen=True)
class DctTopK(Sparsifier):
    """The ``k`` largest coefficients of each chunk's two-dimensional cosine transform::

        y = C_a X C_b^T,    C_s the orthonormal DCT-II of side s;    C(x) = C_a^T top_k(y) C_b

    A parameter is the matrix ``(shape[0], the rest)``, cut into chunks whose sides are the largest divisors
    of its sides that do not pass ``side``; a vector (or a piece of a parameter) has chunks of one dimension.
    Because the transform is orthonormal, it contracts by ``k`` over the elements of a chunk, like top-k.
    Biased.

    On the wire, per chunk: 4 k bytes of values and about ``k (2 + log2(chunk/k))`` bits of indices (9 each
    for 32 of 4096); coefficients are counted column by column, and so ties go. The payload: ``values``,
    float32, k a chunk; ``indices``, uint8.

    Source: Peng et al., "DeMo: decoupled momentum optimization", 2024. We differ: packed indices (the
    reference sends 64 bits each); tensors of more than two dimensions are matrices.

    Raises DistcompError for k or side below 1.
    """

    k: int = 32
    side: int = 64

    alignment = WHOLE

    def __post_init__(self) -> None:
        if self.k < 1 or self.side < 1:
            raise DistcompError(
                f"chunks of side {self.side} cannot send {self.k} values; the paper has 64 and 32"
            )

    def kept(self, layout: Layout) -> Layout:
        counts = [rows.rows * rows.count for rows in self._rows(layout).each]
        return layout.remember((self, "kept"), lambda: kept_layout(layout, counts))

    def index_part(self, layout: Layout) -> Part:
        return Part("indices", torch.uint8, self._rows(layout).code_bytes)

    def _grids(self, layout: Layout) -> Grids:
        return layout.remember((self, "grids"), lambda: Grids(tuple(self._laid_out(layout))))

    def _laid_out(self, layout: Layout) -> Iterator[Grid]:
        for param, at in zip(layout.slices, layout.offsets, strict=True):
            yield _grid(param, at, self.side, self.k)

    def _rows(self, layout: Layout) -> RowSet:
        """The chunks as rows of a buffer of coefficients."""
        return layout.remember((self, "rows"), lambda: RowSet(tuple(map(_rows, self._grids(layout).each))))

    def transform(self, x: Tensor, layout: Layout) -> Tensor:
        """The coefficients of a flat buffer: chunk after chunk, each flat, column by column."""
        return kernel.transform(x, self._grids(layout))

    def inverse(self, y: Tensor, layout: Layout) -> Tensor:
        """The flat buffer of these coefficients."""
        return kernel.inverse(y, self._grids(layout))

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload, rows = Payload.empty(self.parts(layout), x.device), self._rows(layout)
        if served_by_c(x):
            places = torch.empty(rows.count, dtype=torch.int64)
            kernel.top(x.contiguous(), self._grids(layout), payload["values"], places)
        else:
            y = self.transform(x, layout)
            places = rows.largest(y)
            torch.index_select(y, 0, places, out=payload["values"])
        payload["indices"].copy_(rows.encode(places))
        return payload

    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        """Which *coefficients* the values are."""
        return self._rows(layout).decode(payload["indices"])

    def put(self, out: Tensor, values: Tensor, payload: Payload, layout: Layout, scale: int) -> None:
        places = self.positions(payload, layout)
        if served_by_c(out) and out.is_contiguous():
            kernel.put(values.contiguous(), places, self._grids(layout), out, scale)
            return
        # Into a buffer of coefficients: adding must wait until they are elements again.
        y = torch.zeros_like(out)
        y[places] = values
        out.add_(self.inverse(y, layout), alpha=scale)

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        if served_by_c(out) and not add:  # every element is written: nothing to begin with
            places = self.positions(payload, layout)
            kernel.put(payload["values"], places, self._grids(layout), out, 0)
        else:
            super().decode_into(out, payload, layout, add)

    def delta(self, numel: int) -> float:
        """``k`` of the elements of a chunk, which are at most ``side^2``."""
        return min(1.0, self.k / max(1, min(self.side**2, numel)))


def _grid(param: ParamSlice, at: int, side: int, k: int) -> Grid:
    # A piece of a parameter may begin in the middle of a row: it has one dimension.
    matrix = param.whole and len(param.shape) > 1 and param.numel > 0
    tall = param.shape[0] if matrix else 1
    long = param.numel // tall
    high, wide = largest_divisor(tall, side), largest_divisor(max(1, long), side)
    return Grid(at, tall // high, high, long // wide, wide, min(k, high * wide))


def _rows(grid: Grid) -> Rows:
    return Rows(grid.at, grid.down * grid.across, grid.high * grid.wide, grid.count)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that does not pass ``limit``."""
    return next(side for side in range(min(number, limit), 0, -1) if number % side == 0)
