"""Requests carried by torch.distributed, on a process group of distcomp's own (Gloo, NCCL, MPI)."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, Group, NeighborExchange, Request
from distcomp.payload import wire_bytes
from distcomp.transports.heartbeat import Heartbeat


class Subgroups:
    """The process groups of some of a group's ranks; each is made when first asked for, which its members do
    together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._whole = group
        self._made: dict[Group, dist.ProcessGroup] = {}

    def of(self, members: Group | None) -> dist.ProcessGroup:
        if members is None or len(members) == dist.get_world_size(self._whole):
            return self._whole
        if members not in self._made:
            ranks = [dist.get_global_rank(self._whole, member) for member in members]
            self._made[members] = dist.new_group(
                ranks, backend=dist.get_backend(self._whole), use_local_synchronization=True
            )
        return self._made[members]

    def close(self) -> None:
        for group in self._made.values():
            dist.destroy_process_group(group)
        self._made.clear()


class TorchDist:
    """Carries requests by the collectives of ``group``. Waits at most ``timeout_s``, then names who does not
    answer."""

    def __init__(self, group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._groups = Subgroups(group)

    def start(self, request: Request) -> PendingWork:
        group = self._groups.of(request.group)
        if isinstance(request, AllReduce):
            work = dist.all_reduce(request.x, group=group, async_op=True)
            return self._pending([work], lambda: request.x, keep=request.x)
        if isinstance(request, AllGather):
            return self._gather(request, group)
        if isinstance(request, AllToAll):
            return self._swap(request, group)
        if isinstance(request, NeighborExchange):
            return self._mix(request, group)
        return self._broadcast(request, group)

    def _gather(self, request: AllGather, group: dist.ProcessGroup) -> PendingWork:
        own = request.payload.wire
        longest = max(map(wire_bytes, request.parts)) if request.parts else own.numel()
        if own.numel() < longest:  # Gloo hangs in an all-gather of unequal lengths
            own = torch.cat([own, own.new_zeros(longest - own.numel())])
        everything = own.new_empty(dist.get_world_size(group) * longest)
        buffers = list(torch.split(everything, longest))
        work = dist.all_gather(buffers, own, group=group, async_op=True)
        return self._pending([work], lambda: buffers, keep=own)

    def _swap(self, request: AllToAll, group: dist.ProcessGroup) -> PendingWork:
        here = dist.get_rank(group)
        outgoing = torch.cat([payload.wire for payload in request.payloads])
        sizes = [payload.wire.numel() for payload in request.payloads]
        incoming = outgoing.new_empty(len(sizes) * sizes[here])
        work = dist.all_to_all_single(
            incoming, outgoing, [sizes[here]] * len(sizes), sizes, group=group, async_op=True
        )
        return self._pending([work], lambda: list(torch.split(incoming, sizes[here])), keep=outgoing)

    def _mix(self, request: NeighborExchange, group: dist.ProcessGroup) -> PendingWork:
        own = request.payload.wire
        received = [torch.empty_like(own) for _ in request.neighbours]
        operations = []
        for neighbour, buffer in zip(request.neighbours, received, strict=True):
            peer = dist.get_global_rank(self.group, neighbour)
            operations.append(dist.P2POp(dist.isend, own, peer, group))
            operations.append(dist.P2POp(dist.irecv, buffer, peer, group))
        works = dist.batch_isend_irecv(operations) if operations else []
        return self._pending(works, lambda: received, keep=own)

    def _broadcast(self, request: Broadcast, group: dist.ProcessGroup) -> PendingWork:
        wire = request.payload.wire
        source = dist.get_global_rank(self.group, request.source)
        work = dist.broadcast(wire, source, group=group, async_op=True)
        return self._pending([work], lambda: [wire], keep=wire)

    def _pending(
        self, works: list[Any], result: Callable[[], Any], keep: Tensor | None = None
    ) -> PendingWork:
        return PendingWork(works, result, self._heartbeat, self._timeout_s, keep)

    def close(self) -> None:
        self._groups.close()


class PendingWork:
    """A collective under way, its buffers kept alive."""

    def __init__(
        self,
        works: list[Any],
        result: Callable[[], Any],
        heartbeat: Heartbeat,
        timeout_s: float,
        keep: Tensor | None,
    ) -> None:
        self._works = works
        self._result = result
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._keep = keep
        self.started_s = time.perf_counter()
        self.finished_s = 0.0
        self._note_end()

    def _note_end(self) -> None:
        """Have the end of a collective on the CPU noted when it comes, not when somebody asks."""
        if self._keep is not None and self._keep.device.type != "cpu":
            return
        try:
            future = self._works[-1].get_future()
        except (RuntimeError, IndexError):  # point-to-point work has no future on Gloo
            return
        future.add_done_callback(self._ended)

    def _ended(self, _: object) -> None:
        self.finished_s = time.perf_counter()

    def wait(self) -> Any:
        """Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout."""
        patience = timedelta(seconds=max(1.0, self._timeout_s - self._heartbeat.diagnosis_s))
        try:
            for work in self._works:
                work.wait(patience)
        except RuntimeError as error:
            raise self._heartbeat.diagnose(error) from error
        return self._result()
