"""Rows of a flat buffer: which of each row's elements are the largest, and how their places are written.

What :mod:`distcomp.compressors.sparse` does to one row in torch, C does to all in one call; a
:class:`RowTable` says where each row lies. :func:`serves` tells whether C can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import backend

BITMAP, NOTHING = -1, -2
"""The widths of rows whose places are sent as a bitmap, or not at all (every element is sent)."""
LINE_BYTES = 48


@dataclass(frozen=True, eq=False)
class RowTable:
    """int64 ``[rows, 6]``: start in the flat buffer, length, count, first place, first code byte, width."""

    lines: Tensor
    code_bytes: int

    @cached_property
    def ends(self) -> tuple[int, int]:
        """Up to where values are read, and how many places there are."""
        if not len(self.lines):
            return 0, 0
        start, length, count, place, *_ = self.lines.unbind(1)
        return int((start + length).max()), int((place + count).max())

    @cached_property
    def longest(self) -> int:
        return int(self.lines[:, 1].max()) if len(self.lines) else 0


def serves(device: torch.device) -> bool:
    """Whether the C extension serves tensors on this device."""
    return device.type == "cpu" and backend("cpu") == "cpu"


def top(x: Tensor, table: RowTable, places: Tensor) -> None:
    """Write into ``places`` (int64) where the ``count`` largest magnitudes of each row are in ``x``
    (float32), rising; of equal ones the lower."""
    _check("values", x, torch.float32, table.ends[0])
    _check("places", places, torch.int64, table.ends[1])
    from distcomp.kernels import _cpu, cpu

    x_at, at, places_at, longest = x.data_ptr(), table.lines.data_ptr(), places.data_ptr(), table.longest

    def run(start: int, count: int) -> None:
        _cpu.top_rows(x_at, at + LINE_BYTES * start, count, places_at, longest)

    cpu.shared(run, len(table.lines), 1, 4 * x.numel() // max(1, len(table.lines)))


def write_indices(places: Tensor, table: RowTable, codes: Tensor) -> None:
    """Write each row's places as its bytes (uint8)."""
    _check("places", places, torch.int64, table.ends[1])
    _check("codes", codes, torch.uint8, table.code_bytes)
    from distcomp.kernels import _cpu

    lines = table.lines
    _cpu.write_rows(places.data_ptr(), lines.data_ptr(), len(lines), codes.data_ptr())


def read_indices(codes: Tensor, table: RowTable, places: Tensor) -> None:
    """Read back what :func:`write_indices` wrote. Other bytes give places of their row, too."""
    _check("codes", codes, torch.uint8, table.code_bytes)
    _check("places", places, torch.int64, table.ends[1])
    from distcomp.kernels import _cpu

    lines = table.lines
    _cpu.read_rows(codes.data_ptr(), lines.data_ptr(), len(lines), places.data_ptr())


def _check(what: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    if not tensor.is_contiguous() or tensor.dtype != dtype or tensor.numel() < numel:
        raise DistcompError(
            f"the {what} have {tensor.numel()} elements of {tensor.dtype} where {numel} of {dtype} are "
            "needed; pass a contiguous tensor of that size"
        )
