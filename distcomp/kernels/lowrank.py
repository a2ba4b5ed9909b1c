"""Products of a large matrix with a few vectors, and of a few vectors with each other, at the speed of
memory.

Factors lie as rows, ``p`` float32 ``[rank, a]``, ``q`` float32 ``[rank, b]``; the matrix is ``[a, b]``. The C
extension takes every sum in one order: the same bits for any alignment, instruction set and number of
threads. :func:`outer`, which all ranks must agree on, has the same bits without it. Above :data:`FEW`
vectors, and on other devices, torch multiplies. Factors that do not fit the matrix raise ValueError.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import backend
from distcomp.kernels.tables import lines_of

FEW = 8
Adding = tuple[Tensor, Tensor]
ALIGNED_BYTES = 64


def times_rows(q: Tensor, matrix: Tensor, adding: Adding | None = None) -> Tensor:
    """``q M^T``, ``[rank, a]``.

    With ``adding``, a residual and memory for a sum, each shaped as the matrix, ``M`` is matrix plus
    residual, and is left in the sum: added in the pass in which it is multiplied."""
    _check(q, matrix.shape[1], "q", matrix)
    cpu = _extension(q, matrix, *(adding or ()))
    if cpu is None:
        if adding is not None:
            matrix = torch.add(matrix, adding[0], out=adding[1])
        return q @ _aligned(matrix).T
    (a, b), rank = matrix.shape, len(q)
    out = torch.empty(rank, a, dtype=torch.float32)
    q_at, m_at, out_at = q.data_ptr(), matrix.data_ptr(), out.data_ptr()
    added_at = _addresses(adding)

    def run(start: int, count: int) -> None:
        at = (0, q_at, m_at + 4 * b * start, out_at + 4 * start)
        sizes = (0, q.numel(), matrix.numel() - b * start, out.numel() - start)
        residual_at, sum_at = (one and one + 4 * b * start for one in added_at)
        cpu._cpu.lowrank("rows", *at, count, b, rank, 0, b, a, False, sizes, (residual_at, sum_at))

    cpu.shared(run, a, 1, 4 * b)
    return out


def times_columns(p: Tensor, matrix: Tensor) -> Tensor:
    """``p M``, ``[rank, b]``."""
    _check(p, matrix.shape[0], "p", matrix)
    cpu = _extension(p, matrix)
    if cpu is None:
        return p @ _aligned(matrix)
    (a, b), rank = matrix.shape, len(p)
    out = torch.empty(rank, b, dtype=torch.float32)
    p_at, m_at, out_at = p.data_ptr(), matrix.data_ptr(), out.data_ptr()

    def run(start: int, count: int) -> None:
        at = (p_at, 0, m_at + 4 * start, out_at + 4 * start)
        sizes = (p.numel(), 0, matrix.numel() - start, out.numel() - start)
        cpu._cpu.lowrank("columns", *at, a, count, rank, a, b, b, False, sizes)

    cpu.shared(run, b, 1, 4 * a)
    return out


def outer(p: Tensor, q: Tensor, out: Tensor) -> None:
    """``out = p^T q``."""
    _check_both(p, q, out)
    cpu = _extension(p, out) if _few(q, out) else None
    if cpu is not None:
        _outer(cpu, p, q, out, subtract=False)
    elif _few(p, out):
        out.zero_()
        for left, right in zip(p, q, strict=True):
            out += left.unsqueeze(1) * right
    else:
        torch.mm(p.T, q, out=out)


def subtract_outer(p: Tensor, q: Tensor, out: Tensor) -> None:
    """``out -= p^T q``."""
    _check_both(p, q, out)
    cpu = _extension(p, out) if _few(q, out) else None
    if cpu is not None:
        _outer(cpu, p, q, out, subtract=True)
    else:
        out.addmm_(p.T, q, alpha=-1)


def _check(factor: Tensor, side: int, name: str, matrix: Tensor) -> None:
    if factor.dim() != 2 or factor.shape[1] != side:
        raise ValueError(
            f"{name} is {tuple(factor.shape)}, which does not fit a matrix of {tuple(matrix.shape)}"
        )


def _check_both(p: Tensor, q: Tensor, out: Tensor) -> None:
    _check(p, out.shape[0], "p", out)
    _check(q, out.shape[1], "q", out)
    if len(p) != len(q):
        raise ValueError(f"p has {len(p)} vectors and q {len(q)}; a product needs as many of both")


def _outer(cpu: Any, p: Tensor, q: Tensor, out: Tensor, subtract: bool) -> None:
    (a, b), rank = out.shape, len(p)
    p_at, q_at, out_at = p.data_ptr(), q.data_ptr(), out.data_ptr()

    def run(start: int, count: int) -> None:
        at = (p_at + 4 * start, q_at, 0, out_at + 4 * b * start)
        sizes = (p.numel() - start, q.numel(), 0, out.numel() - b * start)
        cpu._cpu.lowrank("outer", *at, count, b, rank, a, 0, b, subtract, sizes)

    cpu.shared(run, a, 1, 4 * b)


SMALL = 1 << 18
"""Elements: where there are several threads, a larger matrix is a call of its own, which they share."""
LINE_BYTES = 56


@dataclass(frozen=True)
class Products:
    """Many matrices of a flat buffer, ``(rank, a, b, at)`` of each; their factors follow one another in one
    tensor for p and one for q."""

    each: tuple[tuple[int, int, int, int], ...]

    def shapes(self, side: str) -> list[tuple[int, int]]:
        """Rank and length of each factor ``p`` or ``q``."""
        return [(rank, a if side == "p" else b) for rank, a, b, _ in self.each]

    def views(self, factors: Tensor, side: str) -> list[Tensor]:
        """Each factor's own rows."""
        shapes = self.shapes(side)
        sizes = [rank * length for rank, length in shapes]
        return [part.view(shape) for part, shape in zip(torch.split(factors, sizes), shapes, strict=True)]

    def matrices(self, x: Tensor) -> list[Tensor]:
        """Views of the matrices in the flat buffer."""
        return [x[at : at + a * b].view(a, b) for _, a, b, at in self.each]

    @cached_property
    def numels(self) -> dict[str, int]:
        """How many elements each tensor has, or must have at least."""
        return {
            "p": sum(rank * a for rank, a, _, _ in self.each),
            "q": sum(rank * b for rank, _, b, _ in self.each),
            "m": max((at + a * b for _, a, b, at in self.each), default=0),
        }

    @cached_property
    def few(self) -> bool:
        """Whether C does all of them."""
        return all(1 <= rank <= FEW for rank, _, _, _ in self.each)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest matrix."""
        return max((a * b for _, a, b, _ in self.each), default=0)

    def table(self, kind: str) -> Tensor:
        """What C reads: rank, a, b, and where p, q, m and out begin."""
        return {"rows": self._rows, "columns": self._columns, "outer": self._outer}[kind]

    @cached_property
    def _starts(self) -> Tensor:
        p = list(itertools.accumulate((rank * a for rank, a, _, _ in self.each), initial=0))
        q = list(itertools.accumulate((rank * b for rank, _, b, _ in self.each), initial=0))
        lines = [(*one, i, j) for one, i, j in zip(self.each, p, q, strict=False)]
        return torch.tensor(lines, dtype=torch.int64).reshape(-1, 6)

    @cached_property
    def _rows(self) -> Tensor:
        rank, a, b, at, p, q = self._starts.unbind(1)
        return torch.stack([rank, a, b, torch.zeros_like(p), q, at, p], 1).contiguous()

    @cached_property
    def _columns(self) -> Tensor:
        rank, a, b, at, p, q = self._starts.unbind(1)
        return torch.stack([rank, a, b, p, torch.zeros_like(q), at, q], 1).contiguous()

    @cached_property
    def _outer(self) -> Tensor:
        rank, a, b, at, p, q = self._starts.unbind(1)
        return torch.stack([rank, a, b, p, q, torch.zeros_like(at), at], 1).contiguous()


def each_times_rows(q: Tensor, x: Tensor, products: Products, adding: Adding | None = None) -> Tensor:
    """:func:`times_rows` of each matrix in the flat buffer ``x``: all factors p, laid end to end.

    With ``adding``, a residual and memory for a sum, both as long as ``x``, of each matrix of their sum,
    which is left there; what lies between matrices is left alone."""
    if _in_one_call(products, q=q, m=x, **dict(zip(("m, residual", "m, sum"), adding or (), strict=False))):
        out = torch.empty(products.numels["p"], dtype=torch.float32)
        _run("rows", products, q=q, m=x, out=out, adding=adding)
        return out
    added: list[Adding | None] = [None] * len(products.each)
    if adding is not None:
        added = list(zip(*map(products.matrices, adding), strict=True))
    each = zip(products.views(q, "q"), products.matrices(x), added, strict=True)
    return _flat([times_rows(factor.clone(), matrix, more) for factor, matrix, more in each], x)


def each_times_columns(p: Tensor, x: Tensor, products: Products) -> Tensor:
    """:func:`times_columns` of each matrix: all factors q, laid end to end."""
    if _in_one_call(products, p=p, m=x):
        out = torch.empty(products.numels["q"], dtype=torch.float32)
        _run("columns", products, p=p, m=x, out=out)
        return out
    pairs = zip(products.views(p, "p"), products.matrices(x), strict=True)
    return _flat([times_columns(factor.clone(), matrix) for factor, matrix in pairs], x)


def each_outer(p: Tensor, q: Tensor, out: Tensor, products: Products) -> None:
    """:func:`outer` of each pair of factors, into where the matrices lie in ``out``."""
    _each_outer(p, q, out, products, subtract=False)


def each_subtract_outer(p: Tensor, q: Tensor, out: Tensor, products: Products) -> None:
    """:func:`subtract_outer` of each pair of factors."""
    _each_outer(p, q, out, products, subtract=True)


def _each_outer(p: Tensor, q: Tensor, out: Tensor, products: Products, subtract: bool) -> None:
    if _in_one_call(products, p=p, q=q, m=out):
        _run("outer", products, p=p, q=q, out=out, subtract=subtract)
        return
    factors = (products.views(p, "p"), products.views(q, "q"))
    for left, right, matrix in zip(*factors, products.matrices(out), strict=True):
        (subtract_outer if subtract else outer)(left.clone(), right.clone(), matrix)


def _flat(factors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([one.reshape(-1) for one in factors]) if factors else like[:0].clone()


def _in_one_call(products: Products, **tensors: Tensor) -> bool:
    """Whether C serves these; refuses what has other sizes than the products say."""
    for name, one in tensors.items():
        wanted = products.numels[name[0]]
        if one.numel() < wanted or (name[0] != "m" and one.numel() != wanted):
            raise DistcompError(
                f"{name} of {len(products.each)} products has {one.numel()} elements and not {wanted}; it "
                "is of another layout"
            )
    plain = all(
        one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous()
        for one in tensors.values()
    )
    alone = products.largest > SMALL and torch.get_num_threads() > 1
    return plain and products.few and not alone and backend("cpu") == "cpu"


def _run(
    kind: str, products: Products, out: Tensor, subtract: bool = False, adding: Adding | None = None,
    **given: Tensor,
) -> None:  # fmt: skip
    cpu = import_module("distcomp.kernels.cpu")
    lines, number = lines_of(products.table(kind), LINE_BYTES)
    tensors = [given.get(name) for name in ("p", "q", "m")] + [out]
    at = [0 if one is None else one.data_ptr() for one in tensors]
    sizes = tuple(0 if one is None else one.numel() for one in tensors)

    def run(start: int, count: int) -> None:
        table = lines + LINE_BYTES * start
        cpu._cpu.lowrank_pieces(kind, *at, table, count, subtract, sizes, _addresses(adding))

    if number:
        cpu.shared(run, number, 1, 4 * products.numels["m"] // number)


def _addresses(adding: Adding | None) -> tuple[int, int]:
    return (0, 0) if adding is None else (adding[0].data_ptr(), adding[1].data_ptr())


def _few(factor: Tensor, *matrices: Tensor) -> bool:
    every = (factor, *matrices)
    plain = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in every)
    return plain and 1 <= len(factor) <= FEW and all(one.is_contiguous() for one in every)


def _extension(factor: Tensor, *matrices: Tensor) -> Any:
    """:mod:`distcomp.kernels.cpu`, where it serves these, else None."""
    served = _few(factor, *matrices) and backend("cpu") == "cpu"
    return import_module("distcomp.kernels.cpu") if served else None


def _aligned(matrix: Tensor) -> Tensor:
    """BLAS gives other bits where a matrix lies otherwise; the result must not depend on the place in a
    bucket."""
    return matrix if matrix.data_ptr() % ALIGNED_BYTES == 0 else matrix.clone()
