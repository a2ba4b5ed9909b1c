"""Scales of two levels: a float32 for each group of blocks, and an e4m3 for each block.

The functions named ``reference_*`` are the specification, in plain torch; ``_twolevel.c`` equals them bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distcomp.kernels.dispatch import backend
from distcomp.kernels.minifloat import E2M1, E4M3
from distcomp.kernels.tables import check_tensor

SMALLEST = 2.0**-6
"""The smallest scale of a block, e4m3's smallest normal number."""


@dataclass(frozen=True)
class BlockGroups:
    """Blocks of several parameters, ``per`` of one parameter to a group, the last of each parameter with
    fewer."""

    blocks: tuple[int, ...]
    per: int

    @property
    def rows(self) -> int:
        """How many blocks."""
        return sum(self.blocks)

    @cached_property
    def count(self) -> int:
        """How many groups."""
        return sum(-(-blocks // self.per) for blocks in self.blocks)

    @cached_property
    def table(self) -> Tensor:
        """What C reads: int64, the blocks of each parameter."""
        return torch.tensor(self.blocks, dtype=torch.int64)

    def numbers(self, device: torch.device) -> Tensor:
        """int64 ``[rows]``: the group that each block is in."""
        numbers, first = [torch.empty(0, dtype=torch.int64)], 0
        for blocks in self.blocks:
            numbers.append(torch.arange(blocks) // self.per + first)
            first += -(-blocks // self.per)
        return torch.cat(numbers).to(device)


def write_scales(
    maxima: Tensor, scales: Tensor, codes: Tensor, groups: BlockGroups, least: float, up: bool
) -> Tensor:
    """Write both levels from the largest magnitude of each block, and return what values are multiplied by.

    ::

        S = max / (448 * 6)         of a group, 0 below ``least``
        s = e4m3(max / 6 / S)       of a block, from 2^-6 to 448

    Args:
        maxima: float32 ``[groups.rows]``, none negative.
        scales: float32 ``[groups.count]``, written.
        codes: uint8 ``[groups.rows]``, written: s as e4m3.
        up: round s up, not to the nearest.

    Returns:
        float32 ``[groups.rows]``: ``1 / (S s)``; 0 in a group that is 0, infinite or NaN.
    """
    _check(scales, codes, groups)
    check_tensor("maxima", maxima, torch.float32, groups.rows)
    if not _served(maxima):
        return reference_write_scales(maxima, scales, codes, groups, least, up)
    from distcomp.kernels import _cpu

    inverses, constants = torch.empty_like(maxima), (E4M3.largest * E2M1.largest, E2M1.largest, least)
    _cpu.two_level_scales(
        maxima.data_ptr(), scales.data_ptr(), codes.data_ptr(), inverses.data_ptr(),
        (len(maxima), len(scales)), *_lines(groups), constants, up,
    )  # fmt: skip
    return inverses


def units(scales: Tensor, codes: Tensor, groups: BlockGroups) -> Tensor:
    """``S s`` of each block (float32)."""
    _check(scales, codes, groups)
    if not _served(codes):
        return reference_units(scales, codes, groups)
    from distcomp.kernels import _cpu

    found = torch.empty(groups.rows, dtype=torch.float32)
    sizes = len(codes), len(scales)
    _cpu.two_level_units(scales.data_ptr(), codes.data_ptr(), found.data_ptr(), sizes, *_lines(groups))
    return found


def reference_write_scales(
    maxima: Tensor, scales: Tensor, codes: Tensor, groups: BlockGroups, least: float, up: bool
) -> Tensor:
    """See :func:`write_scales`."""
    group = groups.numbers(maxima.device)
    largest = torch.zeros(len(scales), dtype=torch.int32, device=maxima.device)
    # As integers: the order in which a scatter comes by changes nothing, and a NaN is the largest.
    largest = largest.scatter_reduce(0, group, maxima.view(torch.int32), "amax").view(torch.float32)
    largest = torch.where(largest < least, 0.0, largest)
    outer = scales.copy_(largest / torch.full_like(largest, E4M3.largest * E2M1.largest))
    given = torch.where(outer > 0, outer, 1.0)
    ratio = (maxima / torch.full_like(maxima, E2M1.largest) / given[group]).clamp(SMALLEST, E4M3.largest)
    inner = ratio.to(torch.float8_e4m3fn)
    if up:
        inner = (inner.view(torch.uint8) + (inner.float() < ratio).to(torch.uint8)).view(torch.float8_e4m3fn)
    codes.copy_(inner.view(torch.uint8))
    usable = (outer > 0) & outer.isfinite()
    return torch.where(usable[group], (1 / given)[group] / inner.float(), 0.0)


def reference_units(scales: Tensor, codes: Tensor, groups: BlockGroups) -> Tensor:
    """See :func:`units`."""
    return scales[groups.numbers(scales.device)] * codes.view(torch.float8_e4m3fn).float()


def _check(scales: Tensor, codes: Tensor, groups: BlockGroups) -> None:
    check_tensor("scales", scales, torch.float32, groups.count)
    check_tensor("codes", codes, torch.uint8, groups.rows)


def _served(x: Tensor) -> bool:
    return x.device.type == "cpu" and backend("cpu") == "cpu"


def _lines(groups: BlockGroups) -> tuple[int, int, int]:
    return groups.table.data_ptr(), len(groups.blocks), groups.per
