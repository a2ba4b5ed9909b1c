"""What the scale of a block is: given, a power of two, a float32, or of two levels.

Each rule holds the tensors of a payload that scales are written to and read from. What is said here in plain
torch is the specification; ``_scales.h`` (CPU) equals it bit for bit, within the passes of
:mod:`distcomp.kernels.minifloat`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.kernels.minifloat import E4M3, Minifloat, Spans
from distcomp.kernels.tables import check_tensor

FACTORS, POWERS, FLOATS, TWO_LEVELS = range(4)  # as in _scales.h
MANTISSA, INFINITY = 0x7FFFFF, 0x7F800000
"""Of a float32: the bits behind the point, and an infinity's; a NaN's are above these."""
SMALLEST = 2.0**-6
"""The smallest scale of a block within a group, e4m3's smallest normal number."""


@dataclass(frozen=True)
class ScaleRule:
    """What rules have in common that know no groups."""

    blocks: Tensor

    @property
    def groups(self) -> Tensor | None:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        return None


@dataclass(frozen=True)
class GivenScales(ScaleRule):
    """float32 of each block, which is what values are multiplied by when they are encoded, and numbers when
    they are decoded."""

    @property
    def for_c(self) -> tuple[int, float, bool]:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        return FACTORS, 0.0, False

    def check(self, spans: Spans) -> None:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        check_tensor("factors", self.blocks, torch.float32, spans.rows)

    def write(self, maxima: Tensor, spans: Spans, kind: Minifloat) -> Tensor:
        """They are written already."""
        return self.blocks

    def units(self, spans: Spans) -> Tensor:
        """They themselves."""
        return self.blocks


@dataclass(frozen=True)
class PowerScales(ScaleRule):
    """The exponent of a power of two (uint8, plus 127; 255 of an infinity or NaN, and never below 1).

    ``up``: the smallest scale that clamps nothing, else the one that brings the largest magnitude into the
    binade of the largest number.
    """

    up: bool

    @property
    def for_c(self) -> tuple[int, float, bool]:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        return POWERS, 0.0, self.up

    def check(self, spans: Spans) -> None:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        check_tensor("scales", self.blocks, torch.uint8, spans.rows)

    def write(self, maxima: Tensor, spans: Spans, kind: Minifloat) -> Tensor:
        """Return one over the scale, 0 of an infinity or NaN."""
        # From which mantissa on the next power is taken.
        highest = _mantissa_of(kind.largest) if self.up else MANTISSA
        bits = maxima.view(torch.int32)
        code = (bits >> 23) - kind.largest_exponent + ((bits & MANTISSA) > highest).to(torch.int32)
        # 2^-127 is subnormal, and its reciprocal is near the end of the range: nothing is lost without it.
        code = code.clamp_(min=1)
        self.blocks.copy_(torch.where(bits >= INFINITY, 255, code))
        inverses = ((254 - code) << 23).view(torch.float32)
        return torch.where(bits >= INFINITY, 0.0, inverses)

    def units(self, spans: Spans) -> Tensor:
        """The powers; NaN of 255."""
        code = self.blocks.to(torch.int32)
        return torch.where(code == 255, math.nan, (code << 23).view(torch.float32))


@dataclass(frozen=True)
class FloatScales(ScaleRule):
    """The largest magnitude over the largest number, a float32; 0 of a block below ``least``."""

    least: float

    @property
    def for_c(self) -> tuple[int, float, bool]:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        return FLOATS, self.least, False

    def check(self, spans: Spans) -> None:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        check_tensor("scales", self.blocks, torch.float32, spans.rows)

    def write(self, maxima: Tensor, spans: Spans, kind: Minifloat) -> Tensor:
        """Return one over the scale, 0 of a block that is 0, infinite or NaN."""
        maxima = torch.where(maxima < self.least, 0.0, maxima)
        scales = self.blocks.copy_(maxima / torch.full_like(maxima, kind.largest))
        return torch.where(scales > 0, 1 / scales, 0.0)

    def units(self, spans: Spans) -> Tensor:
        """They themselves."""
        return self.blocks


@dataclass(frozen=True)
class TwoLevelScales:
    """A float32 for each group of blocks, and an e4m3 (uint8) for each block, L being the largest number::

    S = max / (448 L)         of a group, 0 below ``least``
    s = e4m3(max / L / S)     of a block, from 2^-6 to 448; rounded ``up``, or to the nearest
    """

    blocks: Tensor
    groups: Tensor
    least: float
    up: bool

    @property
    def for_c(self) -> tuple[int, float, bool]:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        return TWO_LEVELS, self.least, self.up

    def check(self, spans: Spans) -> None:
        """See :class:`~distcomp.kernels.minifloat.Scales`."""
        check_tensor("scales", self.groups, torch.float32, spans.groups)
        check_tensor("scales of blocks", self.blocks, torch.uint8, spans.rows)

    def write(self, maxima: Tensor, spans: Spans, kind: Minifloat) -> Tensor:
        """Return ``1 / (S s)``; 0 in a group that is 0, infinite or NaN."""
        group = spans.groups_of_blocks(maxima.device)
        largest = torch.zeros(self.groups.numel(), dtype=torch.int32, device=maxima.device)
        # As integers: the order in which a scatter comes by changes nothing, and a NaN is the largest.
        largest = largest.scatter_reduce(0, group, maxima.view(torch.int32), "amax").view(torch.float32)
        largest = torch.where(largest < self.least, 0.0, largest)
        outer = self.groups.copy_(largest / torch.full_like(largest, E4M3.largest * kind.largest))
        given = torch.where(outer > 0, outer, 1.0)
        ratio = (maxima / torch.full_like(maxima, kind.largest) / given[group]).clamp(SMALLEST, E4M3.largest)
        inner = ratio.to(torch.float8_e4m3fn)
        if self.up:
            below = (inner.float() < ratio).to(torch.uint8)
            inner = (inner.view(torch.uint8) + below).view(torch.float8_e4m3fn)
        self.blocks.copy_(inner.view(torch.uint8))
        usable = (outer > 0) & outer.isfinite()
        return torch.where(usable[group], (1 / given)[group] / inner.float(), 0.0)

    def units(self, spans: Spans) -> Tensor:
        """``S s`` of each block."""
        inner = self.blocks.view(torch.float8_e4m3fn).float()
        return self.groups[spans.groups_of_blocks(inner.device)] * inner


def _mantissa_of(x: float) -> int:
    """The bits of a float32 behind its point."""
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32)) & MANTISSA
