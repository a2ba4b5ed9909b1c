"""A slower network without a network: where the system allows no real shaping, what is sent is held back for
as long as it would take.

Not real packets, and reported as such. ``DISTCOMP_THROTTLE_BPS`` (bits per second of this rank's link) and
``DISTCOMP_DELAY_S`` (one way, per hop) are set by ``distcomp emulate``.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from distcomp.collectives import Pending, Request
from distcomp.runtime.channel import Transport


class SlowLink:
    """One rank's link: what is sent waits until everything sent before is through."""

    def __init__(self, rate_bps: float, delay_s: float) -> None:
        self._rate_bps = rate_bps
        self._delay_s = delay_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    @staticmethod
    def from_env() -> SlowLink | None:
        """The link that the environment describes; None where it says nothing."""
        rate_bps = float(os.environ.get("DISTCOMP_THROTTLE_BPS", "inf"))
        delay_s = float(os.environ.get("DISTCOMP_DELAY_S", "0"))
        return None if rate_bps == float("inf") and delay_s == 0 else SlowLink(rate_bps, delay_s)

    def arrival_s(self, sent_bytes: float, hops: int) -> float:
        """When bytes sent now have arrived, by :func:`time.perf_counter`."""
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + 8 * sent_bytes / self._rate_bps
            return self._free_s + hops * self._delay_s


def hold_until(moment_s: float) -> None:
    """Return at a moment of :func:`time.perf_counter`, or at once where it is over."""
    left_s = moment_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def throttled(transport: Transport) -> Transport:
    """``transport``, held back as the environment says; itself where the environment says nothing."""
    session = SlowLink.from_env()
    return transport if session is None else _Throttled(transport, session)


class _Throttled:
    def __init__(self, transport: Transport, session: SlowLink) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._session = session

    def start(self, request: Request) -> Pending:
        sent_bytes = request.sent_bytes(self.rank, self.size).total()
        until_s = self._session.arrival_s(sent_bytes, request.hops(self.size))
        return _Held(self._transport.start(request), until_s)


@dataclass
class _Held:
    pending: Pending
    until_s: float

    @property
    def started_s(self) -> float:
        return self.pending.started_s

    @property
    def finished_s(self) -> float:
        return max(self.until_s, self.pending.finished_s)

    def wait(self) -> Any:
        answer = self.pending.wait()
        hold_until(self.until_s)
        return answer
