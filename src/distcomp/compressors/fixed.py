"""An absolute grid: the error does not depend on the size of what is sent, and the number of bits does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor
from distcomp.compressors.grid import uniform
from distcomp.errors import DistcompError
from distcomp.kernels import reference
from distcomp.kernels.packing import block_bytes
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

MOST_BITS = 23
"""Integers of more bits than a float32 has would say nothing."""


@dataclass(frozen=True)
class FixedGrid(Compressor):
    """Round each value at random to a multiple of ``spacing`` next to it, sent in ``bits`` bits::

        C(x)_k = spacing * clamp(floor(x_k / spacing + u_k), -s, s),    s = 2^(bits-1) - 1,    u in [0, 1)

    The error of a value is below ``spacing`` and its variance at most ``spacing^2 / 4``, whatever the value,
    up to ``limit = spacing s``; a larger one is clamped. So there is neither an ``omega`` nor a ``delta``.
    On the wire: ``bits/8`` bytes per value.

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
        packed = block_bytes(layout.numel, self._packed)
        return (Part("codes", torch.uint8, self._wide(layout) + packed),)

    def _wide(self, layout: Layout) -> int:
        """Low bytes that lie before the packed bits: one per value where packing is too narrow for all."""
        return layout.numel if self.bits > 15 else 0

    @property
    def _packed(self) -> int:
        """Bits that are packed."""
        return self.bits - 8 if self.bits > 15 else self.bits

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        rounded = torch.floor(x / self.spacing + uniform(layout, key, x.device))
        codes = rounded.clamp_(-self.levels, self.levels).to(torch.int64) + self.levels
        if self.bits > 15:
            payload["codes"][: self._wide(layout)] = (codes & 255).to(torch.uint8)
            codes >>= 8
        packed = payload["codes"][self._wide(layout) :]
        packed.copy_(reference.pack(codes.view(1, -1), self._packed).view(-1))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        low, packed = payload["codes"].tensor_split([self._wide(layout)])
        codes = reference.unpack(packed.view(1, -1), layout.numel, self._packed).view(-1)
        if self.bits > 15:
            codes = (codes << 8) + low
        values = (codes - self.levels).float() * self.spacing
        if add:
            out += values
        else:
            out.copy_(values)


@dataclass(frozen=True)
class GrowingGrid:
    """A grid whose integers grow by a bit whenever the number of exchanges doubles: so does what ECD sends.

    At exchange *t* a value has ``bits + ceil(log2 t)`` bits: every rank knows every payload's size.
    """

    spacing: float = 1 / 64
    bits: int = 6

    def __post_init__(self) -> None:
        self.at(1)

    def at(self, exchange: int) -> FixedGrid:
        """The grid of the exchange number ``exchange``, counted from 1."""
        return FixedGrid(self.spacing, min(MOST_BITS, self.bits + math.ceil(math.log2(exchange))))
