"""Reduce-scatter: every rank owns a piece of a flat buffer and receives its piece of the mean alone.

That is all FSDP asks for, and half of an all-reduce: the second half of every pattern in
:mod:`distcomp.methods.from_compressor`, which sends the mean to everyone, falls away, and with it a second
encoding's error. The buffer has no names: it is laid out by owner (:func:`owned_layout`), and the methods
that need to know a parameter's name or shape cannot aggregate it.

The law of contributions holds with the estimate that lies spread over the ranks: laid end to end, the pieces
of all ranks times n are the sum of the contributions, each of which is as long as the buffer. So is the
residual of error feedback: *one rank owes for the whole buffer*, not for its own piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import AllToAll, Rounds
from distcomp.compressors.base import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice, chunk_views
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.from_compressor import AllGatherMean, AllReduceMean, Auto, ReduceScatterMean, mean_of
from distcomp.methods.partition import Partition
from distcomp.methods.scheduled import Scheduled, Warmup
from distcomp.payload import Payload


def owned_layout(name: str, numel: int, owners: int) -> Layout:
    """``owners`` pieces of equal length, one after the other: what is known of a nameless buffer."""
    piece = numel // owners
    return Layout(
        tuple(ParamSlice(f"{name}[{owner}]", (piece,), 0, piece, "matrix") for owner in range(owners))
    )


@dataclass(frozen=True)
class ShardMean(Method):
    """Send each owner its piece of ``x``; it adds up what it is sent.

    ``c_ij = encode(piece j of x_i)``, ``estimate_j = 1/n sum_i decode(c_ij)``, added in rank order. The
    estimate is as long as the rank's own piece; rank i's contribution is ``decode(c_i0) .. decode(c_i,n-1)``.
    On the wire: ``(n-1)/n`` of the payload of the buffer, half of what an all-reduce of it sends.
    """

    compressor: Compressor

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        pieces = _pieces(context.layout)
        key = context.private.fold("owners")
        sent = tuple(
            self.compressor.encode(view, piece, key)
            for view, piece in zip(chunk_views(x, pieces), pieces, strict=True)
        )
        received: list[Payload] = yield AllToAll(sent)

        def contribution() -> Tensor:
            given = torch.empty_like(x)
            for view, piece, payload in zip(chunk_views(given, pieces), pieces, sent, strict=True):
                self.compressor.decode_into(view, payload, piece)
            return given

        def subtract_contribution_(given: Tensor) -> None:
            for view, piece, payload in zip(chunk_views(given, pieces), pieces, sent, strict=True):
                self.compressor.subtract_from(view, payload, piece)

        return AggregateResult(
            mean_of(self.compressor, received, pieces[context.rank]),
            contribution,
            state,
            subtract_contribution_,
        )

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The mean over the ranks: each keeps its own piece."""
        return round(sum(map(self.compressor.wire_bytes, _pieces(layout))) * (size - 1) / size)


@dataclass(frozen=True)
class OwnShard(Method):
    """Agree on all of the buffer, as ``inner`` does, and keep one's own piece.

    For methods that need the whole mean: what they remember of it, all ranks remember alike.

    On the wire: ``inner``'s bytes, twice what a reduce-scatter needs.
    """

    inner: Method

    def init(self, layout: Layout) -> State:
        return self.inner.init(layout)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        result = yield from self.inner.aggregate(x, state, context)
        own = chunk_views(result.estimate, _pieces(context.layout))[context.rank]
        return replace(result, estimate=own.clone())  # not a view: it would keep all of the buffer alive

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)


def _pieces(layout: Layout) -> list[Layout]:
    return [Layout((param,)) for param in layout.slices]


def to_shards(method: Method) -> Method:
    """``method`` as a reduce-scatter of nameless buffers.

    Methods made from a compressor (:func:`distcomp.methods.from_compressor`), with error feedback, warm-up
    and schedules around them, send each piece to its owner; any other method aggregates the whole first
    (:class:`OwnShard`). Biases and norms cannot be told from the rest here, and are compressed as it is.

    Raises DistcompError for methods that need names or shapes; see :func:`refuse_nameless`.
    """
    refuse_nameless(method)
    return _to_owners(method)


def _to_owners(method: Method) -> Method:
    compressor = compressor_within(method)
    if compressor is not None:
        return ShardMean(compressor)
    if isinstance(method, Partition):
        # The rule sees a nameless piece of role "matrix": biases and norms go with the rest.
        return _to_owners(method.special if method.rule(_SOME_PIECE) else method.usual)
    return through_wrappers(method, _to_owners) or OwnShard(method)


def compressor_within(method: Method) -> Compressor | None:
    """The compressor that ``method`` is made from; None where it is made from none."""
    match method:
        case AllReduceMean(c) | AllGatherMean(c) | ReduceScatterMean(c) | Auto(c):
            return c
    return None


def through_wrappers(method: Method, change: Callable[[Method], Method]) -> Method | None:
    """``method`` with what it wraps changed, if it hands estimates on element by element; else None."""
    match method:
        case ErrorFeedback(inner):
            return replace(method, inner=change(inner))
        case Warmup(inner, steps, before):
            return Warmup(change(inner), steps, change(before))
        case Partition(rule, special, usual):
            return Partition(rule, change(special), change(usual))
        case Scheduled(name, settings, recipe):

            def changed(**values: Any) -> Method:
                return change(recipe(**values))

            return Scheduled(name, settings, changed)
    return None


_SOME_PIECE = owned_layout("", 1, 1).slices[0]


def refuse_nameless(method: Method) -> None:
    """Raise DistcompError if ``method``, or one within, needs to know which parameter lies where.

    FSDP hands over buffers without names, padded, in which the parameters of a module are interleaved.
    """
    for part in method.walk():
        if part.needs:
            needs = " and ".join(sorted(part.needs))
            raise DistcompError(
                f"{type(part).__name__} needs {needs}, and FSDP hands over buffers without names, "
                "padded and interleaved; use a method that works element by element, such as qsgd or topk"
            )
