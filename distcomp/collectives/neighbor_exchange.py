"""Neighbor exchange: payloads between neighbors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.errors import Mismatch
from distcomp.payload import Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class NeighborExchange(Sealed):
    """Exchange ``payload`` with some neighbours only. Answer: their payloads, in the order of ``neighbours``.

    ``neighbours`` are ranks of the whole, also where a group is named: all of them belong to it.
    A neighbour that is lost answers None, where the transport was opened to go on without it. Neighbours are
    mutual. On the wire: one payload per neighbour, however many workers there are.
    """

    payload: Payload
    neighbours: tuple[int, ...]
    group: Group | None = None

    @property
    def neighbors_only(self) -> Group | None:
        return self.neighbours

    def within(self, group: Group) -> Self:
        return replace(self, neighbours=tuple(group[position] for position in self.neighbours), group=group)

    def signature(self) -> tuple[object, ...]:
        return (self.payload.parts, self.group)

    def check_against(self, rank: int, asked: Sequence[Any]) -> None:
        for neighbor in self.neighbours:
            if rank not in asked[neighbor].neighbours:
                raise Mismatch(
                    f"rank {rank} exchanges with rank {neighbor}, which does not with rank {rank}; "
                    "neighbourhood must be mutual: give every rank the same topology"
                )

    def senders(self, size: int) -> Group:
        return self.neighbours

    def sends(self) -> tuple[Payload, ...]:
        return (self.payload,)

    def payload_to(self, position: int) -> Payload:
        return self.payload

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.payload.parts] * len(self.neighbours)

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        return counted(self.payload.parts, len(self.neighbours))

    def mean_sent_bytes(self, size: int) -> float:
        return len(self.neighbours) * wire_bytes(self.payload.parts)

    def traffic(self, size: int) -> Traffic:
        return Traffic("neighbor_exchange", (wire_bytes(self.payload.parts),))

    def drive(self, line: Primitives) -> Pending:
        wires = [self.payload.wire] * len(self.neighbours)
        return line.neighbor_exchange(
            wires, self.neighbours, self.wire_sizes(line.rank, line.size), self.group
        )
