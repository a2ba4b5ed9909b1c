"""What a method sends, and how long it computes in between: its exchange, run here with itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, FragmentState, MultiLevel, fragment_states, gather, scatter
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.topology import resolve
from distcomp.collectives import Request
from distcomp.layout import Layout
from distcomp.methods import Method
from distcomp.methods.base import AggregateResult, State, StepContext
from distcomp.network.model import Edge
from distcomp.network.request_sizes import RequestSizes, request_groups, sizes_of, uneven
from distcomp.payload import Payload, PayloadHeader, write_header
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.channel import TRUE, Channel
from distcomp.runtime.ledger import Ledger
from distcomp.schedule import at

REPEATS, WARM_UP = 5, 2


def clock() -> float:
    """Seconds of arithmetic: of this thread on a core, where torch has but this one, so that it does not
    matter who else wants the core; else seconds."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class ProfiledRound:
    """``work_s`` of arithmetic, then a request; ``leads``: the next one follows it at once."""

    work_s: float
    ask: RequestSizes
    leads: bool = False


@dataclass(frozen=True)
class ProfiledExchange:
    """An exchange of one flat buffer: its rounds, and the arithmetic after the last answer. ``share``: of the
    steps in which it takes place."""

    rounds: tuple[ProfiledRound, ...]
    last_s: float
    share: float = 1.0

    @property
    def work_s(self) -> float:
        """All of its arithmetic."""
        return sum(round_.work_s for round_ in self.rounds) + self.last_s


def profiles_of(method: Method, layouts: Sequence[Layout], ranks: int) -> tuple[ProfiledExchange, ...]:
    """What rank 0 of ``ranks`` exchanges of each bucket in a step, timed here on one thread."""
    parts = [ToProfile(method, layout, method.init(layout)) for layout in layouts]
    return tuple(exchange for exchange, _ in profiled(parts, ranks))


@dataclass(frozen=True)
class ToProfile:
    """Whatever exchanges flat buffers of a layout, and the state it begins with."""

    aggregator: Aggregator
    layout: Layout
    state: State


def profiled(parts: Sequence[ToProfile], ranks: int) -> list[tuple[ProfiledExchange, State]]:
    """The exchange of each part in a step, timed here on one thread, and its last state.

    The buffers alternate, so that each finds the caches as it will find them.
    """
    held: list[list[Held]] = [[] for _ in parts]
    states: list[Any] = [part.state for part in parts]
    buffers = [_gradient(part.layout) for part in parts]

    def begin(index: int, rank: int, step: int) -> Aggregation:
        layout = parts[index].layout
        context = StepContext(rank, ranks, layout, step, Key.of("rehearsal", step))
        moved = buffers[index] * (1 + 1e-3 * step)  # another one in each step, for what sends differences
        return Aggregation(parts[index].aggregator, moved, states[index], context)

    for step in range(WARM_UP + REPEATS):
        for index in range(len(parts)):
            profile = begin(index, 0, step)
            held[index].append(_hold(profile, 0, ranks))
            states[index] = profile.finished().state
    last = WARM_UP + REPEATS
    exchanges = (
        _summary(turns, lambda rank, index=index: begin(index, rank, last), ranks, frozenset())  # type: ignore[misc]
        for index, turns in enumerate(held)
    )
    return list(zip(exchanges, states, strict=True))


def exchanges_of(
    averaging: Averaging | MultiLevel, layout: Layout, ranks: int
) -> tuple[ProfiledExchange, ...]:
    """What rank 0 exchanges of the model at each of an averaging's exchanges."""
    fragments = [fragment_states(averaging, layout, rank, ranks) for rank in range(ranks)]
    return tuple(_averaging_exchange(column, ranks) for column in map(list, zip(*fragments, strict=True)))


def _averaging_exchange(fragments: Sequence[FragmentState], ranks: int) -> ProfiledExchange:
    layout, averaging = fragments[0].layout, fragments[0].averaging
    model = _gradient(layout)
    step = 0

    def begin(rank: int) -> Aggregation:
        if not fragments[rank].state:
            fragments[rank].start(model)
        return fragments[rank].aggregate(model + 1e-3 * _gradient(layout, 1), step, 0)

    held = []
    for step in range(WARM_UP + REPEATS):  # noqa: B007
        profile = begin(0)
        held.append(_hold(profile, 0, ranks))
        held[-1][-1] = (held[-1][-1][0] + _copying_s(fragments[0], profile.finished()), None)
    edges = resolve(averaging.topology, ranks).edges if isinstance(averaging, Gossip) else frozenset()
    return replace(_summary(held, begin, ranks, edges), share=1 / at(averaging.period, 0))


def _copying_s(fragment: FragmentState, result: AggregateResult) -> float:
    """To read the weights before an exchange, after it where that is asked for, and to write them."""
    flat = torch.zeros(fragment.layout.numel, dtype=torch.float32)
    views = {param.name: piece for param, piece in fragment.layout.pieces(flat)}
    whole = Layout(tuple(replace(param, start=0) for param in fragment.layout.slices))
    begin_s = clock()
    gather(views, whole)
    scatter(views, whole, fragment.apply_result(result, lambda: gather(views, whole)))
    return clock() - begin_s


Held = list[tuple[float, Request | None]]


def _summary(
    held: Sequence[Held], begin: Callable[[int], Aggregation], ranks: int, edges: frozenset[Edge]
) -> ProfiledExchange:
    """Medians over the repetitions; who asks within which group is found out by asking every rank."""
    kept = held[WARM_UP:]
    requests = [request for _, request in kept[-1] if request is not None]
    works_s = [
        statistics.median(times) for times in zip(*([s for s, _ in turns] for turns in kept), strict=True)
    ]
    columns: list[list[Request]] = [[] for _ in requests]
    if any(request.group or uneven(request, 0, ranks) for request in requests):
        everyone = [[request for _, request in _hold(begin(rank), rank, ranks)] for rank in range(ranks)]
        columns = [
            [request for request in column if request is not None] for column in zip(*everyone, strict=True)
        ][:-1]
    request_sizes = [
        sizes_of(request, ranks, request_groups(column) if column else None, edges, column)
        for request, column in zip(requests, columns, strict=True)
    ]
    rounds = tuple(
        ProfiledRound(work_s, ask, request.leads)
        for work_s, ask, request in zip(works_s, request_sizes, requests, strict=False)
    )
    return ProfiledExchange(rounds, works_s[-1])


@torch.no_grad()
def _hold(profile: Aggregation, rank: int, ranks: int) -> Held:
    """Every request, with the seconds of arithmetic before it: thinking, sealing, opening and checking."""
    echo = _Echo(rank, ranks)
    channel = Channel(echo, 0, Ledger())
    held: Held = []
    exchange = None
    while True:
        begin_s = clock()
        answer = exchange.open(profile.watch) if exchange is not None else None
        request = profile.ask(answer)
        exchange = channel.prepare(request, profile.finite) if request is not None else None
        held.append((clock() - begin_s, request))
        if exchange is None:
            return held
        echo.exchange = channel.exchange
        exchange.start()
        exchange.wait()


def _gradient(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class _Echo:
    """A transport on which every rank sends what this one sends; where that does not fit, zeros."""

    started_s = finished_s = 0.0

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.exchange = 0
        self._answer: Any = None

    def start(self, request: Request) -> _Echo:
        self._answer = request.echo(self.rank, self.size, self._seal)
        return self

    def wait(self) -> Any:
        return self._answer

    def _seal(self, sender: int, said: Payload) -> None:
        write_header(said, PayloadHeader(sender, 0, self.exchange), TRUE)
