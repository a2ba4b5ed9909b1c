"""Reduce-scatter: the sum of a tensor over the ranks, of which each rank receives its own piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from distcomp.collectives.all_reduce import in_rank_order
from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.collectives.partition import share_of, share_width
from distcomp.errors import DistcompError
from distcomp.payload import Part, Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class ReduceScatter(Sealed):
    """Ask for one piece of the sum of ``x`` over the ranks, the i-th rank for ``sizes[i]`` of its elements.

    ``answer_i = sum_j x_j[begin_i : begin_i + sizes[i]]``, added in rank order: the same bits over every
    transport. ``x``: float or int, any shape, ``sum(sizes)`` elements; the answer is flat, of its dtype.
    Pieces may be uneven, and empty. ``x`` is copied, not given away.

    On the wire: ``(n-1)/n`` of ``x``, and a header to every other rank, so that the owner of an empty piece
    learns of a NaN as well. Every piece goes straight to its owner, as in an all-to-all: Gloo's own
    reduce-scatter sends as much as an all-reduce.

    Raises DistcompError for sizes that do not sum to the elements of ``x``.
    """

    x: Tensor
    sizes: tuple[int, ...]
    kind: str = "values"
    group: Group | None = None

    def __post_init__(self) -> None:
        if min(self.sizes, default=-1) < 0 or sum(self.sizes) != self.x.numel():
            raise DistcompError(
                f"pieces of {self.sizes} elements do not make up a tensor of {self.x.numel()}; "
                "give each rank a piece of 0 elements or more, which sum to the tensor's"
            )

    def parts_of(self, position: int) -> Parts:
        """A message to the member at ``position``."""
        return (Part(self.kind, self.x.dtype, self.sizes[position]),)

    @cached_property
    def payloads(self) -> tuple[Payload, ...]:
        """The pieces, laid out for the wire."""
        made = tuple(
            Payload.empty(self.parts_of(position), self.x.device) for position in range(len(self.sizes))
        )
        for payload, piece in zip(made, torch.split(self.x.reshape(-1), list(self.sizes)), strict=True):
            payload[self.kind].copy_(piece)
        return made

    def signature(self) -> tuple[object, ...]:
        return (self.sizes, self.x.dtype, self.group)

    def check_against(self, rank: int, asked: Sequence[Any]) -> None:
        self.check_one_each(len(self.sizes), len(asked))

    def sends(self) -> tuple[Payload, ...]:
        return self.payloads

    def payload_to(self, position: int) -> Payload:
        return self.payloads[position]

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.parts_of(self.position(rank))] * len(self.sizes)

    def read(self, delivered: list[Any]) -> Tensor:
        return in_rank_order([payload[self.kind] for payload in delivered])

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        sent, own = Bytes(), self.position(rank)
        for position in range(len(self.sizes)):
            if position != own:
                sent.update(counted(self.parts_of(position), 1))
        return sent

    def mean_sent_bytes(self, size: int) -> float:
        count = len(self.sizes)
        return (count - 1) / count * sum(wire_bytes(self.parts_of(position)) for position in range(count))

    def traffic(self, size: int) -> Traffic:
        sizes = tuple(wire_bytes(self.parts_of(position)) for position in range(len(self.sizes)))
        return Traffic("all_to_all", sizes, chunked=True)

    def drive(self, line: Primitives) -> Pending:
        self.check_one_each(len(self.sizes), line.size)
        wires = [payload.wire for payload in self.payloads]
        return line.all_to_all(wires, self.wire_sizes(line.rank, line.size), self.group)

    def share(self, index: int, count: int) -> Self:
        """Of each piece its share, zeros behind it where it is short."""
        widths = [share_width(size, count) for size in self.sizes]
        x = self.x.new_empty(sum(widths))
        begins = [0, *accumulate(self.sizes)]
        for begin, size, into in zip(begins, self.sizes, torch.split(x, widths), strict=False):
            share_of(self.x.reshape(-1)[begin : begin + size], index, into)
        return replace(self, x=x, sizes=tuple(widths))

    def answer_parts(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.parts_of(self.position(rank))]

    def mean_answer_parts(self, size: int) -> Sequence[Parts]:
        return [(Part(self.kind, self.x.dtype, -(-self.x.numel() // len(self.sizes))),)]

    def packed(self, answer: Tensor) -> list[Payload]:
        payload = Payload.empty((Part(self.kind, answer.dtype, answer.numel()),), answer.device)
        payload[self.kind].copy_(answer)
        return [payload]

    def unpacked(self, payloads: list[Payload]) -> Tensor:
        return payloads[0][self.kind].clone()
