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

import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import Group, Pending, Request
from distcomp.errors import DistcompError, PeerLost
from distcomp.runtime.channel import Transport
from distcomp.transports.bounded import STORE_S, bounded
from distcomp.transports.edge import NeighbourConnection
from distcomp.transports.heartbeat import NOTHING, Heartbeat
from distcomp.transports.patience import DEAD, EVERYONE, LEFT, LOOK_S, NEIGHBOURS, Patience
from distcomp.transports.returning import POLL_S, TRAINS, WAITS, Return, mark_returned
from distcomp.transports.roll_call import RollCall
from distcomp.transports.types import PrefixStore, Store
from distcomp.transports.verdict import ranks

ASK_S = 0.2

OPEN_S = 5.0
"""So long an edge that is opened again may take to connect, at most: both ends have said that they come."""


class ResilientP2P:
    """Carries what neighbors ask over ``edges``, those of this rank among them; the rest over ``everyone``,
    or, if it is a sum, over who is left.

    ``lost`` says why one goes on without some ranks: they are gone, or did not answer within ``timeout_s``
    although they waited for nobody themselves (:mod:`distcomp.transports.patience`). A rank that was given up
    finds its connections closed when it comes back; they are opened again, one by one, between two exchanges
    (:mod:`distcomp.transports.returning`). The store must outlive every rank.
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
        self._edges: dict[int, NeighbourConnection] = {}
        for low, high in sorted(edges):  # in one order on all ranks: each waits for the other end
            if self.rank in (low, high):
                group = self._group(f"edge{low}-{high}", (low, high))
                self._edges[low + high - self.rank] = NeighbourConnection(group, int(self.rank == low))
        self._neighbours = frozenset(self._edges)
        self._closed_on: set[int] = set()  # neighbours who have given this rank up
        self._store_is_gone = False  # then nobody comes back; gossip itself needs no store

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
        cut = self._neighbours - set(self._edges)
        self.lost = {
            rank: reason
            for rank, reason in (reasons | self.lost).items()
            if rank not in self._came or rank in cut
        }

    # ------------------------------------------------------------------------- ranks that come back

    def opened(self, number: int) -> list[Opened]:
        """The edges that open again with exchange ``number``, which comes next.

        Raises CutOff where this rank has trained apart from those who gave it up.
        """
        closed = sorted(self._neighbours - set(self._edges))
        opened: list[Opened] = []
        for neighbour in () if self._store_is_gone or not self._edges else closed:
            if self.lost[neighbour] == LEFT:
                continue
            try:
                agreed = self._agreed(neighbour, number)
            except CutOff:
                raise
            except PeerLost:
                self._store_is_gone = True
                return opened
            if agreed and self._open(neighbour, number):
                opened.append(Opened(self, neighbour))
        return opened

    def _agreed(self, neighbour: int, number: int) -> bool:
        """Whether a closed edge opens with exchange ``number``: both ends may be waiting for it."""
        meeting = None
        if neighbour in self._closed_on:
            meeting = self._way(self.rank, neighbour).accept(number)
            if meeting is not None and meeting > number + 2 * self._ahead:
                self._part()
        return meeting == number or self._way(neighbour, self.rank).propose(number, self._ahead)

    def come_back(self, error: CutOff) -> tuple[int, Opened]:
        """Wait to be taken in by a neighbour: the number of its next exchange, and the edge to it.

        Raises PeerLost where none does within ``timeout_s``, or all have left.
        """
        ways = {
            neighbour: self._way(self.rank, neighbour)
            for neighbour in sorted(self._closed_on)
            if self.lost[neighbour] != LEFT
        }
        for way in ways.values():
            way.say(WAITS)
        begin_s = looked_s = time.monotonic()
        while ways and time.monotonic() - begin_s < self._timeout_s:
            for neighbour, way in ways.items():
                if (proposal := way.proposed()) is None:
                    continue
                for other in ways.values():
                    if other is not way:
                        other.say(TRAINS)
                number = way.agree(proposal)
                if number is not None and self._open(neighbour, number):
                    mark_returned(self._store, self._heartbeat.name, self.rank, True)
                    return number, Opened(self, neighbour)
                for each in ways.values():
                    each.say(WAITS)
            if time.monotonic() - looked_s > LOOK_S:
                looked_s, found = time.monotonic(), self._heartbeat.look()
                ways = {j: way for j, way in ways.items() if j not in found.gone | found.left}
            threading.Event().wait(POLL_S)
        raise PeerLost(f"{error}") from error

    @property
    def _ahead(self) -> int:
        """So many exchanges ahead an edge between two that train is opened: no two are further apart."""
        return self.size + 1

    def _way(self, returning: int, host: int) -> Return:
        return Return(self._store, self._heartbeat.name, returning, host)

    def _open(self, neighbour: int, number: int) -> bool:
        """Connect with a neighbour again; whether it came."""
        low, high = sorted((self.rank, neighbour))
        patience_s = min(OPEN_S, self._timeout_s / 2)
        try:
            group = bounded(
                lambda: self._group(f"edge{low}-{high}/{number}", (low, high), patience_s),
                patience_s + 1.0,
                f"rank {neighbour} did not come to connect",
            )
        except (RuntimeError, PeerLost):
            return False
        self._edges[neighbour] = NeighbourConnection(group, int(self.rank == low))
        self._closed_on.discard(neighbour)
        del self.lost[neighbour]
        return True

    def swap(self, neighbour: int, wire: Tensor) -> Tensor | None:
        """Exchange buffers of one length with a neighbour; None, and it is lost, if it does not answer."""
        number = self._heartbeat.progress()
        self._heartbeat.activity = (number, NEIGHBOURS)
        try:
            done, received = self._edges[neighbour].exchange(wire, wire.numel())
            patience = Patience(self._heartbeat, number, NEIGHBOURS, self._timeout_s)
            return received if self.answered(neighbour, done, patience) else None
        finally:
            self._heartbeat.activity = NOTHING

    def _part(self) -> None:
        """Let go of those who were left behind together with this rank: each comes back by itself."""
        for neighbour in list(self._edges):
            self._lose(neighbour, self._given_up)
        self.check_cut_off()

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

    def _group(self, name: str, members: tuple[int, ...], patience_s: float | None = None) -> Any:
        store = PrefixStore(f"distcomp/{self._heartbeat.name}/{name}", self._store)
        patience = timedelta(seconds=patience_s or self._connect_s)
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
        if reason == self._given_up:
            self._closed_on.add(neighbour)
        else:
            with suppress(PeerLost):  # without a store nobody comes back, and gossip needs none
                mark_returned(self._store, self._heartbeat.name, neighbour, False)

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
        return self._given_up

    @property
    def _given_up(self) -> str:
        return f"has closed its connection, as rank {self.rank} did not answer within timeout_s"

    def check_cut_off(self) -> None:
        """Raise CutOff where no neighbour is left."""
        if not self._neighbours or self._edges:
            return
        why = "; ".join(f"rank {rank} {self.lost[rank]}" for rank in sorted(self._neighbours))
        raise CutOff(
            f"rank {self.rank} has lost all its neighbours: {why}; restart it from a checkpoint, and give "
            "distcomp.attach a longer timeout_s where it only computes longer"
        )


class CutOff(PeerLost):
    """No neighbour is left: this rank was given up, or all others are gone."""


@dataclass(frozen=True)
class Opened:
    """An edge that has been opened again, before the first exchange over it."""

    edges: ResilientP2P
    neighbour: int

    def swap(self, wire: Tensor) -> Tensor | None:
        """Exchange buffers of one length with the other end; None, and it is lost, if it does not answer."""
        return self.edges.swap(self.neighbour, wire)


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
        """Raises CutOff when no neighbour is left."""
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
