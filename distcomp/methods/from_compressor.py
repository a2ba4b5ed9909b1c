"""From a compressor to a method: choose how its payloads meet.

===================  ===========================================  ==========================================
pattern              what happens                                 bytes each rank sends, payload P, n ranks
===================  ===========================================  ==========================================
``all_reduce``       payloads are added on the wire               2 (n-1)/n P
``all_gather``       every rank decodes and adds all payloads     (n-1) P
``reduce_scatter``   the owner of a chunk decodes, adds, encodes  2 (n-1)/n P
===================  ===========================================  ==========================================

Sums of decoded payloads are added in rank order, so that every rank holds the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Rounds, once
from distcomp.compressors.base import Compressor
from distcomp.compressors.identity import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout, chunk_views
from distcomp.methods.base import AggregateResult, Method, State, StepContext, all_reduce_bytes
from distcomp.payload import Payload, body_bytes

PATTERNS = ("auto", "all_reduce", "all_gather", "reduce_scatter")

NOTHING = Layout(())

REFERENCE_LAYOUT = Layout.of([("yardstick", (1024, 1024))])
"""What the cost of two patterns is compared on."""


def from_compressor(compressor: Compressor, pattern: str = "auto") -> Method:
    """The method in which ``compressor``'s payloads meet by ``pattern``; ``auto`` is the cheapest legal one.

    Raises DistcompError where the pairing is illegal: payloads that cannot be added cannot ride an
    all-reduce.
    """
    if pattern not in PATTERNS:
        raise DistcompError(f"there is no pattern {pattern!r}; use one of {', '.join(PATTERNS)}")
    if pattern == "all_reduce" and not compressor.summable:
        raise DistcompError(
            f"payloads of {compressor} cannot be added on the wire; use pattern='all_gather' or "
            "'reduce_scatter'"
        )
    if pattern == "all_reduce" or (pattern == "auto" and compressor.summable):
        return AllReduceMean(compressor)
    if pattern == "all_gather":
        return AllGatherMean(compressor)
    if pattern == "reduce_scatter":
        return ReduceScatterMean(compressor)
    return Auto(compressor)


@dataclass(frozen=True)
class AllReduceMean(Method):
    """Summable payloads ride a plain all-reduce: ``estimate = decode(sum_i encode(x_i / n))``.

    We divide by n before encoding, so that a narrow type neither overflows nor rounds the sum a second time.
    Finite values beyond the n-th part of what the type holds are clamped to it (their sum would be an
    infinity); an infinity stays one.
    """

    compressor: Compressor

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.compressor.propagates_nonfinite

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        scaled = x * (1.0 / context.size)
        if isinstance(self.compressor, Identity):
            total = yield AllReduce(scaled)
            return AggregateResult(total, lambda: x, state)
        payload = self.compressor.encode(self._clamped(scaled, context.size), context.layout, context.shared)
        sent = self.compressor.decode(payload, context.layout)
        (part,) = payload.parts
        total = yield AllReduce(payload[part.kind], kind=part.kind)
        payload[part.kind].copy_(total)
        return AggregateResult(
            self.compressor.decode(payload, context.layout), lambda: sent * context.size, state
        )

    def _clamped(self, scaled: Tensor, size: int) -> Tensor:
        """The n-th part, less the rounding of n-1 additions in a type of 11 significant bits."""
        if self.compressor.largest == math.inf:
            return scaled
        limit = self.compressor.largest / size / (1 + (size - 1) * 2.0**-10)
        return torch.where(scaled.isinf(), scaled, scaled.clamp(-limit, limit))

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return all_reduce_bytes(body_bytes(self.compressor.parts(layout)), size)


@dataclass(frozen=True)
class AllGatherMean(Method):
    """Every rank sends its payload to all: ``estimate = 1/n sum_i decode(payload_i)``, added in rank order.

    ``contribution_i = decode(payload_i)``. On the wire: ``n-1`` payloads. Each rank decodes n of them.
    """

    compressor: Compressor

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        own = self.compressor.encode(x, context.layout, context.private.fold("gather"))
        payloads: list[Payload] = yield AllGather(own)
        about = (self.compressor, context.layout)
        estimate = once(payloads, about, lambda: mean_of(self.compressor, payloads, context.layout))
        return AggregateResult(
            estimate,
            lambda: self.compressor.decode(own, context.layout),
            state,
            lambda x: self.compressor.subtract_from(x, own, context.layout),
        )

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return (size - 1) * self.compressor.wire_bytes(layout)


@dataclass(frozen=True)
class ReduceScatterMean(Method):
    """Two stages: each rank owns a chunk, adds up what the others send of it, and sends the re-encoded mean
    to all.

    ::

        stage 1   c_ij = encode(chunk j of x_i), swapped all to all;  m_j = 1/n sum_i decode(c_ij)
        stage 2   a_j  = encode(m_j), gathered by all;                estimate = decode(a_0) .. decode(a_n-1)

    The second encoding errs too. Its error belongs to the owner of the chunk, whose contribution is
    ``decode(c_jj) + n (decode(a_j) - m_j)`` there: the law holds and error feedback loses nothing.
    """

    compressor: Compressor

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        c = self.compressor
        chunks = context.layout.split(context.size, c.alignment)
        mine = chunks[context.rank]

        key = context.private.fold("scatter")
        empty = cache(lambda: c.encode(x[:0], NOTHING, key))  # with more ranks than blocks, most chunks are
        sent = tuple(
            c.encode(view, chunk, key) if chunk.slices else empty()
            for view, chunk in zip(chunk_views(x, chunks), chunks, strict=True)
        )
        received: list[Payload] = yield AllToAll(sent)
        chunk_mean = mean_of(c, received, mine)

        # The shared key: the noise of a block must not depend on who owns it, for other buckets make other
        # owners.
        answer = c.encode(chunk_mean, mine, context.shared.fold("reduce"))
        answers: list[Payload] = yield AllGather(answer, parts=tuple(c.parts(chunk) for chunk in chunks))
        estimate = once(answers, (c, context.layout), lambda: _decoded(c, answers, chunks, x))

        def contribution() -> Tensor:
            given = _decoded(c, sent, chunks, x)
            own_estimate = chunk_views(estimate, chunks)[context.rank]
            chunk_views(given, chunks)[context.rank].add_(own_estimate - chunk_mean, alpha=context.size)
            return given

        def subtract_contribution_(x: Tensor) -> None:
            for view, chunk, payload in zip(chunk_views(x, chunks), chunks, sent, strict=True):
                c.subtract_from(view, payload, chunk)
            own_estimate = chunk_views(estimate, chunks)[context.rank]
            chunk_views(x, chunks)[context.rank].sub_(own_estimate - chunk_mean, alpha=context.size)

        return AggregateResult(estimate, contribution, state, subtract_contribution_)

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The mean over the ranks: chunks differ by a block at most."""
        sizes = [self.compressor.wire_bytes(chunk) for chunk in layout.split(size, self.compressor.alignment)]
        return round(2 * sum(sizes) * (size - 1) / size)


