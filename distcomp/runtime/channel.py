"""The door through which everything sent passes: seal, carry, check, count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, Request
from distcomp.payload import Parts, Payload, PayloadHeader, check_header, wire_bytes, write_header
from distcomp.runtime.ledger import Ledger


class Pending(Protocol):
    """A request under way."""

    @property
    def started_s(self) -> float:
        """When the wire began with it (``time.perf_counter``); known once it has been waited for."""

    @property
    def finished_s(self) -> float:
        """When the wire was done with it; known once it has been waited for."""

    def wait(self) -> Any:
        """Block until the answer is there. Raises PeerLost if it never will be."""


class Transport(Protocol):
    """Carries requests between ranks. Requests are started in the same order on every rank, one at a time."""

    rank: int
    size: int

    def start(self, request: Request) -> Pending:
        """Begin to carry a request. Sum answers with a tensor; the others with raw buffers (uint8), in rank
        order."""


@dataclass(frozen=True)
class Answer:
    """What came back, and whether every tensor behind it was finite."""

    value: Any
    finite: Tensor


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
        """Seal and count, off the wire's time. ``finite`` tells of the tensors that this rank talks about."""
        self.exchange = (self.exchange + 1) % 2**32
        for payload in dict.fromkeys(payloads_of(request)):  # one that goes to many is sealed once
            write_header(payload, PayloadHeader(self.transport.rank, self.fingerprint, self.exchange), finite)
        if isinstance(request, AllReduce):
            request = replace(request, x=_poisoned(request.x, finite))
        self.ledger.count(request, self.transport.rank, self.transport.size)
        return OpenRequest(self, request, self.exchange)


class OpenRequest:
    """A sealed request: ``start`` it, ``wait`` for the wire, ``open`` what came back."""

    def __init__(self, channel: Channel, request: Request, number: int) -> None:
        self._channel = channel
        self._request = request
        self._number = number
        self._pending: Pending | None = None
        self._waited: Any = None
        self.started_s = 0.0
        self.finished_s = 0.0

    def start(self) -> None:
        self._pending = self._channel.transport.start(self._request)

    def wait(self) -> None:
        """Block until the wire is done with it; opening is left to :meth:`open`, off the wire's time."""
        assert self._pending is not None
        self._waited = self._pending.wait()
        self.started_s, self.finished_s = self._pending.started_s, self._pending.finished_s

    def open(self, watch: bool) -> Answer:
        """Check and unpack. ``watch``: look for non-finite values in sums, too (payloads always tell)."""
        request = self._request
        if isinstance(request, AllReduce):
            total: Tensor = self._waited
            return Answer(total, finite_flag(total) if watch else TRUE)
        senders, parts = _senders(request, self._channel.transport)
        payloads: list[Payload | None] = []
        finite = None
        for sender, expected, wire in zip(senders, parts, self._waited, strict=True):
            if wire is None:  # a neighbour that is lost, where the transport goes on without it
                payloads.append(None)
                continue
            payload = Payload(wire[: wire_bytes(expected)], expected)
            good = check_header(payload, PayloadHeader(sender, self._channel.fingerprint, self._number))
            finite = good if finite is None else finite & good
            payloads.append(payload)
        return Answer(
            payloads[0] if isinstance(request, Broadcast) else payloads, TRUE if finite is None else finite
        )


TRUE = torch.tensor(True)


def finite_flag(x: Tensor) -> Tensor:
    """Whether all of ``x`` is finite, as a bool tensor on its device (a GPU is not waited for)."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.tensor(kernels.all_finite(x.contiguous()))
    return torch.isfinite(x).all()


def payloads_of(request: Request) -> tuple[Payload, ...]:
    """What a request sends, sealed; a sum is not."""
    if isinstance(request, AllToAll):
        return request.payloads
    return () if isinstance(request, AllReduce) else (request.payload,)


def _senders(
    request: AllGather | AllToAll | NeighborExchange | Broadcast, transport: Transport
) -> tuple[tuple[int, ...], list[Parts]]:
    """Who sent each buffer of the answer, and what must be in it."""
    group = request.group or tuple(range(transport.size))
    if isinstance(request, AllGather):
        return group, list(request.parts or [request.payload.parts] * len(group))
    if isinstance(request, AllToAll):
        return group, [request.payloads[group.index(transport.rank)].parts] * len(group)
    if isinstance(request, NeighborExchange):
        return request.neighbours, [request.payload.parts] * len(request.neighbours)
    return (request.source,), [request.payload.parts]


def _poisoned(x: Tensor, finite: Tensor) -> Tensor:
    if x.is_floating_point():
        if x.device.type == "cpu":
            return x if finite else x.fill_(float("nan"))
        return torch.where(finite, x, torch.full((), float("nan"), dtype=x.dtype, device=x.device))
    return x
