"""All-gather and all-to-all of rows that a backward goes through, each direction with a codec of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.calls.codec import CodecLike
from distcomp.calls.collectives import all_gather, all_to_all, reduce_scatter
from distcomp.calls.line import line_of
from distcomp.errors import DistcompError
from distcomp.transports.types import ProcessGroup


@dataclass(frozen=True)
class Codecs:
    """Of the forward and of the backward, over a group whose ranks have ``agreed`` on both, or compare."""

    forward: CodecLike
    backward: CodecLike
    group: ProcessGroup | None
    agreed: bool


def gather_rows(
    rows: Tensor,
    codec: CodecLike = "identity",
    *,
    backward: CodecLike | None = None,
    group: ProcessGroup | None = None,
    agreed: bool = False,
) -> Tensor:
    """Every rank's rows, in rank order: ``[n rows, ...]`` of ``[rows, ...]``, the same on every rank.

    Backward: the sum over the ranks of the gradients of this rank's rows, by reduce-scatter, by the codec
    ``backward`` (that of the forward by default). An unbiased codec there leaves the gradient unbiased; the
    rounding of the forward is passed straight through. ``agreed``: as of :func:`all_gather`, both ways.

    Raises as :func:`all_gather` and :func:`reduce_scatter`, forward and backward.
    """
    codecs = Codecs(codec, codec if backward is None else backward, group, agreed)
    gathered: Tensor = _GatherRows.apply(rows, codecs)  # type: ignore[no-untyped-call]
    return gathered


def route_rows(
    rows: Tensor,
    counts: Sequence[int],
    received_counts: Sequence[int],
    codec: CodecLike = "identity",
    *,
    backward: CodecLike | None = None,
    group: ProcessGroup | None = None,
    agreed: bool = False,
) -> Tensor:
    """Send ``counts[j]`` rows to rank j, from the first on: what the ranks sent here, ``received_counts[j]``
    rows from rank j, in rank order.

    Backward: the same rows of the gradient go back, by the codec ``backward`` (that of the forward by
    default). The rounding of the forward is passed straight through. ``agreed``: as of :func:`all_to_all`,
    both ways.

    Raises DistcompError for counts that do not sum to the rows; as :func:`all_to_all`, forward and backward.
    """
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise DistcompError(f"counts {list(counts)} do not sum to {rows.shape[0]} rows; count each row once")
    codecs = Codecs(codec, codec if backward is None else backward, group, agreed)
    routed: Tensor = _RouteRows.apply(rows, tuple(counts), tuple(received_counts), codecs)  # type: ignore[no-untyped-call]
    return routed


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, codecs: Codecs) -> Tensor:
        ctx.codecs, ctx.shape = codecs, rows.shape
        size = line_of(codecs.group).session.size
        gathered = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
        all_gather(gathered, rows, codecs.forward, group=codecs.group, agreed=codecs.agreed)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        codecs: Codecs = ctx.codecs
        own = gradients[0].new_empty(ctx.shape)
        whole = gradients[0].contiguous()
        reduce_scatter(own, whole, codecs.backward, group=codecs.group, agreed=codecs.agreed)
        return own, None


class _RouteRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: tuple[int, ...], received_counts: tuple[int, ...], codecs: Codecs
    ) -> Tensor:
        ctx.counts, ctx.received_counts, ctx.codecs = counts, received_counts, codecs
        return _routed(rows, counts, received_counts, codecs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        there = replace(ctx.codecs, forward=ctx.codecs.backward)
        back = _routed(gradients[0], ctx.received_counts, ctx.counts, there)
        return back, None, None, None


def _routed(
    rows: Tensor, counts: tuple[int, ...], received_counts: tuple[int, ...], codecs: Codecs
) -> Tensor:
    received = rows.new_empty((sum(received_counts), *rows.shape[1:]))
    outputs, inputs = torch.split(received, list(received_counts)), torch.split(rows, list(counts))
    all_to_all(outputs, inputs, codecs.forward, group=codecs.group, agreed=codecs.agreed)
    return received
