"""Fixed-point numbers added as integers: exact, whatever the pattern, the transport and the order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Rounds
from distcomp.compressors.fixed import FixedPoint, integer_bytes, pack_integers, unpack_integers
from distcomp.compressors.grid import uniform_noise
from distcomp.errors import DistcompError
from distcomp.layout import Layout, chunk_views
from distcomp.methods.base import AggregateResult, Method, State, StepContext, all_reduce_bytes
from distcomp.methods.from_compressor import PATTERNS, REFERENCE_LAYOUT
from distcomp.methods.integers import WORD_BITS, sum_integers, word_count
from distcomp.methods.registry import register
from distcomp.payload import Part, Parts, Payload, wire_bytes

FLAG_BYTES = 4
"""Of the float that announces a NaN beside integers."""


@dataclass(frozen=True)
class FixedPointAllReduce(Method):
    """Round to a given grid once, then add integers: no range to agree on, no second rounding.

    ::

        k_i = clamp(round(x_i 2^F), -2^(b-1), 2^(b-1) - 1)        estimate = 2^-F (sum_i k_i) / n

    A gradient that lies on the grid already (``distcomp.precision.fixed_point`` leaves it there) is sent as
    it is. Every pattern gives the same bits, on every transport:

    * ``all_reduce``: fields of ``w = b + ceil(log2 n)`` bits, ``32 // w`` to a word that is added on the way;
    * ``reduce_scatter``: b bits to the owner of a chunk, who adds them, and w bits from there to all;
    * ``all_gather``: b bits to everyone;
    * ``auto``: the one that sends the fewest bytes.

    ``x``: float32 ``[layout.numel]``. On the wire, for formats of b bits: ``2 (n-1)/n 4 d / (32 // w)`` bytes
    by ``all_reduce``, ``(n-1)/n (b + w) d/8`` by ``reduce_scatter``, ``(n-1) b d/8`` by ``all_gather``.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015. We differ: the paper
    trains on one machine and sends nothing.

    Raises DistcompError for an unknown pattern, or where a sum passes 32 bits.
    """

    format: FixedPoint
    pattern: str = "auto"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise DistcompError(f"there is no pattern {self.pattern!r}; use one of {', '.join(PATTERNS)}")

    def width(self, size: int) -> int:
        """Bits of a sum of ``size`` integers. Two's complement: the lowest sum fits exactly."""
        wanted = self.format.bits + (size - 1).bit_length()
        if wanted > WORD_BITS:
            raise DistcompError(f"a sum of {self.format} over {size} ranks passes 32 bits; use fewer bits")
        return wanted

    def chosen(self, size: int) -> str:
        """The pattern at this world size, decided on a large tensor: buckets must not matter."""
        if self.pattern != "auto":
            return self.pattern
        return min(
            ("all_gather", "reduce_scatter", "all_reduce"),
            key=lambda pattern: self._bytes(pattern, REFERENCE_LAYOUT, size),
        )

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        u = uniform_noise(context.layout, context.private.fold("round"), x.device)
        # An int32 has no NaN: any integer will do, for the rank announces it (a flag, or a header).
        k = torch.nan_to_num(self.format.integers(x, u)).to(torch.int32)
        pattern = self.chosen(context.size)
        if pattern == "all_reduce":
            total = yield from self._around_the_ring(k, context)
        elif pattern == "all_gather":
            total = yield from self._to_everyone(k, context)
        else:
            total = yield from self._by_owners(k, context)
        spacing = self.format.spacing
        # In float64: a sum of up to 32 bits does not fit the 24 of a float32, and is rounded once.
        estimate = (total.double() * (spacing / context.size)).float()
        return AggregateResult(estimate, lambda: k.float() * spacing, state)

    def _around_the_ring(self, k: Tensor, context: StepContext) -> Rounds[Tensor]:
        # Integers cannot carry a NaN: one float beside them, which the channel turns to NaN, announces it.
        yield AllReduce(torch.zeros(1, device=k.device, dtype=torch.float32), kind="header")
        return (yield from sum_integers(k, self.width(context.size)))

    def _to_everyone(self, k: Tensor, context: StepContext) -> Rounds[Tensor]:
        payloads: list[Payload] = yield AllGather(_packed(k, self.format.bits))
        return _added(payloads, k.numel(), self.format.bits)

    def _by_owners(self, k: Tensor, context: StepContext) -> Rounds[Tensor]:
        bits, width = self.format.bits, self.width(context.size)
        chunks = context.layout.split(context.size, 1)
        received: list[Payload] = yield AllToAll(
            tuple(_packed(view, bits) for view in chunk_views(k, chunks))
        )
        mine = _added(received, chunks[context.rank].numel, bits)
        parts = tuple(_parts(chunk.numel, width) for chunk in chunks)
        answers: list[Payload] = yield AllGather(_packed(mine, width), parts=parts)
        sums = [_unpacked(answer, chunk.numel, width) for answer, chunk in zip(answers, chunks, strict=True)]
        return torch.cat(sums)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """By scatter the mean over the ranks: chunks differ by an element at most."""
        return self._bytes(self.chosen(size), layout, size)

    def _bytes(self, pattern: str, layout: Layout, size: int) -> int:
        bits, width = self.format.bits, self.width(size)
        if pattern == "all_reduce":
            flag = all_reduce_bytes(FLAG_BYTES, size)
            return flag + all_reduce_bytes(4 * word_count(layout.numel, width), size)
        if pattern == "all_gather":
            return (size - 1) * wire_bytes(_parts(layout.numel, bits))
        chunks = [chunk.numel for chunk in layout.split(size, 1)]
        both = sum(wire_bytes(_parts(numel, bits)) + wire_bytes(_parts(numel, width)) for numel in chunks)
        return round(both * (size - 1) / size)


def _parts(numel: int, bits: int) -> Parts:
    return (Part("codes", torch.uint8, integer_bytes(numel, bits)),)


def _packed(k: Tensor, bits: int) -> Payload:
    """Signed integers, as codes that begin at 0."""
    payload = Payload.empty(_parts(k.numel(), bits), k.device)
    payload["codes"].copy_(pack_integers(k.to(torch.int64) + (1 << (bits - 1)), bits))
    return payload


def _unpacked(payload: Payload, numel: int, bits: int) -> Tensor:
    return unpack_integers(payload["codes"], numel, bits) - (1 << (bits - 1))


def _added(payloads: list[Payload], numel: int, bits: int) -> Tensor:
    total = _unpacked(payloads[0], numel, bits)
    for payload in payloads[1:]:
        total += _unpacked(payload, numel, bits)
    return total


@register(
    paper="Gupta et al., Deep learning with limited numerical precision, ICML 2015",
    wire="(n-1)/n (2b + ceil(log2 n)) d/8, or (n-1) b d/8 where that is less, for formats of b bits",
    summable=False,
    biased=False,
    deviations="the paper trains on one machine: here the gradients that it keeps on a grid are "
    "added as integers; values beyond the range are clamped; biases and norms are on the grid, too",
    limitations="values beyond the format's range are clamped, and below its step only noise is left: "
    "gradients that shrink fall below it",
)
def fixed_point(format: str = "Q4.12", pattern: str = "auto") -> Method:
    """Send fixed-point numbers and add them as integers: the same bits in any order of addition.

    ``format`` is written as in :class:`distcomp.compressors.FixedPoint`; see :class:`FixedPointAllReduce` for
    the equation and ``pattern``.
    """
    return FixedPointAllReduce(FixedPoint.of(format), pattern)
