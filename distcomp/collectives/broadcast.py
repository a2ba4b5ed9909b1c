"""Broadcast: one rank's payload, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.collectives.partition import share_of_payload
from distcomp.payload import Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class Broadcast(Sealed):
    """Take ``payload`` from rank ``source``. Answer: its payload (on every rank, the source included).

    On the wire: ``(n-1)/n`` payloads on every rank (a tree: the ranks together send n-1).
    """

    payload: Payload
    source: int
    group: Group | None = None

    alike: ClassVar[bool] = True

    def within(self, group: Group) -> Self:
        return replace(self, source=group[self.source], group=group)

    def signature(self) -> tuple[object, ...]:
        return (self.payload.parts, self.source, self.group)

    def senders(self, size: int) -> Group:
        return (self.source,)

    def sends(self) -> tuple[Payload, ...]:
        return (self.payload,)

    def payload_to(self, position: int) -> Payload:
        return self.payload

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.payload.parts]

    def read(self, delivered: list[Any]) -> Any:
        return delivered[0]

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        members = len(self.members(size))
        return counted(self.payload.parts, (members - 1) / members)

    def mean_sent_bytes(self, size: int) -> float:
        members = len(self.members(size))
        return (members - 1) / members * wire_bytes(self.payload.parts)

    def traffic(self, size: int) -> Traffic:
        return Traffic("broadcast", (wire_bytes(self.payload.parts),))

    def drive(self, line: Primitives) -> Pending:
        return line.broadcast(self.payload.wire, self.source, self.group)

    def share(self, index: int, count: int) -> Self:
        return replace(self, payload=share_of_payload(self.payload, index, count))

    def packed(self, answer: Payload) -> list[Payload]:
        return [answer]
