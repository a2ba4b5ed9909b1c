"""The channel through which everything sent passes: seal, carry, check, count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, Protocol

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.collectives import Pending, Request, Traffic
from distcomp.payload import Parts, Payload, PayloadHeader, check_header, wire_bytes, write_header
from distcomp.runtime.ledger import Ledger


class Transport(Protocol):
    """Carries requests between ranks. Requests are started in the same order on every rank, one at a time.

    It knows a few primitives (:class:`distcomp.collectives.Primitives`) and no request: each request defines
    how these carry it.
    """

    rank: int
    size: int

    def start(self, request: Request) -> Pending:
        """Begin to carry a request, by ``request.drive``. The answer is what its primitive brings."""


@dataclass(frozen=True)
class Answer:
    """What came back, and whether every tensor behind it was finite."""

    value: Any
    finite: Tensor


@dataclass(frozen=True)
class CarriedRequest:
    """A request that was carried: this rank's messages (to, bytes), where ranks send different sizes; what it
    puts on a network otherwise; and when it began and was over (``time.perf_counter``)."""

    messages: tuple[tuple[int, int], ...]
    traffic: Traffic
    started_s: float
    finished_s: float


_WATCHERS: list[list[CarriedRequest]] = []


@contextmanager
def watch_requests() -> Iterator[list[CarriedRequest]]:
    """Until it ends, every request of this process is noted when it has been waited for."""
    seen: list[CarriedRequest] = []
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        _WATCHERS[:] = [watcher for watcher in _WATCHERS if watcher is not seen]


class Channel:
    """A transport with payloads sealed and opened, non-finite values announced, and bytes counted.

    A rank whose tensor holds a NaN or an infinity says so with everything it sends: payloads carry a flag in
    their header, and what is summed is replaced by NaN. So every rank learns it from the same exchange, also
    through masks and selections that would have hidden it.
    """

    def __init__(self, transport: Transport, fingerprint: int, ledger: Ledger) -> None:
        self.transport = transport
        self.fingerprint = fingerprint
        self.ledger = ledger
        self.exchange = 0

    def prepare(self, request: Request, finite: Tensor) -> OpenRequest:
        """Seal and count, outside of network time. ``finite``: whether this rank's tensor is."""
        # Numbered on both sides alike: a payload that belongs to another exchange is refused by its header.
        self.exchange = (self.exchange + 1) % 2**32
        request = request.poisoned(finite)
        for payload in dict.fromkeys(request.sends()):  # one that goes to many is sealed once
            write_header(payload, PayloadHeader(self.transport.rank, self.fingerprint, self.exchange), finite)
        self.ledger.count(request, self.transport.rank, self.transport.size)
        return OpenRequest(self, request, self.exchange)


class OpenRequest:
    """A sealed request: ``start`` it, ``wait`` for the network, ``open`` what came back."""

    def __init__(self, channel: Channel, request: Request, number: int) -> None:
        self._channel = channel
        self._request = request
        self._number = number
        self._pending: Pending | None = None
        self._waited: Any = None
        self.started_s = 0.0
        self.finished_s = 0.0

    @property
    def leads(self) -> bool:
        """Whether the next request of its exchange follows at once."""
        return self._request.leads

    def start(self) -> None:
        """Hand it to the network. In the same order on every rank."""
        self._pending = self._channel.transport.start(self._request)

    def wait(self) -> None:
        """Block until the network is done with it; :meth:`open` follows outside of network time."""
        assert self._pending is not None
        self._waited = self._pending.wait()
        self.started_s, self.finished_s = self._pending.started_s, self._pending.finished_s
        for watcher in _WATCHERS:
            watcher.append(self.carried())

    def carried(self) -> CarriedRequest:
        """What was sent, to whom and when, once it has been waited for."""
        transport, request = self._channel.transport, self._request
        return CarriedRequest(
            tuple(request.messages(transport.rank, transport.size)),
            request.traffic(transport.size), self.started_s, self.finished_s,
        )  # fmt: skip

    def open(self, watch: bool) -> Answer:
        """Check and unpack. ``watch``: look for non-finite values in sums, too (payloads announce theirs)."""
        transport, flags = self._channel.transport, list[Tensor]()

        def unsealed(sender: int, parts: Parts, wire: Tensor) -> Payload:
            length = wire_bytes(parts)
            payload = Payload(wire if wire.numel() == length else wire[:length], parts)
            header = PayloadHeader(sender, self._channel.fingerprint, self._number)
            flags.append(check_header(payload, header))  # one's own, too: it is decoded like all
            return payload

        value = self._request.open(self._waited, transport.rank, transport.size, unsealed)
        if not self._request.sealed:
            return Answer(value, finite_flag(value) if watch else TRUE)
        return Answer(value, reduce(and_, flags) if flags else TRUE)


TRUE = torch.tensor(True, dtype=torch.bool)
"""All finite, as far as is known."""


def finite_flag(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite, as a bool tensor on its device (a GPU is not waited for)."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.tensor(kernels.all_finite(x.contiguous()), dtype=torch.bool)
    return torch.isfinite(x).all()
