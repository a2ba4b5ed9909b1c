"""Neighbours exchange over a connection of their own each, so that the loss of one affects no other.

A Gloo group falls silent as a whole when one wait in it times out. Here every edge of the graph is a group of
two; an edge whose other end dies, leaves, or does not answer in time is given up, and the others go on. What
all ranks ask together is asked of those who come when the roll is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, Request
from distcomp.errors import DistcompError, PeerLost
from distcomp.runtime.channel import Transport
from distcomp.transports.bounded import STORE_S, bounded
from distcomp.transports.heartbeat import NOTHING, Heartbeat
from distcomp.transports.patience import DEAD, EVERYONE, LEFT, LOOK_S, NEIGHBOURS, Patience
from distcomp.transports.roll_call import RollCall
from distcomp.transports.types import PrefixStore, Store
from distcomp.transports.verdict import ranks

FOREVER = timedelta(days=365)
"""Gloo closes a connection whose wait times out: how long one waits is decided here, not there."""

ASK_S = 0.2


class ResilientP2P:
    """Carries what neighbors ask over ``edges``, those of this rank among them; the rest over ``everyone``,
    or, if it is a sum, over who is left.

    ``lost`` says why one goes on without some ranks: they are gone, or did not answer within ``timeout_s``
    although they waited for nobody themselves (:mod:`distcomp.transports.patience`). A rank that was given up
    finds its connections closed when it comes back, and is told. The store must outlive every rank.
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
        self.lost: dict[int, str] = {}
        self._everyone = everyone
        self._store = store
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._connect_s = max(timeout_s, STORE_S)
        self._roll = RollCall(store, heartbeat, self.rank, self.size, timeout_s)
        self._came = tuple(range(self.size))
        self._survivors: dict[tuple[int, ...], Any] = {}
        self._edges: dict[int, _Edge] = {}
        for low, high in sorted(edges):  # in one order on all ranks: each waits for the other end
            if self.rank in (low, high):
                group = self._group(f"edge{low}-{high}", (low, high))
                self._edges[low + high - self.rank] = _Edge(group, int(self.rank == low))
        self._neighbours = frozenset(self._edges)

    @property
    def present(self) -> int:
        """How many took part in what all ranks last asked."""
        return len(self._came)

    def start(self, request: Request) -> Pending:
        waits_for = EVERYONE if request.neighbors_only is None else NEIGHBOURS
        self._heartbeat.activity = (self._heartbeat.progress(), waits_for)
        try:
            if waits_for == NEIGHBOURS:
                return _Watched(request.drive(self), self._heartbeat)
            self._call_roll()
            whole = len(self._came) == self.size
            return _Watched(self._everyone.start(request) if whole else request.drive(self), self._heartbeat)
        except BaseException:
            self._heartbeat.activity = NOTHING
            raise

    def _call_roll(self) -> None:
        self._came, reasons = self._roll.take(self.lost)
        self.lost = reasons | self.lost

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> _Mixing:
        under_way: dict[int, tuple[Future[None], Tensor]] = {}
        for neighbor, wire, size in zip(neighbors, wires, sizes, strict=True):
            edge = self._edges.get(neighbor)
            if edge is None:
                continue
            try:
                under_way[neighbor] = edge.exchange(wire, size)
            except RuntimeError:  # the other end has gone since the last exchange
                self._lose(neighbor, self._why_closed(neighbor))
        patience = Patience(self._heartbeat, self._heartbeat.progress(), NEIGHBOURS, self._timeout_s)
        return _Mixing(self, tuple(neighbors), under_way, patience)

    def all_reduce(self, x: Tensor, group: Group | None) -> _Joint:
        """Over those who came to the last roll call, where some are lost."""
        if self._came not in self._survivors:
            self._survivors[self._came] = self._meet(self._came)
        work = self._survivors[self._came].allreduce([x])
        return _Joint(work, x, self._heartbeat, timedelta(seconds=self._timeout_s))

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Pending:
        raise self._only_sums()

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Pending:
        raise self._only_sums()

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> Pending:
        raise self._only_sums()

    def _only_sums(self) -> DistcompError:
        return DistcompError(f"{ranks(self.lost)} are lost; only sums are asked of those who are left")

    def close(self) -> None:
        """Let go of the connections; one in use is closed, which ends the wait for it."""
        for edge in self._edges.values():
            edge.close()
        self._edges.clear()
        self._survivors.clear()

    def _group(self, name: str, members: tuple[int, ...]) -> Any:
        store = PrefixStore(f"distcomp/{self._heartbeat.name}/{name}", self._store)
        patience = timedelta(seconds=self._connect_s)
        return dist.ProcessGroupGloo(store, members.index(self.rank), len(members), patience)

    def _meet(self, members: tuple[int, ...]) -> Any:
        """Connect those who are left with each other. Raises PeerLost naming who does not come."""
        name = f"survivors{self._heartbeat.progress()}"
        try:
            return bounded(
                lambda: self._group(name, members),
                self._connect_s + 1.0,
                f"{ranks(members)} were not connected within {self._connect_s:g} s",
            )
        except (RuntimeError, PeerLost) as error:
            raise self._heartbeat.diagnose(error) from error

    def answered(self, neighbour: int, done: Future[None], patience: Patience) -> bool:
        """Wait for a neighbour, as long as it is worth it; whether it answered."""
        while True:
            try:
                done.result(LOOK_S)
                return True
            except TimeoutError:
                reason = patience.lost([neighbour]).get(neighbour)
            except RuntimeError:
                reason = self._why_closed(neighbour)
            if reason is not None:
                self._lose(neighbour, reason)
                return False

    def _lose(self, neighbour: int, reason: str) -> None:
        self.lost[neighbour] = reason
        self._edges.pop(neighbour).close()

    def _why_closed(self, neighbour: int) -> str:
        """Why a connection is closed: the other end has died or left, which its board knows at once, or it
        has given this rank up."""
        for _ in range(5):
            found = self._heartbeat.look()
            if neighbour in found.left:
                return LEFT
            if neighbour in found.gone | found.silent:
                return DEAD
            threading.Event().wait(ASK_S)
        return f"has closed its connection, as rank {self.rank} did not answer within timeout_s"

    def check_cut_off(self) -> None:
        """Raise PeerLost where no neighbour is left."""
        if not self._neighbours or self._edges:
            return
        why = "; ".join(f"rank {rank} {self.lost[rank]}" for rank in sorted(self._neighbours))
        raise PeerLost(
            f"rank {self.rank} has lost all its neighbours: {why}; restart it from a checkpoint, and give "
            "distcomp.attach a longer timeout_s where it only computes longer"
        )


