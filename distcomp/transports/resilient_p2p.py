"""Neighbours exchange over a connection of their own each, so that the loss of one affects no other.

A Gloo group falls silent as a whole when one wait in it times out. Here every edge of the graph is a group of
two; an edge whose other end dies, or does not answer in time, is given up, and the others go on. What all
ranks ask together is asked of those who come to a meeting, held in the rendezvous store.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, Request
from distcomp.errors import DistcompError, PeerLost
from distcomp.runtime.channel import Transport
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.types import PrefixStore, Store

POLL_S = 0.02
PATIENCE_S = 2.0
"""So long one waits before one looks who has no heartbeat."""


class ResilientP2P:
    """Carries what neighbors ask over ``edges``, those of this rank among them; the rest over ``everyone``,
    or, if it is a sum, over who is left.

    ``lost`` holds the ranks that are known to be gone. The store must outlive every rank.
    """

    def __init__(
        self,
        everyone: Transport,
        edges: Iterable[tuple[int, int]],
        store: Store,
        heartbeat: Heartbeat,
        timeout_s: float,
    ) -> None:
        self.rank, self.size = everyone.rank, everyone.size
        self.lost: set[int] = set()
        self._everyone = everyone
        self._store = store
        self._heartbeat = heartbeat
        self._patience = timedelta(seconds=timeout_s)
        self._meetings = 0
        self._came = tuple(range(self.size))
        self._survivors: dict[tuple[int, ...], Any] = {}
        self._edges: dict[int, Any] = {}
        self._waiting = ThreadPoolExecutor(thread_name_prefix="distcomp-edge")
        for low, high in sorted(edges):  # in one order on all ranks: each waits for the other end
            if self.rank in (low, high):
                other = low + high - self.rank
                self._edges[other] = self._group(f"edge{low}-{high}", (low, high))

    def start(self, request: Request) -> Pending:
        if request.neighbors_only is not None:
            return request.drive(self)
        self._came = self._meet()
        return self._everyone.start(request) if len(self._came) == self.size else request.drive(self)

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> _Mixing:
        under_way: dict[int, tuple[Future[None], Tensor]] = {}
        for neighbor, wire, size in zip(neighbors, wires, sizes, strict=True):
            other, received = int(neighbor > self.rank), torch.empty(size, dtype=torch.uint8)
            edge = self._edges[neighbor]
            try:
                works = [edge.recv([received], other, 0), edge.send([wire], other, 0)]
            except RuntimeError:  # the other end has gone since the last exchange
                self.lost.add(neighbor)
            else:
                under_way[neighbor] = self._waiting.submit(self._wait, works), received
        return _Mixing(self, tuple(neighbors), under_way)

    def all_reduce(self, x: Tensor, group: Group | None) -> _Joint:
        """Over those who came to the last meeting, where some are lost."""
        if self._came not in self._survivors:
            self._survivors[self._came] = self._group(f"survivors{self._meetings}", self._came)
        work = self._survivors[self._came].allreduce([x])
        return _Joint(work, x, self._heartbeat, self._patience)

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Pending:
        raise self._only_sums()

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Pending:
        raise self._only_sums()

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> Pending:
        raise self._only_sums()

    def _only_sums(self) -> DistcompError:
        return DistcompError(f"ranks {sorted(self.lost)} are lost; only sums are asked of those who are left")

    @property
    def cut_off(self) -> bool:
        """Whether no neighbour is left."""
        return bool(self._edges) and self.lost >= set(self._edges)

    def close(self) -> None:
        """Let go of the connections."""
        self._waiting.shutdown(wait=False)
        self._edges.clear()
        self._survivors.clear()

    def _group(self, name: str, members: tuple[int, ...]) -> Any:
        store = PrefixStore(f"distcomp/{self._heartbeat.name}/{name}", self._store)
        return dist.ProcessGroupGloo(store, members.index(self.rank), len(members), self._patience)

    def _wait(self, works: list[Any]) -> None:
        for work in works:
            work.wait(self._patience)

    def answered(self, neighbour: int, done: Future[None]) -> bool:
        """Wait for a neighbour, as long as it is alive and patience lasts; whether it answered.

        It may itself be waiting for one that died: that it is alive counts, not how long it takes.
        """
        while True:
            try:
                done.result(PATIENCE_S)
                return True
            except TimeoutError:
                if neighbour not in self._heartbeat.silent():
                    continue
            except RuntimeError:
                pass
            self.lost.add(neighbour)
            return False

    def _meet(self) -> tuple[int, ...]:
        """Who takes part in what all ranks ask: those who come, as the first who knows them writes down."""
        self._meetings += 1
        key = f"distcomp/{self._heartbeat.name}/meeting{self._meetings}"
        self._store.set(f"{key}/{self.rank}", "here")
        missing = set(range(self.size)) - self.lost - {self.rank}
        begin_s = time.monotonic()
        while missing := {rank for rank in missing if not self._store.check([f"{key}/{rank}"])}:
            if time.monotonic() - begin_s > PATIENCE_S:
                missing -= self._heartbeat.silent()
            if time.monotonic() - begin_s > self._patience.total_seconds():
                raise PeerLost(
                    f"ranks {sorted(missing)} are alive but did not come to average; "
                    "restart from a checkpoint"
                )
            threading.Event().wait(POLL_S)
        came = [rank for rank in range(self.size) if self._store.check([f"{key}/{rank}"])]
        decided = json.loads(self._store.compare_set(f"{key}/members", "", json.dumps(came)))
        if self.rank not in decided:
            raise PeerLost(f"rank {self.rank} was taken for dead by the others; restart it from a checkpoint")
        self.lost = set(range(self.size)) - set(decided)
        return tuple(decided)


@dataclass
class _Mixing:
    """An exchange with neighbours under way. Those who do not answer are lost, and their answer is None."""

    edges: ResilientP2P
    neighbours: tuple[int, ...]
    under_way: dict[int, tuple[Future[None], Tensor]]
    started_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self) -> None:
        self.started_s = time.perf_counter()

    def wait(self) -> list[Tensor | None]:
        """Raises PeerLost when no neighbour is left."""
        answers = {neighbour: self._answer(neighbour) for neighbour in self.neighbours}
        self.finished_s = time.perf_counter()
        if self.edges.cut_off:
            raise PeerLost(
                f"all neighbours of rank {self.edges.rank} are lost: it is cut off; restart from a checkpoint"
            )
        return list(answers.values())

    def _answer(self, neighbour: int) -> Tensor | None:
        if neighbour not in self.under_way:
            return None
        done, received = self.under_way[neighbour]
        return received if self.edges.answered(neighbour, done) else None


@dataclass
class _Joint:
    """A sum over the survivors under way."""

    work: Any
    x: Tensor
    heartbeat: Heartbeat
    patience: timedelta
    started_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self) -> None:
        self.started_s = time.perf_counter()

    def wait(self) -> Tensor:
        """Raises PeerLost when a survivor dies now."""
        try:
            self.work.wait(self.patience)
        except RuntimeError as error:
            raise self.heartbeat.diagnose(error) from error
        self.finished_s = time.perf_counter()
        return self.x
