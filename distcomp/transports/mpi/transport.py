"""Requests carried by MPI, on a communicator of distcomp's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    Group,
    NeighborExchange,
    Request,
    is_summed_directly,
)
from distcomp.payload import wire_bytes
from distcomp.runtime.sums import in_rank_order
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.mpi.library import addends, library, raw, reduction
from distcomp.transports.mpi.progress import Flight, take_off


class MPITransport:
    """Carries requests over the communicator ``comm``. Waits at most ``timeout_s``, then names who does not
    answer.

    ================ ======================================================================
    ``AllReduce``          ``MPI_Iallreduce``; up to 8 kB ``MPI_Iallgather``, added in rank order
    ``AllGather``       ``MPI_Iallgatherv``
    ``AllToAll``         ``MPI_Ialltoallv``
    ``NeighborExchange``          ``MPI_Isend`` and ``MPI_Irecv``, every receive posted before the first send
    ``Broadcast``    ``MPI_Ibcast``
    ================ ======================================================================
    """

    def __init__(self, comm: Any, heartbeat: Heartbeat, timeout_s: float) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self._comm = comm
        self._heartbeat = heartbeat
        self._patience_s = max(1.0, timeout_s - heartbeat.diagnosis_s)
        self._groups: dict[Group, Any] = {}

    def start(self, request: Request) -> PendingMessages:
        """Raises PeerLost where MPI refuses."""
        try:
            requests, buffers, result = self._post(request)
        except library().Exception as error:
            raise self._heartbeat.diagnose(RuntimeError(f"MPI: {error}")) from error
        return PendingMessages(take_off(requests, buffers), result, self._heartbeat, self._patience_s)

    def close(self) -> None:
        """Nothing to close: communicators live as long as MPI."""

    def _post(self, request: Request) -> tuple[list[Any], object, Callable[[], Any]]:
        comm = self._communicator(request.group)
        if isinstance(request, AllReduce):
            return _sum(comm, request.x)
        if isinstance(request, AllGather):
            parts = request.parts or (request.payload.parts,) * comm.size
            return _gather(comm, request.payload.wire, [wire_bytes(one) for one in parts])
        if isinstance(request, AllToAll):
            return _swap(comm, [payload.wire for payload in request.payloads])
        if isinstance(request, NeighborExchange):
            return _mix(comm, request, request.group or tuple(range(self.size)))
        return _broadcast(comm, request, request.group or tuple(range(self.size)))

    def _communicator(self, members: Group | None) -> Any:
        """The communicator of some ranks; made when first asked for, which its members do together."""
        if members is None or len(members) == self.size:
            return self._comm
        if members not in self._groups:
            group = self._comm.group.Incl(members)
            self._groups[members] = self._comm.Create_group(group, tag=sum(members) % 30_000)
        return self._groups[members]


Posted = tuple[list[Any], object, Callable[[], Any]]
"""MPI's requests, what must stay alive until they are done, and what they then come to."""


def _sum(comm: Any, x: Tensor) -> Posted:
    nbytes = x.numel() * x.element_size()
    if is_summed_directly(nbytes, comm.size):
        everyone = torch.empty(comm.size, *x.shape, dtype=x.dtype)
        request = comm.Iallgather(raw(x), raw(everyone))
        return [request], (x, everyone), lambda: in_rank_order(list(everyone))
    buffer = addends(x)
    request = comm.Iallreduce(library().IN_PLACE, buffer, reduction("SUM", x.dtype))
    return [request], (x, buffer), lambda: x


def _gather(comm: Any, own: Tensor, sizes: list[int]) -> Posted:
    everything = own.new_empty(sum(sizes))
    data, kind = raw(everything)
    request = comm.Iallgatherv(raw(own[: sizes[comm.rank]]), [data, sizes, kind])
    return [request], (own, data), lambda: list(torch.split(everything, sizes))


def _swap(comm: Any, outgoing: list[Tensor]) -> Posted:
    sizes = [wire.numel() for wire in outgoing]
    here = sizes[comm.rank]
    sent, received = torch.cat(outgoing), torch.empty(comm.size * here, dtype=torch.uint8)
    (sent_data, kind), (received_data, _) = raw(sent), raw(received)
    request = comm.Ialltoallv([sent_data, sizes, kind], [received_data, [here] * comm.size, kind])
    return [request], (sent_data, received_data), lambda: list(torch.split(received, here))


def _mix(comm: Any, request: NeighborExchange, members: Group) -> Posted:
    wire = request.payload.wire
    peers = [members.index(neighbour) for neighbour in request.neighbours]
    received = [torch.empty_like(wire) for _ in peers]
    receives = [comm.Irecv(raw(buffer), peer) for peer, buffer in zip(peers, received, strict=True)]
    sends = [comm.Isend(raw(wire), peer) for peer in peers]
    return receives + sends, (wire, received), lambda: received


def _broadcast(comm: Any, request: Broadcast, members: Group) -> Posted:
    wire = request.payload.wire
    return [comm.Ibcast(raw(wire), members.index(request.source))], wire, lambda: [wire]


@dataclass
class PendingMessages:
    """A request that MPI carries."""

    flight: Flight
    result: Callable[[], Any]
    heartbeat: Heartbeat
    patience_s: float

    @property
    def started_s(self) -> float:
        return self.flight.started_s

    @property
    def finished_s(self) -> float:
        return self.flight.finished_s

    def wait(self) -> Any:
        """Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout."""
        try:
            self.flight.wait(self.patience_s)
        except RuntimeError as error:
            raise self.heartbeat.diagnose(error) from error
        return self.result()
