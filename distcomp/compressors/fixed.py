"""An absolute grid: the error does not depend on the size of what is sent, and the number of bits does."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor, register_compressor
from distcomp.errors import DistcompError
from distcomp.kernels import integers as kernel
from distcomp.kernels.integers import integer_bytes, pack_integers, unpack_integers
from distcomp.kernels.reference import round_at_random
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

__all__ = [
    "MOST_BITS",
    "FixedGrid",
    "FixedPoint",
    "GrowingGrid",
    "integer_bytes",
    "pack_integers",
    "unpack_integers",
]

MOST_BITS = 23
"""Integers of more bits than the significand of a float32 would hold no more information."""


@dataclass(frozen=True)
class FixedPoint:
    """The numbers ``k 2^-F`` of Q(I).(F): I bits before the point, the sign among them, F after it.

    ::

        k = clamp(round(x 2^F), -2^(I+F-1), 2^(I+F-1) - 1)

    ``round`` goes to the nearest multiple (ties to even) or, given random numbers, to one of the two around x
    with the right mean. What lies on the grid stays. NaN and infinities stay what they are: an overflow must
    not look like a number.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015, <IL, FL>.

    Raises DistcompError for a width outside 2..23 bits.
    """

    integer_bits: int
    fraction_bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= MOST_BITS or self.integer_bits > MOST_BITS or abs(self.fraction_bits) > 64:
            raise DistcompError(
                f"{self} has {self.bits} bits; fixed-point numbers have 2 to {MOST_BITS}, sign included, "
                "such as Q4.12"
            )

    @staticmethod
    def of(text: str | FixedPoint) -> FixedPoint:
        """The format that a text such as ``Q4.12`` names. Raises DistcompError for any other text."""
        if isinstance(text, FixedPoint):
            return text
        match = re.fullmatch(r"[Qq](-?\d+)\.(-?\d+)", text.strip())
        if match is None:
            raise DistcompError(
                f"{text!r} is no fixed-point format; write Q, the bits before the point (sign included), a "
                "point and the bits after it, such as Q4.12"
            )
        return FixedPoint(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"Q{self.integer_bits}.{self.fraction_bits}"

    @property
    def bits(self) -> int:
        """The whole width, sign included."""
        return self.integer_bits + self.fraction_bits

    @property
    def spacing(self) -> float:
        """The distance of neighbours: 2^-F."""
        return 2.0**-self.fraction_bits

    @property
    def half(self) -> int:
        """Integers below zero: 2^(I+F-1)."""
        return 1 << (self.bits - 1)

    def integers(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """k as float32, where ``x`` is finite: to the nearest, or at random by ``u`` in [0, 1)."""
        y = x * 2.0**self.fraction_bits  # a power of two moves the exponent alone: exact
        # Two's complement has one number more below zero than above.
        rounded = torch.round(y) if u is None else round_at_random(y, u)
        return rounded.clamp(-self.half, self.half - 1)

    def round(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """The number of the grid that stands for ``x``, of the type of ``x``."""
        return torch.where(x.isfinite(), self.integers(x, u) * self.spacing, x)


@register_compressor("fixed_grid")
@dataclass(frozen=True)
class FixedGrid(Compressor):
    """Round each value at random to a multiple of ``spacing`` next to it, sent in ``bits`` bits::

        C(x)_k = spacing * clamp(floor(x_k / spacing + u_k), -s, s),    s = 2^(bits-1) - 1,    u in [0, 1)

    The error of a value is below ``spacing`` and its variance at most ``spacing^2 / 4``, whatever the value,
    up to ``limit = spacing s``; a larger one is clamped. So there is neither an ``omega`` nor a ``delta``.
    On the wire: ``bits/8`` bytes per value; the payload is ``codes``, uint8
    (:func:`pack_integers`).

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015, for the rounding. We
    differ: the range is symmetric.

    Raises DistcompError for a spacing that is not positive or bits outside 2..23.
    """

    spacing: float = 1 / 64
    bits: int = 8

    def __post_init__(self) -> None:
        if not (self.spacing > 0 and 2 <= self.bits <= MOST_BITS):
            raise DistcompError(
                f"a grid has a positive spacing and 2 to {MOST_BITS} bits, not {self.spacing} and {self.bits}"
            )

    @property
    def levels(self) -> int:
        """Levels on either side of zero."""
        return (1 << (self.bits - 1)) - 1

    @property
    def limit(self) -> float:
        """The largest magnitude that is not clamped."""
        return self.spacing * self.levels

    def parts(self, layout: Layout) -> Parts:
        return (Part("codes", torch.uint8, integer_bytes(layout.numel, self.bits)),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        lines = layout.remember((FixedGrid, "lines"), lambda: _lines(layout))
        # As many levels on either side, unlike two's complement: C(-x) is distributed as -C(x).
        keys = key.fold_each(layout.names)
        kernel.grid_encode(x.contiguous(), payload["codes"], lines, keys, self.spacing, self.bits)
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        kernel.grid_decode(payload["codes"], out, self.spacing, self.bits, int(add))

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        kernel.grid_decode(payload["codes"], out, self.spacing, self.bits, -1)


def _lines(layout: Layout) -> Tensor:
    """Where each parameter's piece lies, and which of its elements comes first."""
    places = zip(layout.offsets, layout.slices, strict=True)
    return kernel.grid_lines([(at, param.numel, param.start) for at, param in places])


@dataclass(frozen=True)
class GrowingGrid:
    """A grid whose integers grow by a bit whenever the number of exchanges doubles: so does what ECD sends.

    At exchange *t* a value has ``bits + ceil(log2 t)`` bits: every rank knows every payload's size.
    ``spacing``: of all parameters; None takes it from the models, a 1024th of a typical weight of each
    parameter (:func:`distcomp.compressors.anchored.spacing_of`).

    Raises DistcompError for a spacing that is not positive or bits outside 2..23.
    """

    spacing: float | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        FixedGrid(1.0 if self.spacing is None else self.spacing, self.bits)

    def bits_at(self, exchange: int) -> int:
        """Bits of a value at the exchange number ``exchange``, counted from 1."""
        return min(MOST_BITS, self.bits + math.ceil(math.log2(exchange)))
