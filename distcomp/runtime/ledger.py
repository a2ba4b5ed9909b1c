"""Counts what passes the channel: bytes by kind, and requests."""

from __future__ import annotations

import threading
from collections import Counter
from weakref import WeakSet

from distcomp.collectives import Request

LEDGERS: WeakSet[Ledger] = WeakSet()
"""Those of this process that somebody uses."""


class Ledger:
    """Bytes that this rank has sent, by kind (values, codes, scales, indices, header), and how often it
    asked. Each request defines what it sends: :meth:`distcomp.collectives.Request.sent_bytes`."""

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        LEDGERS.add(self)

    @property
    def total_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.sent_bytes.values())

    def count(self, request: Request, rank: int, size: int) -> None:
        """Count a request, which ``rank`` of ``size`` begins."""
        sent = request.sent_bytes(rank, size)
        with self._lock:  # several channels may count here
            self.requests[type(request).__name__] += 1
            self.sent_bytes.update(sent)
