"""Push: payloads along directed edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.errors import Mismatch
from distcomp.payload import Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class Push(Sealed):
    """Send ``payload`` to ``targets``, without their sending one back. Answer: what ``sources`` have sent, in
    their order.

    Both are ranks of the whole, also where a group is named. On the wire: one payload to each target; where
    only one of two sends, the other answers with a receipt, a header of 32 bytes: every connection is used
    both ways, so that a rank that is lost is missed by either end.
    """

    payload: Payload
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    group: Group | None = None

    @cached_property
    def receipt(self) -> Payload:
        """What goes to a source that is no target."""
        return Payload.empty((), self.payload.wire.device)

    @cached_property
    def neighbours(self) -> tuple[int, ...]:
        """Everybody at the other end of an edge."""
        return tuple(sorted({*self.targets, *self.sources}))

    @property
    def neighbors_only(self) -> Group | None:
        return self.neighbours

    def within(self, group: Group) -> Self:
        return replace(
            self,
            targets=tuple(group[position] for position in self.targets),
            sources=tuple(group[position] for position in self.sources),
            group=group,
        )

    def signature(self) -> tuple[object, ...]:
        return (self.payload.parts, self.group)

    def check_against(self, rank: int, asked: Sequence[Any]) -> None:
        for other in self.neighbours:
            here, there = (other in self.targets, other in self.sources), asked[other]
            if here != (rank in there.sources, rank in there.targets):
                raise Mismatch(
                    f"rank {rank} and rank {other} do not agree on who of them sends to whom; "
                    "give every rank the same directed graph"
                )

    def senders(self, size: int) -> Group:
        return self.neighbours

    def sends(self) -> tuple[Payload, ...]:
        return tuple({id(one): one for one in map(self._to, self.neighbours)}.values())

    def payload_to(self, position: int) -> Payload:
        return self._to(self.group[position] if self.group else position)

    def _to(self, rank: int) -> Payload:
        return self.payload if rank in self.targets else self.receipt

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.payload.parts if other in self.sources else () for other in self.neighbours]

    def read(self, delivered: list[Any]) -> Any:
        came = dict(zip(self.neighbours, delivered, strict=True))
        return [came[source] for source in self.sources]

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        sent = counted(self.payload.parts, len(self.targets))
        sent.update(counted((), len(self.neighbours) - len(self.targets)))
        return sent

    def mean_sent_bytes(self, size: int) -> float:
        return sum(self.sent_bytes(0, size).values())

    def traffic(self, size: int) -> Traffic:
        return Traffic("neighbor_exchange", (wire_bytes(self.payload.parts),))

    def messages(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        return tuple((other, wire_bytes(self._to(other).parts)) for other in self.neighbours)

    def drive(self, line: Primitives) -> Pending:
        wires = [self._to(other).wire for other in self.neighbours]
        return line.neighbor_exchange(
            wires, self.neighbours, self.wire_sizes(line.rank, line.size), self.group
        )
