"""The orthonormal cosine transform (DCT-II) of chunks of matrices, in a fixed order of additions.

::

    y = C_a X C_b^T,    C_s[k, j] = sqrt(2/s) cos(pi (2j+1) k / 2s),  row 0 times sqrt(1/2)

Torch says it here, C does it chunk by chunk in the cache (``_dct.c``), bit for bit alike. A transform of an
even number n of rows is two of half as many::

    C(2k)   = sum_i (x_i + x_{n-1-i}) cos(pi (2i+1) k / n)
    C(2k+1) = B(k) + B(k+1),  B(k) = sum_i (x_i - x_{n-1-i}) / (2 cos(pi (2i+1) / 2n)) cos(pi (2i+1) k / n)

From 16 rows down it is a product with a matrix, in two halves for the same reason.

Source: Lee, "A new algorithm to compute the discrete cosine transform", IEEE ASSP 1984. We differ: products
at the end, which lose less to rounding than halving further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from distcomp.kernels.dispatch import backend
from distcomp.kernels.tables import check_tensor, lines_of

BASE = 16
"""Rows from which on a transform is a product with a matrix."""
LINE_BYTES = 72
TOP, PUT, DENSE = 0, 1, 2
"""What C is asked for."""


@dataclass(frozen=True)
class Grid:
    """A matrix at ``at`` of a flat buffer, of ``down`` x ``across`` chunks of ``high`` x ``wide`` elements;
    ``count`` coefficients of each are sent."""

    at: int
    down: int
    high: int
    across: int
    wide: int
    count: int

    @property
    def numel(self) -> int:
        return self.down * self.high * self.across * self.wide

    def forward(self, piece: Tensor) -> Tensor:
        """The coefficients of the matrix: chunk after chunk, each flat."""
        chunks = piece.view(self.down, self.high, self.across, self.wide).transpose(1, 2)
        columns = _forward(chunks.movedim(2, 0), self.high)  # the transformed side comes first
        return _forward(columns.movedim(3, 0), self.wide).movedim((0, 1), (3, 2)).reshape(-1)

    def backward(self, piece: Tensor) -> Tensor:
        """The matrix of these coefficients."""
        chunks = piece.view(self.down, self.across, self.high, self.wide)
        columns = _backward(chunks.movedim(2, 0), self.high)
        rows = _backward(columns.movedim(3, 0), self.wide).movedim((0, 1), (3, 2))
        return rows.transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class Grids:
    """The matrices of a flat buffer."""

    each: tuple[Grid, ...]

    @cached_property
    def numel(self) -> int:
        """Up to where the flat buffer is touched."""
        return max((one.at + one.numel for one in self.each), default=0)

    @cached_property
    def count(self) -> int:
        """How many coefficients are sent."""
        return sum(one.down * one.across * one.count for one in self.each)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The lines that C reads (int64 ``[grids, 9]``), and the factors that they name (float32)."""
        begins: dict[int, int] = {}
        factors, lines, place = [torch.empty(0, dtype=torch.float32)], [], 0
        for one in (grid for grid in self.each if grid.numel):
            for side in (one.high, one.wide):
                if side not in begins:
                    begins[side] = sum(part.numel() for part in factors)
                    factors.append(torch.cat([part.reshape(-1) for part in _factors(side)]))
            sides = begins[one.high], begins[one.wide]
            lines.append((one.at, one.down, one.high, one.across, one.wide, one.count, place, *sides))
            place += one.down * one.across * one.count
        return torch.tensor(lines, dtype=torch.int64).reshape(-1, 9), torch.cat(factors)


def serves(device: torch.device) -> bool:
    """Whether the C extension serves tensors on this device."""
    return device.type == "cpu" and backend("cpu") == "cpu"


def transform(x: Tensor, grids: Grids) -> Tensor:
    """The coefficients of a flat buffer (float32): chunk after chunk, each flat."""
    if serves(x.device):
        x, y = x.contiguous(), torch.empty_like(x)
        _run(DENSE, x, y, None, grids, 1)
        return y
    return _concatenated([one.forward(x[one.at : one.at + one.numel]) for one in grids.each], x)


def inverse(y: Tensor, grids: Grids) -> Tensor:
    """The flat buffer of these coefficients."""
    if serves(y.device):
        x, y = torch.empty_like(y), y.contiguous()
        _run(DENSE, x, y, None, grids, -1)
        return x
    return _concatenated([one.backward(y[one.at : one.at + one.numel]) for one in grids.each], y)


def top(x: Tensor, grids: Grids, values: Tensor, places: Tensor) -> None:
    """The largest coefficients of each chunk of ``x`` (float32, on the CPU): ``values`` (float32), and where
    they are in a buffer of coefficients (int64), rising."""
    _run(TOP, x, values, places, grids, 0)


