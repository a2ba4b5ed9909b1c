"""The orthonormal cosine transform (DCT-II) of chunks of matrices, in a fixed order of additions.

::

    y = C_a X C_b^T,    C_s[k, j] = sqrt(2/s) cos(pi (2j+1) k / 2s),  row 0 times sqrt(1/2)

Torch says it here, C does it chunk by chunk in the cache (``_dct.c``), bit for bit alike. A transform of an
even number n of rows is two of half as many, h = n/2: one of its own kind and one of the fourth kind, which
is two of the second after a rotation::

    II(x)[2k]   = II(u)[k],  u_i = x_i + x_{n-1-i}        II(x)[k]  = sum_i x_i cos(pi (2i+1) k / 2n)
    II(x)[2k+1] = IV(v)[k],  v_i = x_i - x_{n-1-i}        IV(x)[k]  = sum_i x_i cos(pi (2i+1) (2k+1) / 4n)

    IV(x)[2k-1], IV(x)[2k] = II(a)[k] + II(b)[h-k], II(a)[k] - II(b)[h-k],    t_i = pi (2i+1) / 4n
    a_i = x_i cos t_i + x_{n-1-i} sin t_i,    b_i = (-1)^i (x_i sin t_i - x_{n-1-i} cos t_i)

An odd number of rows is a product with the matrix. The inverse of II is its transpose, the same steps
backwards (III); IV is its own.

Source: Plonka & Tasche, "Fast and numerically stable algorithms for discrete cosine transforms", Linear
Algebra and its Applications 2005; Wang 1984. Rotations lose less to rounding than Lee's halves of 1984, which
divide by small cosines. We differ: scaled once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.tables import check_tensor, lines_of

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
        """The coefficients of the matrix: chunk after chunk, each flat, laid on its side ``[wide, high]``."""
        chunks = piece.view(self.down, self.high, self.across, self.wide)
        columns = _forward(chunks.movedim(1, 0), self.high)  # the transformed side comes first
        return _forward(columns.movedim(3, 0), self.wide).permute(2, 3, 0, 1).reshape(-1)

    def backward(self, piece: Tensor) -> Tensor:
        """The matrix of these coefficients."""
        chunks = piece.view(self.down, self.across, self.wide, self.high)
        rows = _backward(chunks.movedim(2, 0), self.wide)
        return _backward(rows.movedim(3, 0), self.high).permute(2, 0, 3, 1).reshape(-1)


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


def transform(x: Tensor, grids: Grids) -> Tensor:
    """The coefficients of a flat buffer (float32): chunk after chunk, each flat, laid on its side."""
    if served_by_c(x):
        x, y = x.contiguous(), torch.empty_like(x)
        _run(DENSE, x, y, None, grids, 1)
        return y
    return _concatenated([one.forward(x[one.at : one.at + one.numel]) for one in grids.each], x)


def inverse(y: Tensor, grids: Grids) -> Tensor:
    """The flat buffer of these coefficients."""
    if served_by_c(y):
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
    return _second(x, n) * _along(scale, x)


def _backward(y: Tensor, n: int) -> Tensor:
    """The inverse, which is the transpose, along the first dimension."""
    *_, scale = _factors(n)
    return _third(y * _along(scale, y), n)


def _second(x: Tensor, n: int) -> Tensor:
    """The sums alone."""
    if n % 2:
        return _product(_matrices(n)[0], x)
    first, last = _ends(x)
    even, odd = _second(first + last, n // 2), _fourth(first - last, n // 2)
    return torch.stack([even, odd], 1).flatten(0, 1)


def _third(y: Tensor, n: int) -> Tensor:
    """The transpose of :func:`_second`."""
    if n % 2:
        return _product(_matrices(n)[0].T, y)
    even, odd = _third(y[0::2], n // 2), _fourth(y[1::2], n // 2)
    return torch.cat([even + odd, (even - odd).flip(0)])


def _fourth(x: Tensor, n: int) -> Tensor:
    """The sums with half a frequency more; their matrix is symmetric."""
    if n % 2:
        return _product(_matrices(n)[1], x)
    first, last = _ends(x)
    cos, sin = (_along(part, first) for part in _rotation(n))
    turns = _along(1.0 - 2.0 * (torch.arange(n // 2, dtype=torch.float32) % 2), first)
    a = _second(first * cos + last * sin, n // 2)
    b = _second(first * (turns * sin) - last * (turns * cos), n // 2).flip(0)
    pairs = torch.stack([a[1:] + b[:-1], a[1:] - b[:-1]], 1).flatten(0, 1)
    return torch.cat([a[:1], pairs, b[-1:]])


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of the rows, and the last, from the end."""
    half = x.shape[0] // 2
    return x[:half], x[half:].flip(0)


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
    """Of every halving the rotation, then the matrices of the odd rest, then each coefficient's scale."""
    parts: list[Tensor] = []
    size = n
    while size % 2 == 0:
        parts += _rotation(size)
        size //= 2
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] = math.sqrt(1 / n)
    return (*parts, *_matrices(size), scale.float())


@cache
def _rotation(n: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``pi (2i+1) / 4n``, in float64, rounded once."""
    angle = torch.pi * (2 * torch.arange(n // 2, dtype=torch.float64) + 1) / (4 * n)
    return torch.cos(angle).float(), torch.sin(angle).float()


@cache
def _matrices(n: int) -> tuple[Tensor, Tensor]:
    """``cos(pi (2j+1) k / 2n)`` and ``cos(pi (2j+1) (2k+1) / 4n)``, in float64, rounded once."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    second, fourth = (2 * j + 1) * k / (2 * n), (2 * j + 1) * (2 * k + 1) / (4 * n)
    return torch.cos(torch.pi * second).float(), torch.cos(torch.pi * fourth).float()
