"""The largest coefficients of a cosine transform, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from distcomp.compressors.base import register_compressor
from distcomp.compressors.grid import WHOLE
from distcomp.compressors.sparse import Rows, kept_layout, top_indices
from distcomp.compressors.topk import Sparsifier
from distcomp.errors import DistcompError
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
    for 32 of 4096). The payload: ``values``, float32, k a chunk; ``indices``, uint8.

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
        return kept_layout(layout, [grid.rows.rows * grid.rows.count for grid in self._grids(layout)])

    def index_part(self, layout: Layout) -> Part:
        sizes = [grid.rows.rows * grid.rows.code.nbytes for grid in self._grids(layout)]
        return Part("indices", torch.uint8, sum(sizes))

    def _grids(self, layout: Layout) -> Iterator[_Grid]:
        for param, at in zip(layout.slices, layout.offsets, strict=True):
            yield _grid(param, at, self.side, self.k)

    def transform(self, x: Tensor, layout: Layout) -> Tensor:
        """The coefficients of a flat buffer: chunk after chunk, each flat."""
        pieces = [
            grid.forward(piece)
            for grid, (_, piece) in zip(self._grids(layout), layout.pieces(x), strict=True)
        ]
        return torch.cat(pieces) if pieces else x

    def inverse(self, y: Tensor, layout: Layout) -> Tensor:
        """The flat buffer of these coefficients."""
        pieces = [
            grid.backward(piece)
            for grid, (_, piece) in zip(self._grids(layout), layout.pieces(y), strict=True)
        ]
        return torch.cat(pieces) if pieces else y

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        y = self.transform(x, layout)
        # Parameter by parameter: chunks of one are rows of one length, so that one call searches them all.
        values_at = codes_at = 0
        for rows in (grid.rows for grid in self._grids(layout)):
            indices = top_indices(rows.view(y), rows.count)
            values = rows.view(y).gather(1, indices).reshape(-1)
            codes = rows.code.encode(indices).reshape(-1)
            payload["values"][values_at : values_at + values.numel()] = values
            payload["indices"][codes_at : codes_at + codes.numel()] = codes
            values_at, codes_at = values_at + values.numel(), codes_at + codes.numel()
        return payload

    def positions(self, payload: Payload, layout: Layout) -> Tensor:
        """Which *coefficients* the values are."""
        codes, at = payload["indices"], 0
        where = [torch.empty(0, dtype=torch.int64, device=codes.device)]
        for rows in (grid.rows for grid in self._grids(layout)):
            size = rows.rows * rows.code.nbytes
            indices = rows.code.decode(codes[at : at + size].view(rows.rows, rows.code.nbytes))
            where.append(rows.in_buffer(indices))
            at += size
        return torch.cat(where)

    def put(self, out: Tensor, values: Tensor, payload: Payload, layout: Layout, scale: int) -> None:
        # Into a buffer of coefficients: adding must wait until they are elements again.
        y = torch.zeros_like(out)
        y[self.positions(payload, layout)] = values
        out.add_(self.inverse(y, layout), alpha=scale)

    def delta(self, numel: int) -> float:
        """``k`` of the elements of a chunk, which are at most ``side^2``."""
        return min(1.0, self.k / max(1, min(self.side**2, numel)))


@dataclass(frozen=True)
class _Grid:
    """A matrix of ``down x across`` chunks of ``high x wide`` elements, and its chunks as rows of a flat
    buffer."""

    down: int
    high: int
    across: int
    wide: int
    rows: Rows

    def forward(self, piece: Tensor) -> Tensor:
        chunks = piece.view(self.down, self.high, self.across, self.wide).transpose(1, 2)
        return (dct(self.high, piece.device) @ chunks @ dct(self.wide, piece.device).T).reshape(-1)

    def backward(self, piece: Tensor) -> Tensor:
        chunks = piece.view(self.down, self.across, self.high, self.wide)
        back = dct(self.high, piece.device).T @ chunks @ dct(self.wide, piece.device)
        return back.transpose(1, 2).reshape(-1)


@cache
def _grid(param: ParamSlice, at: int, side: int, k: int) -> _Grid:
    # A piece of a parameter may begin in the middle of a row: it has one dimension.
    matrix = param.whole and len(param.shape) > 1 and param.numel > 0
    tall = param.shape[0] if matrix else 1
    long = param.numel // tall
    high, wide = largest_divisor(tall, side), largest_divisor(max(1, long), side)
    down, across = tall // high, long // wide
    rows = Rows(at, down * across, high * wide, min(k, high * wide))
    return _Grid(down, high, across, wide, rows)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that does not pass ``limit``."""
    return next(side for side in range(min(number, limit), 0, -1) if number % side == 0)


def dct(side: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II: ``C_kj = sqrt(2/s) cos(pi (2j+1) k / 2s)``, row 0 times ``sqrt(1/2)``."""
    return _dct(side).to(device)


@cache
def _dct(side: int) -> Tensor:
    # In float64, rounded once: the cosine of a large angle loses in float32 what the angle has lost.
    j = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * j + 1) * j[:, None] / (2 * side)).mul_(math.sqrt(2 / side))
    matrix[0] *= math.sqrt(0.5)
    return matrix.float()