def put(values: Tensor, places: Tensor, grids: Grids, out: Tensor, sign: int) -> None:
    """Write into ``out`` (float32, on the CPU) what coefficients stand for that are ``values`` at ``places``,
    rising, and else 0; ``sign`` +1 adds it, -1 subtracts it."""
    _run(PUT, out, values, places, grids, sign)


def _run(kind: int, x: Tensor, values: Tensor, places: Tensor | None, grids: Grids, sign: int) -> None:
    from distcomp.kernels import _cpu

    check_tensor("values", x, torch.float32, grids.numel)
    check_tensor("coefficients", values, torch.float32, grids.numel if kind == DENSE else grids.count)
    if places is not None:
        check_tensor("places", places, torch.int64, grids.count)
    lines, factors = grids.tables
    sizes = x.numel(), values.numel(), 0 if places is None else places.numel()
    at = x.data_ptr(), values.data_ptr(), 0 if places is None else places.data_ptr()
    table = lines_of(lines, LINE_BYTES)
    _cpu.dct(kind, *at, sizes, *table, factors.data_ptr(), factors.numel(), sign)


def _concatenated(pieces: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(pieces) if pieces else like


# ------------------------------------------------------------------------------------------- along one side


def _forward(x: Tensor, n: int) -> Tensor:
    """The transform along the first dimension, of ``n``."""
    *_, scale = _factors(n)
    return _unscaled(x, n) * _along(scale, x)


def _unscaled(x: Tensor, n: int) -> Tensor:
    """The sums alone."""
    if n % 2:
        (matrix,) = _matrices(n)
        return _product(matrix, x)
    first, last = x[: n // 2], x[n // 2 :].flip(0)
    if n <= BASE:
        even, odd = (
            _product(matrix, half)
            for matrix, half in zip(_matrices(n), (first + last, first - last), strict=True)
        )
    else:
        even = _unscaled(first + last, n // 2)
        odd = _unscaled((first - last) * _along(_cosines(n), first), n // 2)
        odd = torch.cat([odd[:-1] + odd[1:], odd[-1:]])
    return torch.stack([even, odd], 1).flatten(0, 1)


def _backward(y: Tensor, n: int) -> Tensor:
    """The inverse, which is the transpose, along the first dimension."""
    *_, scale = _factors(n)
    return _transposed(y * _along(scale, y), n)


def _transposed(y: Tensor, n: int) -> Tensor:
    if n % 2:
        (matrix,) = _matrices(n)
        return _product(matrix.T, y)
    even, odd = y[0::2], y[1::2]
    if n <= BASE:
        first, last = (
            _product(matrix.T, half) for matrix, half in zip(_matrices(n), (even, odd), strict=True)
        )
    else:
        odd = torch.cat([odd[:1], odd[1:] + odd[:-1]])
        first = _transposed(even, n // 2)
        last = _transposed(odd, n // 2) * _along(_cosines(n), even)
    return torch.cat([first + last, (first - last).flip(0)])


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` along the first dimension, added in rising order."""
    matrix = matrix.to(x.device)
    total = x[0] * _along(matrix[:, 0], x[:1])
    for j in range(1, matrix.shape[1]):
        total = total + x[j] * _along(matrix[:, j], x[:1])
    return total


def _along(numbers: Tensor, x: Tensor) -> Tensor:
    """One number for each row of ``x``."""
    return numbers.to(x.device).view(-1, *[1] * (x.dim() - 1))


@cache
def _factors(n: int) -> tuple[Tensor, ...]:
    """Of every halving the factors, then the matrices of the base, then the scale of each coefficient."""
    parts, size = [], n
    while size > BASE and size % 2 == 0:
        parts.append(_cosines(size))
        size //= 2
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] = math.sqrt(1 / n)
    return (*parts, *_matrices(size), scale.float())


@cache
def _cosines(n: int) -> Tensor:
    """``1 / (2 cos(pi (2i+1) / 2n))``, in float64, rounded once."""
    i = torch.arange(n // 2, dtype=torch.float64)
    return (0.5 / torch.cos(torch.pi * (2 * i + 1) / (2 * n))).float()


@cache
def _matrices(n: int) -> tuple[Tensor, ...]:
    """``cos(pi (2j+1) k / 2n)``: of an odd n whole; of an even one for even k and for odd ones, j < n/2."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * j + 1) * k / (2 * n)).float()
    if n % 2:
        return (matrix,)
    return tuple(half.contiguous() for half in _halves(matrix, n))


def _halves(matrix: Tensor, n: int) -> Iterator[Tensor]:
    yield matrix[0::2, : n // 2]
    yield matrix[1::2, : n // 2]
