"""What floats of 4 and 8 bits have in common: how a number is rounded, how a block is rotated, what is
proved."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor
from distcomp.compressors.grid import keys_of_signs
from distcomp.errors import DistcompError
from distcomp.kernels import minifloat as kernel
from distcomp.kernels.minifloat import Minifloat, Scales, Spans
from distcomp.kernels.rotation import SIDE
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@dataclass(frozen=True)
class BlockFloat(Compressor):
    """What the formats have in common. A subclass says which numbers, which block and which scales."""

    rounding: str = "stochastic"
    hadamard: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ("stochastic", "nearest"):
            raise DistcompError(f"a value is rounded stochastic or nearest, not {self.rounding!r}")

    @property
    @abstractmethod
    def kind(self) -> Minifloat:
        """The numbers."""

    @property
    @abstractmethod
    def span(self) -> int:
        """Values that share a scale."""

    @property
    def grid(self) -> int:
        """What a parameter may be cut at, as far as scales are concerned."""
        return self.span

    @abstractmethod
    def scale_parts(self, layout: Layout, rows: int) -> Parts:
        """The scales in a payload, of ``rows`` blocks."""

    @abstractmethod
    def scales(self, payload: Payload, layout: Layout) -> Scales:
        """The rule of the scales, and where in a payload they are."""

    @property
    def per(self) -> int:
        """Blocks of a group."""
        return 1

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.rounding == "stochastic"

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return math.lcm(self.grid, SIDE) if self.hadamard else self.grid

    def spans(self, layout: Layout) -> Spans:
        """Where the blocks of each parameter lie, and their codes."""
        what = (type(self), self.span, self.per, self.kind.width, self.hadamard)
        return layout.remember(what, lambda: self._laid_out(layout))

    def _laid_out(self, layout: Layout) -> Spans:
        places = [
            (at, param.numel, param.start) for param, at in zip(layout.slices, layout.offsets, strict=True)
        ]
        return Spans.of(places, self.span, self.kind.width, self.per, self.hadamard)

    def parts(self, layout: Layout) -> Parts:
        return layout.remember((self, "parts"), lambda: self._parts(layout))

    def _parts(self, layout: Layout) -> Parts:
        spans = self.spans(layout)
        # The signs of the rotation are new in every step: whoever decodes must be told which.
        seed = (Part("seed", torch.int64, 1),) if self.hadamard else ()
        codes = Part("codes", torch.uint8, spans.code_bytes)
        return (*seed, *self.scale_parts(layout, spans.rows), codes)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload, spans = Payload.empty(self.parts(layout), x.device), self.spans(layout)
        if self.hadamard:
            bits = key.fold("rotate").bits
            payload["seed"].fill_(bits - 2**64 if bits >= 2**63 else bits)
        keys = key.fold_each(layout.names) if self.rounding == "stochastic" else []
        kernel.encode(
            x.contiguous(), payload["codes"], spans, self.kind, self.scales(payload, layout), keys,
            self._signs(payload, layout),
        )  # fmt: skip
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        self._decode(out, payload, layout, int(add))

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        self._decode(out, payload, layout, -1)

    def _decode(self, out: Tensor, payload: Payload, layout: Layout, sign: int) -> None:
        kernel.decode(
            payload["codes"], out, self.spans(layout), self.kind, self.scales(payload, layout), sign,
            self._signs(payload, layout),
        )  # fmt: skip

    def _signs(self, payload: Payload, layout: Layout) -> Tensor | None:
        """What the signs of each parameter's rotation are drawn by: the seed that was sent, and its name."""
        return keys_of_signs(layout, payload["seed"]) if self.hadamard else None


# ------------------------------------------------------------------------------------------------- the bounds


def rounding_variance(kind: Minifloat, length: int, least: float) -> float:
    """The largest ``E|C(v)-v|^2 / |v|^2`` of unbiased rounding of a block of which the largest magnitude is
    ``least`` or more, in units of ``kind``::

        ((r - 1) + sqrt((1 + r)^2 + (B - 1) l^2)) / 2,    r = 4^-m / (4 (1 + 2^-m)),    l = smallest / least

    with m bits behind the point. Proof. From the smallest exponent on, two neighbours a < b are at most a
    factor of ``1 + 2^-m`` apart and v between them has a variance of at most ``(b-a)^2 / (4ab) v^2 <= r
    v^2``. Below it they are a distance of l apart (the largest magnitude being 1), and for any ``w >= r`` the
    variance is at most ``w v^2 + l^2 / (4 (1 + w))``, as in
    :func:`~distcomp.compressors.quantize.worst_variance`. The largest has ``r`` at most, so that the sum is
    at most w times the sum of squares where ``(B-1) l^2 / (4 (1 + w)) = w - r``.
    """
    relative = 4.0**-kind.mantissa / (4 * (1 + 2.0**-kind.mantissa))
    step = kind.smallest / least
    return ((relative - 1) + math.sqrt((1 + relative) ** 2 + (length - 1) * step**2)) / 2


def nearest_error(kind: Minifloat, length: int, least: float, most: float) -> float:
    """The largest ``|C(v)-v|^2 / |v|^2`` of rounding to the nearest: ``(r + t) / (1 + t)`` for
    ``t = (B - 1) l^2 / 4`` and r the largest of a value by itself, which is from ``least`` to ``most`` if it
    is the block's largest.

    A value v below the smallest exponent errs by at most ``min(v, l/2)``, and for any ``w <= 1`` its square
    is at most ``w v^2 + (1 - w) l^2 / 4``.
    """
    half = 2.0 ** -(kind.mantissa + 1)
    clamped = max(0.0, 1 - kind.largest / most)
    relative = max(half / (1 + half), clamped) ** 2
    tail = (length - 1) * (kind.smallest / least) ** 2 / 4
    return (relative + tail) / (1 + tail)