@dataclass(frozen=True)
class Auto(Method):
    """Gather-and-sum or scatter-reduce, whichever sends fewer bytes at this world size.

    Decided on a large tensor instead of the bucket at hand, because cutting the buckets otherwise must change
    no value.
    """

    compressor: Compressor

    def chosen(self, size: int) -> Method:
        gather, scatter = AllGatherMean(self.compressor), ReduceScatterMean(self.compressor)
        cheaper = gather.payload_bytes(REFERENCE_LAYOUT, size, 0) <= scatter.payload_bytes(
            REFERENCE_LAYOUT, size, 0
        )
        return gather if cheaper else scatter

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from self.chosen(context.size).aggregate(x, state, context))

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.chosen(size).payload_bytes(layout, size, step)


def _decoded(c: Compressor, payloads: Sequence[Payload], chunks: tuple[Layout, ...], like: Tensor) -> Tensor:
    """The flat buffer whose chunks the payloads decode to."""
    buffer = torch.empty_like(like)
    for view, chunk, payload in zip(chunk_views(buffer, chunks), chunks, payloads, strict=True):
        c.decode_into(view, payload, chunk)
    return buffer


def mean_of(compressor: Compressor, payloads: list[Payload], layout: Layout) -> Tensor:
    """The mean of what the payloads decode to, added in the order given."""
    out = torch.empty(layout.numel, dtype=torch.float32, device=payloads[0].wire.device)
    for index, payload in enumerate(payloads):
        compressor.decode_into(out, payload, layout, add=index > 0)
    return out.mul_(1.0 / len(payloads))
