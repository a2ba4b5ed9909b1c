"""Products of a large matrix with a few vectors, and of a few vectors with each other, at the speed of
memory.

Factors lie as rows, ``p`` float32 ``[rank, a]``, ``q`` float32 ``[rank, b]``; the matrix is ``[a, b]``. The C
extension takes every sum in one order: the same bits for any alignment, instruction set and number of
threads. :func:`outer`, which all ranks must agree on, has the same bits without it. Above :data:`FEW`
vectors, and on other devices, torch multiplies. Factors that do not fit the matrix raise ValueError.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from distcomp.kernels.dispatch import backend

FEW = 8
ALIGNED_BYTES = 64


def times_rows(q: Tensor, matrix: Tensor) -> Tensor:
    """``q M^T``, ``[rank, a]``."""
    _check(q, matrix.shape[1], "q", matrix)
    cpu = _extension(q, matrix)
    if cpu is None:
        return q @ _aligned(matrix).T
    (a, b), rank = matrix.shape, len(q)
    out = torch.empty(rank, a, dtype=torch.float32)
    q_at, m_at, out_at = q.data_ptr(), matrix.data_ptr(), out.data_ptr()

    def run(start: int, count: int) -> None:
        at = (0, q_at, m_at + 4 * b * start, out_at + 4 * start)
        sizes = (0, q.numel(), matrix.numel() - b * start, out.numel() - start)
        cpu._cpu.lowrank("rows", *at, count, b, rank, 0, b, a, False, sizes)

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


def _few(factor: Tensor, matrix: Tensor) -> bool:
    plain = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in (factor, matrix))
    return plain and 1 <= len(factor) <= FEW and factor.is_contiguous() and matrix.is_contiguous()


def _extension(factor: Tensor, matrix: Tensor) -> Any:
    """:mod:`distcomp.kernels.cpu`, where it serves these, else None."""
    served = _few(factor, matrix) and backend("cpu") == "cpu"
    return import_module("distcomp.kernels.cpu") if served else None


def _aligned(matrix: Tensor) -> Tensor:
    """BLAS gives other bits where a matrix lies otherwise; the result must not depend on the place in a
    bucket."""
    return matrix if matrix.data_ptr() % ALIGNED_BYTES == 0 else matrix.clone()
