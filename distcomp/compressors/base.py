"""How one tensor becomes few bytes and comes back: alone, without any network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distcomp.layout import Layout
from distcomp.payload import Parts, Payload, wire_bytes
from distcomp.randomness import Key


class Compressor(ABC):
    """A local, pure pair of functions: ``encode`` a flat buffer into a payload, ``decode`` it back.

    Subclasses are frozen dataclasses: their fields are their settings, and their ``repr`` is what ranks
    compare when they are attached. All numbers are float32 inside; a caller converts before and after.
    """

    summable: bool = False
    """Whether payloads may be added on the wire. They then hold one part, and the sum decodes to the sum."""

    unbiased: bool = False
    """Whether ``E[decode(encode(x))] = x``."""

    largest: float = math.inf
    """The largest value that the type on the wire holds, where that is less than float32's."""

    alignment: int = 1
    """A layout may be cut at multiples of this many elements of a parameter without changing any value."""

    @abstractmethod
    def parts(self, layout: Layout) -> Parts:
        """What a payload for this layout holds. Depends on nothing but the layout: equal on every rank."""

    @abstractmethod
    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        """Compress a flat buffer (float32, ``[layout.numel]``)."""

    @abstractmethod
    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        """Write the decoded flat buffer into ``out``, or add it to what is there."""

    def decode(self, payload: Payload, layout: Layout) -> Tensor:
        """The decoded flat buffer (float32, ``[layout.numel]``)."""
        out = torch.empty(layout.numel, dtype=torch.float32, device=payload.wire.device)
        self.decode_into(out, payload, layout)
        return out

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        """Subtract the decoded flat buffer from ``out``: what error feedback keeps."""
        out.sub_(self.decode(payload, layout))

    def wire_bytes(self, layout: Layout) -> int:
        """Bytes of one payload, header included, known before anything is encoded."""
        return wire_bytes(self.parts(layout))

    def omega(self, numel: int) -> float | None:
        """A bound of the variance: ``E|C(x)-x|^2 <= omega |x|^2``, for unbiased compressors; None if not
        unbiased."""
        return None

    def delta(self, numel: int) -> float | None:
        """A contraction: ``E|C(x)-x|^2 <= (1-delta) |x|^2`` with delta > 0; None where there is none."""
        omega = self.omega(numel)
        return 1 - omega if omega is not None and omega < 1 else None
