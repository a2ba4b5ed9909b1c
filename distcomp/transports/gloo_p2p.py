"""Requests carried point to point over Gloo.

Gloo's own all-to-all interleaves sends with the notices that a receiver is ready, which then wait behind the
data of the same connection: at 100 Mbit/s between 4 ranks it took 1.3 to 1.7 times the time of its bytes.
Here every receive of a request is posted before its first send. A tensor of a few kilobytes is summed by
sending it to everyone: one hop instead of the ring's ``2 (n-1)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, Primitives, Request, in_rank_order, is_summed_directly
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.torchdist import Subgroups, check_group

LENGTHS = 2**29
"""Tags of one lane; Gloo has 2^31."""


class GlooP2P:
    """Carries requests over the Gloo process group ``group``. Waits at most ``timeout_s``, then names who
    does not answer.

    Nothing waits before it must: requests are started in the order in which every rank starts them, and Gloo
    matches messages of one length between two ranks in that order. Transports of one group that are used by
    several threads at a time have another ``lane`` each (0 to 3): their messages never meet.
    """

    def __init__(
        self, group: dist.ProcessGroup, heartbeat: Heartbeat, timeout_s: float, lane: int = 0
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._groups = Subgroups(group)
        self._heartbeat = heartbeat
        self._lane = lane
        self._patience = timedelta(seconds=max(1.0, timeout_s - heartbeat.diagnosis_s))

    def start(self, request: Request, through: Primitives | None = None) -> Pending:
        """``through``: primitives made of this transport's. Raises PeerLost where a connection is gone
        already."""
        check_group()
        try:
            return request.drive(through or self)
        except RuntimeError as error:
            raise self._heartbeat.diagnose(error) from error

    def close(self) -> None:
        """Nothing to close: groups are kept for who comes next."""

    def all_reduce(self, x: Tensor, group: Group | None) -> Pending:
        nbytes, count = x.numel() * x.element_size(), len(self._members(group))
        if not is_summed_directly(nbytes, count):
            among = self._groups.of(group)
            return self._pending_messages(
                [lambda: dist.all_reduce(x, group=among, async_op=True)], [], lambda: x
            )
        everyone = self.all_gather(x.reshape(-1).view(torch.uint8), [nbytes] * count, group)
        return Then(everyone, lambda buffers: _sum_in_order(buffers, x))

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Pending:
        return self.all_to_all([wire] * len(sizes), sizes, group)

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Pending:
        """What goes to the next rank and comes from the last one first, then from one further off; one's own
        buffer is itself."""
        members, among = self._members(group), self._groups.of(group)
        count, here = len(members), members.index(self.rank)
        received = [torch.empty(0, dtype=torch.float32)] * count
        received[here] = wires[here]
        sends, receives = [], []
        for shift in range(1, count):
            left, right = (here - shift) % count, (here + shift) % count
            received[left] = torch.empty(sizes[left], dtype=torch.uint8)
            receives.append(
                dist.irecv(received[left], group=among, group_src=left, tag=self._tag(received[left]))
            )
            sends.append(
                partial(dist.isend, wires[right], group=among, group_dst=right, tag=self._tag(wires[right]))
            )
        return self._pending_messages(sends, receives, lambda: received)

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> Pending:
        members, among = self._members(group), self._groups.of(group)
        places = [members.index(neighbor) for neighbor in neighbors]
        received = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        receives = [
            dist.irecv(buffer, group=among, group_src=position, tag=self._tag(buffer))
            for position, buffer in zip(places, received, strict=True)
        ]
        sends = [
            partial(dist.isend, wire, group=among, group_dst=position, tag=self._tag(wire))
            for position, wire in zip(places, wires, strict=True)
        ]
        return self._pending_messages(sends, receives, lambda: received)

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> GlooMessages:
        position, among = self._members(group).index(source), self._groups.of(group)
        work = partial(dist.broadcast, wire, group=among, group_src=position, async_op=True)
        return self._pending_messages([work], [], lambda: [wire])

    def _members(self, group: Group | None) -> Group:
        return group or tuple(range(self.size))

    def _tag(self, wire: Tensor) -> int:
        """The lane, and the length in bytes: who expects another one does not receive the message, and its
        wait ends in time. Gloo would abort the process."""
        return self._lane * LENGTHS + wire.numel() * wire.element_size() % LENGTHS

    def _pending_messages(
        self, sends: Sequence[Callable[[], Any]], receives: list[Any], result: Callable[[], Any]
    ) -> GlooMessages:
        begin_s = time.perf_counter()
        works = [*receives, *(send() for send in sends)]
        return GlooMessages(works, result, self._heartbeat, self._patience, begin_s)


def _sum_in_order(buffers: list[Tensor], like: Tensor) -> Tensor:
    """Added in rank order, so that every rank holds the same bits."""
    return in_rank_order([buffer.view(like.dtype).view_as(like) for buffer in buffers])


@dataclass
class Then:
    """A request under way, and what is made of its answer."""

    request: Pending
    make: Callable[[Any], Any]

    @property
    def started_s(self) -> float:
        return self.request.started_s

    @property
    def finished_s(self) -> float:
        return self.request.finished_s

    def wait(self) -> Any:
        """Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout."""
        return self.make(self.request.wait())


@dataclass
class GlooMessages:
    """A request whose receives are posted and whose sends are under way."""

    works: list[Any]
    result: Callable[[], Any]
    heartbeat: Heartbeat
    patience: timedelta
    started_s: float
    finished_s: float = 0.0

    def wait(self) -> Any:
        """Raises PeerLost, naming the rank, when a peer dies or does not answer within the timeout."""
        try:
            for work in self.works:
                work.wait(self.patience)
        except RuntimeError as error:
            raise self.heartbeat.diagnose(error) from error
        self.finished_s = time.perf_counter()
        return self.result()
