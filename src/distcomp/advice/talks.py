"""What a method says, and how long it thinks in between: its conversation held with an echo, here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.exchange import Broadcast, Gather, Mix, Request, Sum, Swap
from distcomp.layout import Layout
from distcomp.methods import Method
from distcomp.methods.base import Outcome, Turn
from distcomp.network.asks import Ask, ask_of, groups_of
from distcomp.network.model import Edge
from distcomp.payload import Part, Payload, Seal, seal
from distcomp.randomness import Key
from distcomp.schedule import at
from distcomp.sync.averaging import Averaging, Levels, Track, gather, scatter, tracks_of
from distcomp.sync.gossip import Gossip
from distcomp.topology import resolve
from distcomp.transports.base import TRUE, Channel
from distcomp.transports.conversation import Conversation
from distcomp.transports.ledger import Ledger

REPEATS, WARM_UP = 5, 2


def clock() -> float:
    """Seconds of arithmetic: of this thread on a core, where torch has but this one, so that it does not
    matter who else wants the core; else seconds."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Round:
    """``work_s`` of arithmetic, then a request."""

    work_s: float
    ask: Ask


@dataclass(frozen=True)
class Talk:
    """A conversation of one slab: its rounds, and the arithmetic after the last answer. ``share``: of the
    steps in which it is held."""

    rounds: tuple[Round, ...]
    last_s: float
    share: float = 1.0

    @property
    def work_s(self) -> float:
        """All of its arithmetic."""
        return sum(one.work_s for one in self.rounds) + self.last_s


def talks_of(method: Method, layouts: Sequence[Layout], ranks: int) -> tuple[Talk, ...]:
    """What rank 0 of ``ranks`` says about each bucket in a step, timed here on one thread.

    The buckets take turns, so that each finds the caches as it will find them.
    """
    held: list[list[Held]] = [[] for _ in layouts]
    states: list[Any] = [method.init(layout) for layout in layouts]
    slabs = [_gradient(layout) for layout in layouts]

    def begin(bucket: int, rank: int, step: int) -> Conversation:
        turn = Turn(rank, ranks, layouts[bucket], step, Key.of("rehearsal", step))
        return Conversation(method, slabs[bucket].clone(), states[bucket], turn)

    for step in range(WARM_UP + REPEATS):
        for bucket in range(len(layouts)):
            talk = begin(bucket, 0, step)
            held[bucket].append(_hold(talk, 0, ranks))
            assert talk.outcome is not None
            states[bucket] = talk.outcome.state
    last = WARM_UP + REPEATS
    return tuple(
        _summary(one, lambda rank, bucket=bucket: begin(bucket, rank, last), ranks, frozenset())  # type: ignore[misc]
        for bucket, one in enumerate(held)
    )


def exchanges_of(averaging: Averaging | Levels, layout: Layout, ranks: int) -> tuple[Talk, ...]:
    """What rank 0 says about the model at each of an averaging's exchanges."""
    tracks = [tracks_of(averaging, layout, rank, ranks) for rank in range(ranks)]
    return tuple(_averaging_talk(column, ranks) for column in map(list, zip(*tracks, strict=True)))


def _averaging_talk(tracks: Sequence[Track], ranks: int) -> Talk:
    layout, averaging = tracks[0].layout, tracks[0].averaging
    model = _gradient(layout)
    step = 0

    def begin(rank: int) -> Conversation:
        if not tracks[rank].state:
            tracks[rank].start(model)
        return tracks[rank].talk(model + 1e-3 * _gradient(layout, 1), step, 0)

    held = []
    for step in range(WARM_UP + REPEATS):  # noqa: B007
        talk = begin(0)
        held.append(_hold(talk, 0, ranks))
        assert talk.outcome is not None
        held[-1][-1] = (held[-1][-1][0] + _landed_s(tracks[0], talk.outcome), None)
    edges = resolve(averaging.topology, ranks).edges if isinstance(averaging, Gossip) else frozenset()
    return replace(_summary(held, begin, ranks, edges), share=1 / at(averaging.period, 0))


def _landed_s(track: Track, outcome: Outcome) -> float:
    """To read the weights before an exchange and after it, and to write them."""
    flat = torch.zeros(track.layout.numel)
    views = {segment.name: piece for segment, piece in track.layout.pieces(flat)}
    whole = Layout(tuple(replace(one, start=0) for one in track.layout.segments))
    begin_s = clock()
    gather(views, whole)
    scatter(views, whole, track.land(outcome, gather(views, whole)))
    return clock() - begin_s


Held = list[tuple[float, Request | None]]


def _summary(
    held: Sequence[Held], begin: Callable[[int], Conversation], ranks: int, edges: frozenset[Edge]
) -> Talk:
    """Medians over the repetitions; who asks within which group is found out by asking every rank."""
    kept = held[WARM_UP:]
    requests = [request for _, request in kept[-1] if request is not None]
    works_s = [statistics.median(times) for times in zip(*([s for s, _ in one] for one in kept), strict=True)]
    if any(request.group for request in requests):
        everyone = [[request for _, request in _hold(begin(rank), rank, ranks)] for rank in range(ranks)]
        columns = list(zip(*everyone, strict=True))[:-1]
        groups = [groups_of([one for one in column if one is not None]) for column in columns]
    else:
        groups = [None] * len(requests)
    asks = [ask_of(request, ranks, group, edges) for request, group in zip(requests, groups, strict=True)]
    rounds = tuple(Round(work_s, ask) for work_s, ask in zip(works_s, asks, strict=False))
    return Talk(rounds, works_s[-1])


@torch.no_grad()
def _hold(talk: Conversation, rank: int, ranks: int) -> Held:
    """Every request, with the seconds of arithmetic before it: thinking, sealing, opening and checking."""
    echo = _Echo(rank, ranks)
    channel = Channel(echo, 0, Ledger())
    held: Held = []
    exchange = None
    while True:
        begin_s = clock()
        answer = exchange.open(talk.watch) if exchange is not None else None
        request = talk.ask(answer)
        exchange = channel.prepare(request, talk.finite) if request is not None else None
        held.append((clock() - begin_s, request))
        if exchange is None:
            return held
        echo.exchange = channel.exchange
        exchange.start()
        exchange.wait()


def _gradient(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))


class _Echo:
    """A transport on which everybody says what one says oneself; where that does not fit, zeros."""

    started_s = finished_s = 0.0

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.exchange = 0
        self._answer: Any = None

    def start(self, request: Request) -> _Echo:
        self._answer = self._answered(request)
        return self

    def wait(self) -> Any:
        return self._answer

    def _answered(self, request: Request) -> Any:
        group = request.group or tuple(range(self.size))
        if isinstance(request, Sum):
            return request.x
        if isinstance(request, Gather):
            parts = request.parts or (request.payload.parts,) * len(group)
            return [self._said(request.payload, one, rank) for one, rank in zip(parts, group, strict=True)]
        if isinstance(request, Swap):
            own = request.payloads[group.index(self.rank)]
            return [self._said(own, own.parts, rank) for rank in group]
        if isinstance(request, Mix):
            return [self._said(request.payload, request.payload.parts, rank) for rank in request.neighbours]
        assert isinstance(request, Broadcast)
        return [self._said(request.payload, request.payload.parts, request.source)]

    def _said(self, own: Payload, parts: tuple[Part, ...], rank: int) -> Tensor:
        """One's own payload, sealed by ``rank``."""
        said = Payload.empty(parts)
        if parts == own.parts:
            said.wire.copy_(own.wire)
        else:
            said.wire.zero_()
        seal(said, Seal(rank, 0, self.exchange), TRUE)
        return said.wire
