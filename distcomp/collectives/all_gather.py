"""All-gather: every rank's payload, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.collectives.partition import share_of_payload, share_parts
from distcomp.payload import Parts, Payload


@dataclass(frozen=True, eq=False)
class AllGather(Sealed):
    """Send ``payload`` to every rank. Answer: the payloads of all ranks, in rank order.

    ``parts`` names what each rank sends where that differs from rank to rank. On the wire: ``(n-1)``
    payloads.
    """

    payload: Payload
    parts: tuple[Parts, ...] | None = None
    group: Group | None = None

    alike: ClassVar[bool] = True

    def signature(self) -> tuple[object, ...]:
        return (self.parts or self.payload.parts, self.group)

    def sends(self) -> tuple[Payload, ...]:
        return (self.payload,)

    def payload_to(self, position: int) -> Payload:
        return self.payload

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return self.parts or [self.payload.parts] * len(self.members(size))

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        return counted(self.payload.parts, len(self.members(size)) - 1)

    def mean_sent_bytes(self, size: int) -> float:
        sizes = self.wire_sizes(0, size)
        return (len(sizes) - 1) * sum(sizes) / len(sizes)

    def traffic(self, size: int) -> Traffic:
        return Traffic("all_gather", tuple(self.wire_sizes(0, size)), chunked=self.parts is not None)

    def drive(self, line: Primitives) -> Pending:
        return line.all_gather(self.payload.wire, self.wire_sizes(line.rank, line.size), self.group)

    def share(self, index: int, count: int) -> Self:
        parts = (
            None if self.parts is None else tuple(share_parts(of_member, count) for of_member in self.parts)
        )
        return replace(self, payload=share_of_payload(self.payload, index, count), parts=parts)
