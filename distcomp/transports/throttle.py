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
from distcomp.errors import DistcompError
from distcomp.runtime.channel import Transport

LEAST_BPS = 1e3
LONGEST_DELAY_S = 60.0
"""A delay beyond what networks have would look like a hang."""


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
        rate_bps = _from_environment("DISTCOMP_THROTTLE_BPS", "inf", LEAST_BPS, float("inf"))
        delay_s = _from_environment("DISTCOMP_DELAY_S", "0", 0.0, LONGEST_DELAY_S)
        return None if rate_bps == float("inf") and delay_s == 0 else SlowLink(rate_bps, delay_s)

    def arrival_s(self, sent_bytes: float, hops: int) -> float:
        """When bytes sent now have arrived, by :func:`time.perf_counter`."""
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + 8 * sent_bytes / self._rate_bps
            return self._free_s + hops * self._delay_s


def _from_environment(name: str, default: str, least: float, most: float) -> float:
    """A number between two bounds. Raises DistcompError for anything else."""
    text = os.environ.get(name, default)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise DistcompError(
            f"{name}={text[:40]} is no number from {least:g} to {most:g}; correct or unset it"
        )
    return value


def hold_until(moment_s: float) -> None:
    """Return at a moment of :func:`time.perf_counter`, or at once where it is over."""
    left_s = moment_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def throttled(transport: Transport, link: SlowLink | None) -> Transport:
    """``transport``, held back by a link, which others may share; itself where there is none."""
    return transport if link is None else _Throttled(transport, link)


class _Throttled:
    def __init__(self, transport: Transport, link: SlowLink) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._link = link

    def start(self, request: Request) -> Pending:
        sent_bytes = request.sent_bytes(self.rank, self.size).total()
        until_s = self._link.arrival_s(sent_bytes, request.hops(self.size))
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
