"""Requests carried by MPI, on a communicator of distcomp's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Group, Pending, Primitives, Request, in_rank_order, is_summed_directly
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.mpi.library import addends, library, raw, reduction
from distcomp.transports.mpi.progress import Flight, take_off


class MPITransport:
    """Carries requests over the communicator ``comm``. Waits at most ``timeout_s``, then names who does not
    answer.

    ===================== ======================================================================
    ``all_reduce``        ``MPI_Iallreduce``; up to 8 kB ``MPI_Iallgather``, added in rank order
    ``all_gather``        ``MPI_Iallgatherv``
    ``all_to_all``        ``MPI_Ialltoallv``
    ``neighbor_exchange`` ``MPI_Isend`` and ``MPI_Irecv``, every receive posted before the first send
    ``broadcast``         ``MPI_Ibcast``
    ===================== ======================================================================

    Transports of one communicator between whose neighbours messages are under way at the same time have
    another ``lane`` each.
    """

    def __init__(self, comm: Any, heartbeat: Heartbeat, timeout_s: float, lane: int = 0) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self._comm = comm
        self._heartbeat = heartbeat
        self._lane = lane
        self._patience_s = max(1.0, timeout_s - heartbeat.diagnosis_s)
        self._groups: dict[Group, Any] = {}

    def start(self, request: Request, through: Primitives | None = None) -> Pending:
        """``through``: primitives made of this transport's. Raises PeerLost where MPI refuses."""
        try:
            return request.drive(through or self)
        except library().Exception as error:
            raise self._heartbeat.diagnose(RuntimeError(f"MPI: {error}")) from error

    def close(self) -> None:
        """Nothing to close: communicators live as long as MPI."""

    def all_reduce(self, x: Tensor, group: Group | None) -> MpiMessages:
        comm, nbytes = self._communicator(group), x.numel() * x.element_size()
        if is_summed_directly(nbytes, comm.size):
            everyone = torch.empty(comm.size, *x.shape, dtype=x.dtype)
            request = comm.Iallgather(raw(x), raw(everyone))
            return self._pending_messages([request], (x, everyone), lambda: in_rank_order(list(everyone)))
        buffer = addends(x)
        request = comm.Iallreduce(library().IN_PLACE, buffer, reduction("SUM", x.dtype))
        return self._pending_messages([request], (x, buffer), lambda: x)

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> MpiMessages:
        comm, counts = self._communicator(group), list(sizes)
        everything = wire.new_empty(sum(counts))
        data, kind = raw(everything)
        request = comm.Iallgatherv(raw(wire[: counts[comm.rank]]), [data, counts, kind])
        return self._pending_messages([request], (wire, data), lambda: list(torch.split(everything, counts)))

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> MpiMessages:
        comm, counts = self._communicator(group), list(sizes)
        sent, received = torch.cat(list(wires)), torch.empty(sum(counts), dtype=torch.uint8)
        (sent_data, kind), (received_data, _) = raw(sent), raw(received)
        request = comm.Ialltoallv(
            [sent_data, [wire.numel() for wire in wires], kind], [received_data, counts, kind]
        )
        buffers = (sent_data, received_data)
        return self._pending_messages([request], buffers, lambda: list(torch.split(received, counts)))

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> MpiMessages:
        comm, members = self._communicator(group), group or tuple(range(self.size))
        peers = [members.index(neighbor) for neighbor in neighbors]
        received = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        receives = [
            comm.Irecv(raw(buffer), peer, self._lane) for peer, buffer in zip(peers, received, strict=True)
        ]
        sends = [comm.Isend(raw(wire), peer, self._lane) for peer, wire in zip(peers, wires, strict=True)]
        return self._pending_messages(receives + sends, (wires, received), lambda: received)

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> MpiMessages:
        position = (group or tuple(range(self.size))).index(source)
        request = self._communicator(group).Ibcast(raw(wire), position)
        return self._pending_messages([request], wire, lambda: [wire])

    def _pending_messages(
        self, requests: list[Any], buffers: object, result: Callable[[], Any]
    ) -> MpiMessages:
        """``buffers`` must stay alive until MPI's requests are done; ``result`` is what they then come to."""
        return MpiMessages(take_off(requests, buffers), result, self._heartbeat, self._patience_s)

    def _communicator(self, members: Group | None) -> Any:
        """The communicator of some ranks; made when first asked for, which its members do together."""
        if members is None or len(members) == self.size:
            return self._comm
        if members not in self._groups:
            group = self._comm.group.Incl(members)
            self._groups[members] = self._comm.Create_group(group, tag=sum(members) % 30_000)
        return self._groups[members]


@dataclass
class MpiMessages:
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
