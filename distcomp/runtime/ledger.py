"""Counts what passes the door: bytes by kind, and requests."""

from __future__ import annotations

from collections import Counter

from distcomp.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    NeighborExchange,
    Request,
    all_reduce_sent_bytes,
)
from distcomp.payload import Parts, body_bytes, wire_bytes


class Ledger:
    """Bytes that this rank has sent, by kind (values, codes, scales, indices, header), and how often it
    asked.

    A Sum is counted as :func:`distcomp.collectives.all_reduce_sent_bytes`; a Gather as ``n-1`` payloads; a
    Broadcast as ``(n-1)/n`` payloads on every rank (a tree: the ranks together send n-1).
    """

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())

    def count(self, request: Request, rank: int, size: int) -> None:
        members = len(request.group) if request.group else size
        self.requests[type(request).__name__] += 1
        if isinstance(request, AllReduce):
            self.sent_bytes[request.kind] += all_reduce_sent_bytes(
                request.x.numel() * request.x.element_size(), members
            )
        elif isinstance(request, AllGather):
            self._add(request.payload.parts, members - 1)
        elif isinstance(request, AllToAll):
            own = request.group.index(rank) if request.group else rank
            for index, payload in enumerate(request.payloads):
                if index != own:
                    self._add(payload.parts, 1)
        elif isinstance(request, NeighborExchange):
            self._add(request.payload.parts, len(request.neighbours))
        elif isinstance(request, Broadcast):
            self._add(request.payload.parts, (members - 1) / members)

    def _add(self, parts: Parts, times: float) -> None:
        self.sent_bytes["header"] += round((wire_bytes(parts) - body_bytes(parts)) * times)
        for part in parts:
            self.sent_bytes[part.kind] += round(part.nbytes * times)
