"""A slower network without a network: where the system allows no real shaping, requests are held back for as
long as they would take.

Not real packets, and reported as such. ``DISTCOMP_THROTTLE_BPS`` (bits per second of this rank's link) and
``DISTCOMP_DELAY_S`` (one way, per hop) are set by ``distcomp emulate``.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from distcomp.exchange import Request, Sum
from distcomp.transports.base import Pending, Transport
from distcomp.transports.ledger import Ledger


def throttled(transport: Transport) -> Transport:
    """``transport``, held back as the environment says; itself where the environment says nothing."""
    rate_bps = float(os.environ.get("DISTCOMP_THROTTLE_BPS", "inf"))
    delay_s = float(os.environ.get("DISTCOMP_DELAY_S", "0"))
    if rate_bps == float("inf") and delay_s == 0:
        return transport
    return _Throttled(transport, rate_bps, delay_s)


class _Throttled:
    def __init__(self, transport: Transport, rate_bps: float, delay_s: float) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._rate_bps = rate_bps
        self._delay_s = delay_s

    def start(self, request: Request) -> Pending:
        ledger = Ledger()
        ledger.count(request, self.rank, self.size)
        hops = 2 * (self.size - 1) if isinstance(request, Sum) else 1
        seconds = 8 * ledger.total_bytes / self._rate_bps + hops * self._delay_s
        return _Held(self._transport.start(request), time.perf_counter() + seconds)


@dataclass
class _Held:
    pending: Pending
    until_s: float
    started_s: float = 0.0
    finished_s: float = 0.0

    def wait(self) -> Any:
        answer = self.pending.wait()
        left_s = self.until_s - time.perf_counter()
        if left_s > 0:
            threading.Event().wait(left_s)
        self.started_s = self.pending.started_s
        self.finished_s = max(self.until_s, self.pending.finished_s)
        return answer
