"""Slices of a flat buffer's matrices by their coefficients in known bases, and back, at the speed of memory.

A matrix float32 ``[units, slices, run]`` holds slice s as its elements ``[:, s, :]``: ``K = units run`` of
them, read where they lie. Bases are bfloat16 ``[B, most, K]``, each for the next ``ceil(slices / B)`` slices;
everything else is float32. What :func:`restore` writes, which all ranks must agree on, has the same bits with
the C extension, whatever its instruction set, and without; :func:`project_slices` is a rank's own matter.
Bases of float32, and other devices, are left to torch's products.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.tables import check_tensor, lines_of

LINE_BYTES, PIECE_BYTES = 72, 16


@dataclass(frozen=True)
class Sliced:
    """One matrix, where it begins in the flat buffer, and how many bases its slices share, of how many rows,
    of which ``dims`` are in use."""

    at: int
    units: int
    slices: int
    run: int
    bases: int
    most: int
    dims: int

    @property
    def k(self) -> int:
        """Elements of a slice."""
        return self.units * self.run

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.k * self.slices

    @property
    def share(self) -> int:
        """Slices of a basis; the last one may have fewer."""
        return -(-self.slices // self.bases)

    def view(self, flat: Tensor) -> Tensor:
        """``[slices, units, run]``, where it lies."""
        piece = flat[self.at : self.at + self.numel]
        return piece.view(self.units, self.slices, self.run).transpose(0, 1)


@dataclass(frozen=True)
class Known:
    """All matrices of a flat buffer. Coefficients follow one another, ``[slices, dims]`` of each."""

    each: tuple[Sliced, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Coefficients of each."""
        return [one.slices * one.dims for one in self.each]

    @cached_property
    def numel(self) -> int:
        """Coefficients of all."""
        return sum(self.sizes)

    @cached_property
    def end(self) -> int:
        """Up to where the flat buffer is touched."""
        return max((one.at + one.numel for one in self.each), default=0)

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """Matrix, basis and first slice of each run of slices that share a basis."""
        return [
            (i, basis, basis * one.share)
            for i, one in enumerate(self.each)
            for basis in range(one.bases)
            if basis * one.share < one.slices
        ]

    @cached_property
    def _table(self) -> Tensor:
        """What C reads: at, units, slices, run, first, count, dims, where coefficients begin, most."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.each))]
        lines = []
        for i, _, first in self._groups:
            one, count = self.each[i], min(self.each[i].share, self.each[i].slices - first)
            place = (one.at, one.units, one.slices, one.run, first, count, one.dims)
            lines.append((*place, starts[i] + first * one.dims, one.most))
        return torch.tensor(lines, dtype=torch.int64).reshape(-1, LINE_BYTES // 8)

    @cached_property
    def pieces(self) -> Tensor:
        """Where the matrices lie, and how many elements they have."""
        return torch.tensor([(one.at, one.numel) for one in self.each], dtype=torch.int64).reshape(-1, 2)

    @cached_property
    def runs(self) -> Tensor:
        """The same of their coefficients."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return torch.tensor([*zip(starts, self.sizes, strict=True)], dtype=torch.int64).reshape(-1, 2)

    def lines(self) -> tuple[int, int]:
        """Where the table lies, and how many lines it has."""
        return lines_of(self._table, LINE_BYTES)

    def addresses(self, tensors: Sequence[Tensor], of_basis: bool) -> array[int]:
        """Where the basis (bfloat16), or the offsets (float32), of each line begin."""
        begins = [one.data_ptr() for one in tensors]
        steps = [2 * one.most * one.k if of_basis else 4 * one.most * one.share for one in self.each]
        return array("Q", [begins[i] + steps[i] * basis for i, basis, _ in self._groups])


def project_slices(x: Tensor, bases: Sequence[Tensor], offsets: Sequence[Tensor], known: Known) -> Tensor:
    """``U^T g - offset`` of each slice g: the coefficients of all, from the flat buffer ``x``.

    ``offsets`` are ``[slices, most]``.
    """
    _check(x, known, bases, offsets)
    if not _served(x, bases):
        parts = [
            torch.bmm(_shared(one.view(x).reshape(one.slices, one.k), one), _used(basis, one).mT)
            for one, basis in zip(known.each, bases, strict=True)
        ]
        return torch.cat(
            [
                (part.flatten(0, 1)[: one.slices] - offset[:, : one.dims]).reshape(-1)
                for part, offset, one in zip(parts, offsets, known.each, strict=True)
            ]
            or [x[:0]]
        )
    from distcomp.kernels import _cpu

    out = torch.empty(known.numel, dtype=torch.float32)
    of_bases, of_offsets = known.addresses(bases, True), known.addresses(offsets, False)
    at = of_bases.buffer_info()[0], of_offsets.buffer_info()[0]
    _cpu.subspace_project(x.data_ptr(), 0, out.data_ptr(), *known.lines(), *at, (x.numel(), out.numel()))
    return out