class _Edge:
    """The connection with one neighbour, who is ``other`` of two."""

    def __init__(self, group: Any, other: int) -> None:
        self._group = group
        self._other = other
        self._waiting: threading.Thread | None = None

    def exchange(self, wire: Tensor, size: int) -> tuple[Future[None], Tensor]:
        """Send ``wire``, and receive as many bytes as ``size``: done when the future is."""
        received = torch.empty(size, dtype=torch.uint8)
        works = [self._group.recv([received], self._other, 0), self._group.send([wire], self._other, 0)]
        done: Future[None] = Future()

        def wait() -> None:
            try:
                for work in works:
                    work.wait(FOREVER)
            except RuntimeError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._waiting = threading.Thread(target=wait, name="distcomp-edge", daemon=True)
        self._waiting.start()
        return done, received

    def close(self) -> None:
        """Close the connection where something is under way: whoever waits at either end is told.

        Gloo has no call for it, and closes a connection when a wait on it times out: so one does.
        """
        if self._waiting is None or not self._waiting.is_alive():
            return
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, 1).wait(
                timedelta(milliseconds=1)
            )
        self._waiting.join()


@dataclass
class _Watched:
    """A request under way; while it is, others see that this rank waits."""

    pending: Pending
    heartbeat: Heartbeat

    @property
    def started_s(self) -> float:
        return self.pending.started_s

    @property
    def finished_s(self) -> float:
        return self.pending.finished_s

    def wait(self) -> Any:
        try:
            return self.pending.wait()
        finally:
            self.heartbeat.activity = NOTHING


@dataclass
class _Mixing:
    """An exchange with neighbours under way. Those who do not answer are lost, and their answer is None."""

    edges: ResilientP2P
    neighbours: tuple[int, ...]
    under_way: dict[int, tuple[Future[None], Tensor]]
    patience: Patience
    started_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self) -> None:
        self.started_s = time.perf_counter()

    def wait(self) -> list[Tensor | None]:
        """Raises PeerLost when no neighbour is left."""
        answers = {neighbour: self._answer(neighbour) for neighbour in self.neighbours}
        self.finished_s = time.perf_counter()
        self.edges.check_cut_off()
        return list(answers.values())

    def _answer(self, neighbour: int) -> Tensor | None:
        if neighbour not in self.under_way:
            return None
        done, received = self.under_way[neighbour]
        return received if self.edges.answered(neighbour, done, self.patience) else None


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
