"""Rows of a flat buffer: which of each row's elements are the largest, and how their places are written.

What :mod:`distcomp.compressors.sparse` does to one row in torch, C does to all in one call; a
:class:`RowTable` says where each row lies. :func:`serves` tells whether C can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distcomp.kernels.tables import check_tensor, lines_of

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


def top(x: Tensor, table: RowTable, places: Tensor) -> None:
    """Write into ``places`` (int64) where the ``count`` largest magnitudes of each row are in ``x``
    (float32), rising; of equal ones the lower. Raises ValueError for a row that lies outside either."""
    check_tensor("values", x, torch.float32, table.ends[0])
    check_tensor("places", places, torch.int64, table.ends[1])
    from distcomp.kernels import _cpu, cpu

    x_at, places_at, sizes = x.data_ptr(), places.data_ptr(), (x.numel(), places.numel())
    at, rows = lines_of(table.lines, LINE_BYTES)

    def run(start: int, count: int) -> None:
        _cpu.top_rows(x_at, places_at, sizes, at + LINE_BYTES * start, count)

    cpu.shared(run, rows, 1, 4 * x.numel() // max(1, rows))


def write_indices(places: Tensor, table: RowTable, codes: Tensor) -> None:
    """Write each row's places as its bytes (uint8). Raises ValueError for a place that is not its row's."""
    from distcomp.kernels import _cpu

    _cpu.write_rows(*_coded(places, table, codes))


def read_indices(codes: Tensor, table: RowTable, places: Tensor) -> None:
    """Read back what :func:`write_indices` wrote. Other bytes give places of their row, too."""
    from distcomp.kernels import _cpu

    _cpu.read_rows(*_coded(places, table, codes))


def _coded(places: Tensor, table: RowTable, codes: Tensor) -> tuple[int, int, tuple[int, int], int, int]:
    """What C is told of places and their bytes."""
    check_tensor("places", places, torch.int64, table.ends[1])
    check_tensor("codes", codes, torch.uint8, table.code_bytes)
    sizes = places.numel(), codes.numel()
    return places.data_ptr(), codes.data_ptr(), sizes, *lines_of(table.lines, LINE_BYTES)
