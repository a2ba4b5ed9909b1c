"""Reduce-scatter of whole parameters: every rank owns some rows of each, and receives those of the mean.

Where names and shapes are known, methods see what they see under DistributedDataParallel: matrices, names and
roles. A rank uses the estimate in its own rows alone, so that what is made from a compressor sends each owner
its rows and nothing else.

FSDP2 cuts a parameter of ``a`` rows over n ranks into pieces of ``ceil(a / n)`` rows, the last ones shorter
or empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllToAll, Rounds
from distcomp.compressors.base import Compressor
from distcomp.kernels.pieces import Moves, move
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.from_compressor import mean_of
from distcomp.methods.reduce_scatter import compressor_within, through_wrappers
from distcomp.payload import Payload


@dataclass(frozen=True, eq=False)
class OwnedRows:
    """The rows that one rank owns: as parameters of their own, and where they lie in the whole buffer."""

    layout: Layout
    moves: Moves
    """From the buffer of whole parameters to the rows, laid end to end."""

    def of(self, x: Tensor) -> Tensor:
        """The rows of a buffer of whole parameters."""
        rows = x.new_empty(self.layout.numel)
        move(x, rows, self.moves)
        return rows

    def put(self, rows: Tensor, x: Tensor) -> None:
        """Write them where they lie in a buffer of whole parameters."""
        move(rows, x, self.moves.back)


def owners_of(layout: Layout, size: int) -> tuple[OwnedRows, ...]:
    """What each of ``size`` ranks owns of whole parameters."""
    return layout.remember(("rows", size), lambda: tuple(_rows(layout, one, size) for one in range(size)))


def _rows(layout: Layout, owner: int, size: int) -> OwnedRows:
    slices, moves, end = [], [], 0
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        first, shape = cut_rows(param.shape, owner, size)
        numel = math.prod(shape)
        if numel:
            slices.append(ParamSlice(f"{param.name}[{owner}]", shape, 0, numel, param.role))
            moves.append((at + first * (numel // shape[0]), end, numel))
            end += numel
    return OwnedRows(Layout(tuple(slices)), Moves(tuple(moves)))


def cut_rows(shape: tuple[int, ...], owner: int, size: int) -> tuple[int, tuple[int, ...]]:
    """The first row of an owner's piece of a parameter, and the piece's shape."""
    rows = math.ceil(shape[0] / size)
    first = min(owner * rows, shape[0])
    return first, (min(rows, shape[0] - first), *shape[1:])


@dataclass(frozen=True)
class RowMean(Method):
    """Send each owner its rows of ``x``; it adds up what it is sent.

    ``c_ij = encode(rows of j in x_i)``, ``estimate_j = 1/n sum_i decode(c_ij)``, added in rank order. The
    estimate is zero outside the rank's own rows; rank i's contribution is ``decode(c_i0) ..
    decode(c_i,n-1)``. On the wire: ``(n-1)/n`` of the payloads of all rows.
    """

    compressor: Compressor

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        owners = owners_of(context.layout, context.size)
        key = context.private.fold("owners")
        sent = tuple(self.compressor.encode(rows.of(x), rows.layout, key) for rows in owners)
        received: list[Payload] = yield AllToAll(sent)
        own = owners[context.rank]
        estimate = torch.zeros_like(x)
        own.put(mean_of(self.compressor, received, own.layout), estimate)

        def contribution() -> Tensor:
            given = torch.empty_like(x)
            for rows, payload in zip(owners, sent, strict=True):
                rows.put(self.compressor.decode(payload, rows.layout), given)
            return given

        return AggregateResult(estimate, contribution, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """The mean over the ranks: each keeps its own rows."""
        owners = owners_of(layout, size)
        return round(sum(self.compressor.wire_bytes(rows.layout) for rows in owners) * (size - 1) / size)


def to_row_owners(method: Method) -> Method:
    """``method`` as a reduce-scatter of whole parameters.

    Methods made from a compressor, also within error feedback, schedules and partitions, send each owner its
    rows; any other aggregates the whole, as under DistributedDataParallel, at the same bytes.
    """
    compressor = compressor_within(method)
    if compressor is not None:
        return RowMean(compressor)
    return through_wrappers(method, to_row_owners) or method


def needs_parameters(method: Method) -> bool:
    """Whether ``method``, or one within, needs to know which parameter lies where."""
    return any(part.needs for part in method.walk())
