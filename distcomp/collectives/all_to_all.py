"""All-to-all: a payload from every rank to every other, of one size or of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Sealed, Traffic, counted
from distcomp.collectives.partition import share_of_payload, share_parts
from distcomp.errors import Mismatch
from distcomp.payload import Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class AllToAll(Sealed):
    """Send ``payloads[i]`` to rank *i* (all-to-all). Answer: what each rank sent here, in rank order.

    ``parts`` names what each rank sends here, one's own included. Without it everything sent here has the
    parts of ``payloads[own rank]``, and all ranks send alike. On the wire: all payloads but one's own.
    """

    payloads: tuple[Payload, ...]
    parts: tuple[Parts, ...] | None = None
    group: Group | None = None

    def signature(self) -> tuple[object, ...]:
        if self.parts is not None:
            # What is sent differs from rank to rank; that both ends mean the same, check_against sees.
            return ("parts declared", len(self.payloads), len(self.parts), self.group)
        return (tuple(payload.parts for payload in self.payloads), self.group)

    def check_against(self, rank: int, asked: Sequence[Any]) -> None:
        self.check_one_each(len(self.payloads), len(asked))
        if self.parts is None:
            return
        self.check_one_each(len(self.parts), len(asked))
        position = self.position(rank)
        for sender, parts in zip(self.members(len(asked)), self.parts, strict=True):
            sent = asked[sender].payload_to(position).parts
            if sent != parts:
                raise Mismatch(
                    f"rank {rank} expects {parts} from rank {sender}, which sends it {sent}; "
                    "declare on every rank what the others send it"
                )

    def sends(self) -> tuple[Payload, ...]:
        return self.payloads

    def payload_to(self, position: int) -> Payload:
        return self.payloads[position]

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return self.parts or [self.payloads[self.position(rank)].parts] * len(self.payloads)

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        sent, own = Bytes(), self.position(rank)
        for position, payload in enumerate(self.payloads):
            if position != own:
                sent.update(counted(payload.parts, 1))
        return sent

    def mean_sent_bytes(self, size: int) -> float:
        sizes = [wire_bytes(payload.parts) for payload in self.payloads]
        return (len(sizes) - 1) * sum(sizes) / len(sizes)

    def traffic(self, size: int) -> Traffic:
        return Traffic(
            "all_to_all", tuple(wire_bytes(payload.parts) for payload in self.payloads), chunked=True
        )

    def messages(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        if self.parts is None:
            return ()
        pairs = zip(self.members(size), self.payloads, strict=True)
        return tuple((to, wire_bytes(payload.parts)) for to, payload in pairs if to != rank)

    def drive(self, line: Primitives) -> Pending:
        self.check_one_each(len(self.payloads), line.size)
        self.check_one_each(len(self.parts or self.payloads), line.size)
        wires = [payload.wire for payload in self.payloads]
        return line.all_to_all(wires, self.wire_sizes(line.rank, line.size), self.group)

    def share(self, index: int, count: int) -> Self:
        payloads = tuple(share_of_payload(payload, index, count) for payload in self.payloads)
        parts = (
            None if self.parts is None else tuple(share_parts(of_sender, count) for of_sender in self.parts)
        )
        return replace(self, payloads=payloads, parts=parts)

    def mean_answer_parts(self, size: int) -> Sequence[Parts]:
        """Every rank receives n payloads: on average, one of each. With declared parts, what this rank
        receives."""
        return self.parts or [payload.parts for payload in self.payloads]
