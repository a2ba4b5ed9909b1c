"""Requests carried by torch.distributed, on a process group of distcomp's own (Gloo, NCCL, MPI)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, Request
from distcomp.errors import DistcompError
from distcomp.private_torch import timeout_of
from distcomp.transports.heartbeat import Heartbeat


class Subgroups:
    """The process groups of some of a group's ranks; each is made when first asked for, which its members do
    together. They are kept as long as the group is, for whoever uses it next."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._whole = group
        self._made = _SUBGROUPS.setdefault(group, {})

    def of(self, members: Group | None) -> dist.ProcessGroup:
        if members is None or len(members) == dist.get_world_size(self._whole):
            return self._whole
        if members not in self._made:
            ranks = [dist.get_global_rank(self._whole, member) for member in members]
            self._made[members] = dist.new_group(
                ranks,
                timeout=timeout_of(self._whole),
                backend=dist.get_backend(self._whole),
                use_local_synchronization=True,
            )
        return self._made[members]


_SUBGROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[Group, dist.ProcessGroup]] = WeakKeyDictionary()


def check_group() -> None:
    """Raise DistcompError where torch.distributed has been left."""
    if not dist.is_initialized():
        raise DistcompError(
            "the process group was destroyed while a method was attached; detach before "
            "torch.distributed.destroy_process_group()"
        )


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

    def start(self, request: Request) -> Pending:
        check_group()
        return request.drive(self)

    def all_reduce(self, x: Tensor, group: Group | None) -> PendingWork:
        work = dist.all_reduce(x, group=self._groups.of(group), async_op=True)
        return self._pending([work], lambda: x, keep=x)

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> PendingWork:
        longest = max(sizes)
        if wire.numel() < longest:  # Gloo hangs in an all-gather of unequal lengths
            wire = torch.cat([wire, wire.new_zeros(longest - wire.numel())])
        buffers = list(torch.split(wire.new_empty(len(sizes) * longest), longest))
        work = dist.all_gather(buffers, wire, group=self._groups.of(group), async_op=True)
        return self._pending([work], lambda: buffers, keep=wire)

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> PendingWork:
        outgoing, incoming_sizes = torch.cat(list(wires)), list(sizes)
        incoming = outgoing.new_empty(sum(incoming_sizes))
        work = dist.all_to_all_single(
            incoming,
            outgoing,
            incoming_sizes,
            [wire.numel() for wire in wires],
            group=self._groups.of(group),
            async_op=True,
        )
        return self._pending([work], lambda: list(torch.split(incoming, incoming_sizes)), keep=outgoing)

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> PendingWork:
        among = self._groups.of(group)
        received = [wire.new_empty(size) for wire, size in zip(wires, sizes, strict=True)]
        operations = []
        for neighbor, wire, buffer in zip(neighbors, wires, received, strict=True):
            peer = dist.get_global_rank(self.group, neighbor)
            operations.append(dist.P2POp(dist.isend, wire, peer, among))
            operations.append(dist.P2POp(dist.irecv, buffer, peer, among))
        works = dist.batch_isend_irecv(operations) if operations else []
        return self._pending(works, lambda: received, keep=wires[0] if wires else None)

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> PendingWork:
        peer = dist.get_global_rank(self.group, source)
        work = dist.broadcast(wire, peer, group=self._groups.of(group), async_op=True)
        return self._pending([work], lambda: [wire], keep=wire)

    def _pending(
        self, works: list[Any], result: Callable[[], Any], keep: Tensor | None = None
    ) -> PendingWork:
        return PendingWork(works, result, self._heartbeat, self._timeout_s, keep)

    def close(self) -> None:
        """Nothing to close: groups are kept for who comes next."""


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
