"""Two means for each unit of a weight: of what is not negative, and of what is; and which value is which.

Torch says it here, C does it in one pass over the buffer (``_twomeans.c``), bit for bit alike: signs are
packed while what was added up lies in the cache. Units are the rows of a parameter; a piece of a parameter
may begin and end within one. Signs are packed in blocks of :data:`SIGNS` of the whole buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.packing import packed_bytes
from distcomp.kernels.reference import lane_sum
from distcomp.kernels.tables import check_tensor, lines_of

SIGNS = 4096
"""Signs are packed in blocks of this many; eight to a byte, whatever the block."""
CHUNK = 4096
"""Elements of a unit that are added in lanes; the sums of chunks are added one after the other."""
LINE_BYTES = 48


@dataclass(frozen=True)
class UnitRows:
    """``numel`` values at ``at`` of a flat buffer, in ``units`` of ``length`` of which the first lacks its
    first ``before``; the means of what is not negative begin at ``scale``, the others follow them."""

    at: int
    numel: int
    before: int
    length: int
    scale: int
    units: int


@dataclass(frozen=True)
class Units:
    """The units of a flat buffer of ``numel`` values."""

    lines: tuple[UnitRows, ...]
    numel: int

    @staticmethod
    def of(places: list[tuple[int, int, int, int]], numel: int) -> Units:
        """From ``(at, numel, first, length)`` of each piece, ``first`` being its place in its parameter."""
        lines, scale = [], 0
        for at, count, first, length in places:
            before = first % length
            units = (before + count - 1) // length + 1 if count else 0
            lines.append(UnitRows(at, count, before, length, scale, units))
            scale += 2 * units
        return Units(tuple(lines), numel)

    @cached_property
    def scale_count(self) -> int:
        return sum(2 * line.units for line in self.lines)

    @cached_property
    def table(self) -> Tensor:
        rows = [
            (one.at, one.numel, one.before, one.length, one.scale, one.units)
            for one in self.lines
            if one.numel
        ]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)

    def rows(self, x: Tensor) -> Iterator[tuple[Tensor, UnitRows]]:
        """The units of each piece as rows, where missing values are NaN."""
        for one in (line for line in self.lines if line.numel):
            after = one.units * one.length - one.before - one.numel
            piece = x[one.at : one.at + one.numel]
            padded = torch.nn.functional.pad(piece, (one.before, after), value=float("nan"))
            yield padded.view(one.units, one.length), one


def encode(x: Tensor, units: Units, codes: Tensor, scales: Tensor) -> None:
    """Write into ``codes`` (uint8) the bit ``x_j >= 0`` of each value (float32), in blocks of :data:`SIGNS`,
    and into ``scales`` (float32) the two means of each unit: 0 of no values.

    Sums are in float64. A NaN is neither negative nor not, and counts in neither; its bit is 0. Raises
    DistcompError for tensors of another type or size.
    """
    check_tensor("values", x, torch.float32, units.numel)
    check_tensor("codes", codes, torch.uint8, packed_bytes(x.numel(), SIGNS, 1))
    check_tensor("scales", scales, torch.float32, units.scale_count)
    if served_by_c(x):
        from distcomp.kernels import _cpu, cpu

        sizes = x.numel(), codes.numel(), scales.numel()
        at = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
        table = _table(units)
        cpu.shared(
            lambda start, count: _cpu.encode_two_means(*at, sizes, *table, start, count), x.numel(), SIGNS, 4
        )
        return
    ignored = torch.empty(-(-x.numel() // SIGNS), dtype=torch.float32, device=x.device)
    kernels.quantize(x, codes, ignored, block=SIGNS, bits=1)
    for rows, line in units.rows(x):
        both = scales[line.scale : line.scale + 2 * line.units].view(2, -1)
        for chosen, mean in ((rows >= 0, both[0]), (rows < 0, both[1])):
            total = _chunked_sum(torch.where(chosen, rows, 0.0).double() + 0.0)  # -0 + 0 is 0
            mean.copy_((total / chosen.sum(1).clamp(min=1)).float())


def put(codes: Tensor, units: Units, scales: Tensor, out: Tensor, sign: int) -> None:
    """Write into ``out`` (float32) the mean that each sign stands for: ``sign`` 0 overwrites, +1 adds, -1
    subtracts."""
    check_tensor("values", out, torch.float32, units.numel)
    check_tensor("codes", codes, torch.uint8, packed_bytes(units.numel, SIGNS, 1))
    check_tensor("scales", scales, torch.float32, units.scale_count)
    if served_by_c(out):
        from distcomp.kernels import _cpu

        sizes = units.numel, codes.numel(), scales.numel()  # of the signs' last block, too
        at = out.data_ptr(), codes.data_ptr(), scales.data_ptr()
        _cpu.put_two_means(*at, sizes, *_table(units), sign)
        return
    signs = torch.empty_like(out)
    ones = torch.ones(-(-out.numel() // SIGNS), dtype=torch.float32, device=out.device)
    kernels.dequantize(codes, ones, signs, block=SIGNS, bits=1)
    for line in units.lines:
        place = slice(line.at, line.at + line.numel)
        mean = scales[line.scale : line.scale + 2 * line.units].view(2, -1)
        each = mean.repeat_interleave(line.length, 1)[:, line.before : line.before + line.numel]
        value = torch.where(signs[place] >= 0, each[0], each[1])
        out[place] = out[place] + value if sign > 0 else out[place] - value if sign < 0 else value


def _chunked_sum(rows: Tensor) -> Tensor:
    """(rows, length) -> (rows,): chunks in lanes, then one chunk after the other."""
    count, length = rows.shape
    if length <= CHUNK:
        return lane_sum(rows)
    chunks = torch.nn.functional.pad(rows, (0, -length % CHUNK)).view(count, -1, CHUNK)
    sums = lane_sum(chunks.view(-1, CHUNK)).view(count, -1)
    total = sums[:, 0].clone()
    for i in range(1, sums.shape[1]):
        total += sums[:, i]
    return total


def _table(units: Units) -> tuple[int, int]:
    return lines_of(units.table, LINE_BYTES)