def restore(coefficients: Tensor, bases: Sequence[Tensor], mean: Tensor, out: Tensor, known: Known) -> None:
    """``U c + mean`` of each slice, to where its elements lie in ``out``; ``mean`` lies as ``out`` does."""
    _check(out, known, bases)
    check_tensor("means", mean, torch.float32, known.end)
    check_tensor("coefficients", coefficients, torch.float32, known.numel)
    if not _served(out, bases):
        parts = torch.split(coefficients[: known.numel], known.sizes)
        for one, basis, part in zip(known.each, bases, parts, strict=True):
            shared = _shared(part.view(one.slices, one.dims), one)
            made = (_in_order if _rounded(basis) else torch.bmm)(shared, _used(basis, one))
            own = made.flatten(0, 1)[: one.slices].view(one.slices, one.units, one.run)
            one.view(out).copy_(own + one.view(mean))
        return
    from distcomp.kernels import _cpu

    of_bases = known.addresses(bases, True)
    tensors = coefficients.data_ptr(), mean.data_ptr(), out.data_ptr()
    sizes = out.numel(), coefficients.numel()
    _cpu.subspace_restore(*tensors, *known.lines(), of_bases.buffer_info()[0], 0, sizes)


def squared_distances(x: Tensor, mean: Tensor, pieces: Tensor) -> Tensor:
    """``|x|^2`` and ``|x - mean|^2`` of each piece, ``(at, numel)``: float64 ``[pieces, 2]`` on the CPU."""
    check_tensor("means", mean, torch.float32, x.numel())
    if not _served(x):
        each = [
            torch.stack([torch.linalg.vector_norm(one) for one in (own, own - mean[at : at + numel])])
            for at, numel in pieces.tolist()
            for own in [x[at : at + numel]]
        ]
        return torch.stack(each).cpu().double().square()
    from distcomp.kernels import _cpu

    out = torch.empty(len(pieces), 2, dtype=torch.float64)
    table = lines_of(pieces, PIECE_BYTES)
    _cpu.squares(x.data_ptr(), mean.data_ptr(), out.data_ptr(), *table, x.numel())
    return out


def _served(x: Tensor, bases: Sequence[Tensor] = ()) -> bool:
    rounded = all(basis.dtype == torch.bfloat16 for basis in bases)
    return rounded and served_by_c(x)


def _check(x: Tensor, known: Known, bases: Sequence[Tensor], offsets: Sequence[Tensor] = ()) -> None:
    check_tensor("values", x, torch.float32, known.end)
    for one, basis in zip(known.each, bases, strict=True):
        if basis.shape != (one.bases, one.most, one.k) or one.dims > one.most:
            raise DistcompError(
                f"bases are {tuple(basis.shape)} where {(one.bases, one.most, one.k)} is due; they are of "
                "another layout"
            )
        wanted = basis.dtype if basis.dtype in (torch.float32, torch.bfloat16) else torch.bfloat16
        check_tensor("bases", basis, wanted, basis.numel())
    for one, offset in zip(known.each, offsets, strict=False):
        check_tensor("offsets", offset, torch.float32, one.slices * one.most)


def _shared(rows: Tensor, one: Sliced) -> Tensor:
    """``[slices, ...]`` as ``[B, share, ...]``: rows that share a basis together, zeros after the last."""
    missing = one.bases * one.share - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows.view(one.bases, one.share, -1)


def _used(basis: Tensor, one: Sliced) -> Tensor:
    return basis[:, : one.dims].float()


def _rounded(basis: Tensor) -> bool:
    """Whether C would serve it."""
    return basis.device.type == "cpu" and basis.dtype == torch.bfloat16


def _in_order(c: Tensor, basis: Tensor) -> Tensor:
    """``[B, share, dims]`` times ``[B, dims, K]``, in C's order and without a fused addition: a rank that
    lacks the extension must get the same bits."""
    out = c.new_zeros(c.shape[0], c.shape[1], basis.shape[2])
    for row in range(c.shape[2]):
        out += c[:, :, row : row + 1] * basis[:, row : row + 1]
    return out
