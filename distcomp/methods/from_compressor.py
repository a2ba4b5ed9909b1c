"""From a compressor to a method: choose how its payloads meet.

===================  ===========================================  ==========================================
pattern              what happens                                 bytes each rank sends, payload P, n ranks
===================  ===========================================  ==========================================
``all_reduce``       payloads are added on the wire               2 (n-1)/n P
``all_gather``       every rank decodes and adds all payloads     (n-1) P
``reduce_scatter``   the owner of a chunk decodes, adds, encodes  (n-1)/n (P + P of the second stage)
===================  ===========================================  ==========================================

Sums of decoded payloads are added in rank order, so that every rank holds the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Rounds, once
from distcomp.compressors.base import Compressor
from distcomp.compressors.contraction import relative_error
from distcomp.compressors.identity import Identity
from distcomp.compressors.quantize import Quantize
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.layout import Layout, chunk_view, chunk_views
from distcomp.methods.base import AggregateResult, Method, State, StepContext, all_reduce_bytes
from distcomp.payload import Payload, body_bytes

PATTERNS = ("auto", "all_reduce", "all_gather", "reduce_scatter")
"""How payloads may meet."""

NOTHING = Layout(())
"""Of an empty chunk."""

REFERENCE_LAYOUT = Layout.of([("reference", (1024, 1024))])
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
    infinity); an infinity stays one. ``contribution_i = n decode(encode(x_i / n))``. On the wire:
    ``2 (n-1)/n`` of a payload, without its header. What a ring rounds on its way nobody owes.
    """

    compressor: Compressor

    @property
    def propagates_nonfinite(self) -> bool:  # type: ignore[override]
        return self.compressor.propagates_nonfinite

    @property
    def may_overwrite(self) -> bool:  # type: ignore[override]
        return isinstance(self.compressor, Identity)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        scaled = torch.mul(x, 1.0 / context.size, out=context.out)
        if isinstance(self.compressor, Identity):
            # No payload is made: x / n is what is summed, and what DistributedDataParallel sums.
            total = yield AllReduce(scaled)
            return AggregateResult(total, lambda: x, state)
        payload = self.compressor.encode(self._clamped(scaled, context.size), context.layout, context.shared)
        # Decoded now: the transport takes the payload for its buffer, and the sum comes back in its place.
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

    adds_residual = True
    may_overwrite = True

    compressor: Compressor

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        # A key of the rank's own: errors that are independent average out over the ranks.
        key = context.private.fold("gather")
        owed: Tensor | None = None
        if context.residual is None:
            own = self.compressor.encode(x, context.layout, key)
        else:
            owed = memory.empty(x.numel(), x.device)
            own = self.compressor.encode_owing(x, context.residual, owed, context.layout, key)
        payloads: list[Payload] = yield AllGather(own)
        about = (self.compressor, context.layout)
        estimate = once(
            payloads, about, lambda: mean_of(self.compressor, payloads, context.layout, out=context.out)
        )
        return AggregateResult(
            estimate,
            lambda: self.compressor.decode(own, context.layout),
            state,
            lambda x: self.compressor.subtract_from(x, own, context.layout),
            owed,
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

    **Under error feedback** the owner adds its own chunk as it is, for that part crosses no wire::

        m_j = 1/n (x_j + sum_{i != j} decode(c_ij))

    What it owes there is the second stage's error alone, and is added just before the second encoding, as a
    server adds its own: had it to go through the first encoder with the rest, one rank's blocks would become
    coarse. Without error feedback the owner's chunk is encoded
    like all others, so that buckets cut otherwise, which make other owners, change no value.

    ``second`` encodes the mean (``compressor`` where it is None). On the wire: ``(n-1)/n`` of a payload of
    each.

    Source: the residual on the reducing side is that of Tang et al., "DoubleSqueeze", ICML 2019, and of
    DeepSpeed's ``server_error``. We differ: it shares one tensor with the worker's residual, which the owner
    does not need on its own chunk.
    """

    adds_residual = True
    may_overwrite = True

    compressor: Compressor
    second: Compressor | None = None

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        c, second = self.compressor, self.second or self.compressor
        chunks = self._chunks(context.layout, context.size)
        mine = chunks[context.rank]
        own = chunk_view(x, chunks, context.rank) if context.error_feedback else None
        owed = None if context.residual is None else memory.empty(x.numel(), x.device)
        if context.residual is not None:
            assert own is not None  # error feedback alone has a residual
            own = own + chunk_view(context.residual, chunks, context.rank)
        sent = self._encoded(x, chunks, context, owed)
        received: list[Payload] = yield AllToAll(sent)
        left = None if owed is None else chunk_view(owed, chunks, context.rank)
        chunk_mean = mean_of(c, received, mine, own, context.rank, out=left)

        # The shared key: the noise of a block must not depend on who owns it, for other buckets make other
        # owners.
        answer = second.encode(chunk_mean, mine, context.shared.fold("reduce"))
        answers: list[Payload] = yield AllGather(answer, parts=tuple(second.parts(chunk) for chunk in chunks))
        estimate = once(
            answers, (second, context.layout), lambda: _decoded(second, answers, chunks, x, out=context.out)
        )

        def subtract_contribution_(given: Tensor) -> None:
            views = chunk_views(given, chunks)
            for rank, (view, chunk, payload) in enumerate(zip(views, chunks, sent, strict=True)):
                if rank == context.rank and own is not None:
                    view.sub_(own)
                else:
                    c.subtract_from(view, payload, chunk)
            add_second_error_(views[context.rank], -1)

        def add_second_error_(view: Tensor, sign: int) -> None:
            # n times: a contribution is n times what of it stands in the mean.
            if left is not None:
                view.sub_(left, alpha=sign)
            else:
                own_estimate = chunk_view(estimate, chunks, context.rank)
                view.add_(own_estimate - chunk_mean, alpha=sign * context.size)

        def contribution() -> Tensor:
            given = _decoded(c, sent, chunks, x, own, context.rank)
            add_second_error_(chunk_view(given, chunks, context.rank), 1)
            return given

        if left is not None:
            # The mean itself becomes what is owed of it: the chunk was sent as it is.
            second.subtract_from(left, answer, mine)
            left.mul_(context.size)
        return AggregateResult(estimate, contribution, state, subtract_contribution_, owed)

    def _chunks(self, layout: Layout, size: int) -> tuple[Layout, ...]:
        """The chunk of each rank, on a grid that both stages share."""
        second = self.second or self.compressor
        # A multiple of both: neither stage's blocks are cut, so that the chunks change no value.
        return layout.split(size, math.lcm(self.compressor.alignment, second.alignment))

    def _encoded(
        self, x: Tensor, chunks: tuple[Layout, ...], context: StepContext, owed: Tensor | None
    ) -> tuple[Payload, ...]:
        """The first stage's payloads; under error feedback zeros to oneself, which nobody reads. What they do
        not stand for of ``x`` and the residual goes into ``owed``, where there is one."""
        c, key = self.compressor, context.private.fold("scatter")
        empty = cache(lambda: c.encode(x[:0], NOTHING, key))  # with more ranks than blocks, most chunks are

        def payload(rank: int, view: Tensor, chunk: Layout) -> Payload:
            if context.error_feedback and rank == context.rank:
                unread = Payload.empty(c.parts(chunk), x.device)
                unread.wire.zero_()
                return unread
            if not chunk.slices:
                return empty()
            if owed is None or context.residual is None:
                return c.encode(view, chunk, key)
            residual, left = (chunk_view(one, chunks, rank) for one in (context.residual, owed))
            return c.encode_owing(view, residual, left, chunk, key)

        views = chunk_views(x, chunks)
        return tuple(payload(rank, *both) for rank, both in enumerate(zip(views, chunks, strict=True)))

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The mean over the ranks: chunks differ by a block at most."""
        stages = (self.compressor, self.second or self.compressor)
        sizes = [stage.wire_bytes(chunk) for stage in stages for chunk in self._chunks(layout, size)]
        return round(sum(sizes) * (size - 1) / size)


@dataclass(frozen=True)
class Auto(Method):
    """All-gather or reduce-scatter: whichever sends fewer bytes without a second rounding that counts.

    Gathered payloads of an unbiased compressor err by ``omega / n``. A second encoding of the mean errs by
    its whole omega, so that the same compressor twice has up to ``n + 1`` times the variance. The second
    stage is therefore the narrowest that errs by no more than the first does after the mean (or than a
    hundredth of the signal over n, which the noise of minibatches hides); see :func:`second_stage`.

    Decided on a large tensor instead of the bucket at hand, because cutting the buckets otherwise must change
    no value. On the wire: what the one that is chosen sends.

    Source: none: papers gather or reduce, and do not choose.
    """

    adds_residual = True
    may_overwrite = True

    compressor: Compressor

    def chosen(self, size: int) -> Method:
        """The method at this world size."""
        return _cheapest(self.compressor, size)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        return (yield from self.chosen(context.size).aggregate(x, state, context))

    def sole_compressor(self) -> Compressor:
        return self.compressor

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.chosen(size).payload_bytes(layout, size, step)


@lru_cache(maxsize=256)
def _cheapest(compressor: Compressor, size: int) -> Method:
    gather = AllGatherMean(compressor)
    if size < 3:  # there both send one payload, and gathering rounds once
        return gather
    scatter = ReduceScatterMean(compressor, second_stage(compressor, size))
    gathered, scattered = (method.payload_bytes(REFERENCE_LAYOUT, size, 0) for method in (gather, scatter))
    return gather if gathered <= scattered else scatter


HIDDEN = 0.01
"""A variance, relative to the square of the signal, that minibatches of one rank exceed by far."""

GAUSSIAN = Layout.of([("gaussian", (256, 256))])
"""What the errors of two stages are measured on."""


def second_stage(compressor: Compressor, size: int) -> Compressor | None:
    """What encodes the mean of ``size`` ranks' payloads; None for ``compressor`` itself.

    Of an unbiased compressor with variance ``omega`` on Gaussian data, the mean has ``omega / n``. The second
    stage is the one of fewest bytes with a variance of at most ``max(omega, 0.01) / n``: the compressor
    itself or :class:`~distcomp.compressors.Quantize` of up to 8 bits. The variance of both stages together is
    then at most twice that of gathering, or hidden. A biased compressor keeps to itself: its errors do not
    average out over ranks, and error feedback owes those of both stages.
    """
    if not compressor.unbiased:
        return None
    allowed = max(_variance(compressor), HIDDEN) / size
    if _variance(compressor) <= allowed:
        return None
    finer = list(_finer(compressor))
    fitting = [quantizer for quantizer in finer if _variance(quantizer) <= allowed] or finer[-1:]
    return min(fitting, key=lambda quantizer: quantizer.wire_bytes(REFERENCE_LAYOUT), default=None)


def _finer(compressor: Compressor) -> Iterator[Compressor]:
    """Uniform quantizers, the coarsest first: the compressor with more bits if it is one, and otherwise of no
    fewer bits than it sends, for real data has longer tails than the Gaussian that errors are measured on."""
    if isinstance(compressor, Quantize):
        return (replace(compressor, bits=bits) for bits in range(compressor.bits + 1, 9))
    block = compressor.alignment if compressor.alignment > 1 else Quantize.block
    sent_bits = 8 * compressor.wire_bytes(REFERENCE_LAYOUT) // REFERENCE_LAYOUT.numel
    return (Quantize(bits, block) for bits in range(min(8, max(2, sent_bits)), 9))


def _variance(compressor: Compressor) -> float:
    return relative_error(compressor, GAUSSIAN) ** 2


def _decoded(
    c: Compressor,
    payloads: Sequence[Payload],
    chunks: tuple[Layout, ...],
    like: Tensor,
    own: Tensor | None = None,
    rank: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The flat buffer whose chunks the payloads decode to; the chunk of ``rank`` is ``own`` where that is
    given."""
    buffer = memory.empty(like.numel(), like.device) if out is None else out
    for index, (view, chunk, payload) in enumerate(
        zip(chunk_views(buffer, chunks), chunks, payloads, strict=True)
    ):
        if own is not None and index == rank:
            view.copy_(own)
        else:
            c.decode_into(view, payload, chunk)
    return buffer


def mean_of(
    compressor: Compressor,
    payloads: list[Payload],
    layout: Layout,
    own: Tensor | None = None,
    rank: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The mean of what the payloads decode to, added in the order given; that of ``rank`` is ``own`` where
    that is given."""
    out = memory.empty(layout.numel, payloads[0].wire.device) if out is None else out
    compressor.mean_into(out, payloads, layout, None if own is None else (rank, own))
    return out
