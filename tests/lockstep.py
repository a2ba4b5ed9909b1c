"""The workers of every test that needs no processes: in lock-step, with a record of what they asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, Method, StepContext
from distcomp.methods.base import State, cut_state, join_state
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.lockstep import Lockstep
from tests.buffers import ORDINARY, slab_of

SEED = 7


class Recorded(Method):
    """A method whose requests are written down, and whose sums come back in the buffer that was given away.

    A real all-reduce works in place; a method that keeps a tensor it has given away is found out here.
    """

    def __init__(self, inner: Method, asked: list[Any]) -> None:
        self.inner = inner
        self.asked = asked
        self.propagates_nonfinite = inner.propagates_nonfinite
        self.sums_nonfinite = inner.sums_nonfinite

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        aggregation = self.inner.aggregate(x, state, context)
        try:
            request = next(aggregation)
            while True:
                self.asked.append(request)
                answer = yield request
                if isinstance(request, AllReduce):
                    answer = request.x.copy_(answer)
                request = aggregation.send(answer)
        except StopIteration as stop:
            result: AggregateResult = stop.value
            return result

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)


@dataclass
class Round:
    """What one exchange of all workers came to."""

    results: list[AggregateResult]
    finite: list[bool]
    asked: list[Any]
    sent_bytes: list[int]

    @property
    def estimates(self) -> list[Tensor]:
        return [result.estimate for result in self.results]

    @property
    def estimate(self) -> Tensor:
        return self.results[0].estimate

    @property
    def states(self) -> list[State]:
        return [result.state for result in self.results]

    def contributions(self) -> list[Tensor]:
        return [result.contribution() for result in self.results]

    @property
    def rounding(self) -> float:
        """Relative rounding, per addition, of the coarsest type that was summed on the wire."""
        dtypes = [request.x.dtype for request in self.asked if isinstance(request, AllReduce)]
        return max((torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point), default=0.0)


def converse(
    method: Method,
    xs: Sequence[Tensor],
    states: Sequence[State],
    layout: Layout = ORDINARY,
    step: int = 0,
    observed: Observed | Sequence[Observed] = NOTHING_OBSERVED,
    shared: Key | None = None,
    net: Lockstep | None = None,
) -> Round:
    """All workers talk once about a flat buffer: over ``net`` if they have talked before."""
    size = len(xs)
    net = net or Lockstep(size)
    before = [ledger.total_bytes for ledger in net.ledgers]
    asked: list[Any] = []
    key = Key.of(SEED, step) if shared is None else shared
    each = [observed] * size if isinstance(observed, Mapping) else observed
    aggregations = [
        Aggregation(
            Recorded(method, asked), x, state, StepContext(rank, size, layout, step, key, observed=seen)
        )
        for rank, (x, state, seen) in enumerate(zip(xs, states, each, strict=True))
    ]
    net.run(aggregations)
    results = [aggregation.result for aggregation in aggregations]
    assert all(result is not None for result in results)
    return Round(
        [result for result in results if result is not None],
        [bool(aggregation.finite) for aggregation in aggregations],
        asked,
        [ledger.total_bytes - sent for ledger, sent in zip(net.ledgers, before, strict=True)],
    )


def once(method: Method, xs: Sequence[Tensor], layout: Layout = ORDINARY, step: int = 0) -> Round:
    """All workers talk about a flat buffer for the first time."""
    return converse(method, xs, [method.init(layout) for _ in xs], layout, step)


class World:
    """A method among ``size`` workers, over as many steps as it is asked for."""

    def __init__(self, method: Method, size: int, layout: Layout, seed: int = 0) -> None:
        self.method, self.size, self.layout, self.seed = method, size, layout, seed
        self.net = Lockstep(size)
        self.states: list[State] = [method.init(layout) for _ in range(size)]
        self.step = 0
        self.finite: list[bool] = []

    @property
    def shared(self) -> Key:
        return Key.of(self.seed, self.step)

    def aggregate(self, xs: Sequence[Tensor]) -> list[AggregateResult]:
        """One step; states are kept for the next."""
        round_ = converse(
            self.method, xs, self.states, self.layout, self.step, shared=self.shared, net=self.net
        )
        self.finite, self.states = round_.finite, round_.states
        self.step += 1
        return round_.results

    def mean(self, xs: Sequence[Tensor]) -> np.ndarray:
        """One step; the estimate, which must be the same on all ranks and keep the law of contributions."""
        results = self.aggregate(xs)
        estimate = results[0].estimate
        assert all(torch.equal(result.estimate, estimate) for result in results)
        given = torch.stack([result.contribution() for result in results]).double()
        room = 1e-6 * float(given.abs().sum(0).max()) if estimate.numel() else 0.0
        assert np.allclose(given.sum(0), self.size * estimate.double(), rtol=0, atol=room)
        return estimate.numpy()

    @property
    def sent_bytes(self) -> list[int]:
        """By each worker, in all steps together."""
        return [ledger.total_bytes for ledger in self.net.ledgers]


@dataclass
class Grouping:
    """Parameters in buckets, as DistributedDataParallel cuts them; state is kept by parameter."""

    method: Method
    buckets: Sequence[Layout]
    size: int
    step: int = 0
    states: list[dict[str, Any]] = field(default_factory=list)
    """Per worker: parameter name -> path of the leaf -> tensor."""
    asked: list[Any] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    """Those of the last step, bucket by bucket."""

    def __post_init__(self) -> None:
        self.states = self.states or [{} for _ in range(self.size)]

    def aggregate(self, given: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step: ``given`` holds each worker's gradient by parameter, and so is the answer."""
        out: dict[str, Tensor] = {}
        self.rounds = []
        for layout in self.buckets:
            xs = [slab_of(named, layout) for named in given]
            before = [join_state(states, self.method.init(layout)) for states in self.states]
            round_ = converse(self.method, xs, before, layout, self.step)
            for states, after in zip(self.states, round_.states, strict=True):
                states.update(cut_state(after))
            self.asked += round_.asked
            self.rounds.append(round_)
            out.update({param.name: piece for param, piece in layout.pieces(round_.estimate)})
        self.step += 1
        return out

    def regroup(self, buckets: Sequence[Layout]) -> Grouping:
        return replace(self, buckets=buckets, states=[dict(states) for states in self.states])


@dataclass(frozen=True)
class Script(Method):
    """Run a function as a method; what it returns is kept in ``answers``."""

    lines: Callable[[StepContext], Rounds[Any]]
    answers: dict[int, Any]

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        self.answers[context.rank] = yield from self.lines(context)
        return AggregateResult(x.clone(), lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return 0


@dataclass
class Meeting:
    """What every rank heard, sent, and knows of the others' finiteness."""

    answers: dict[int, Any]
    ledgers: list[Ledger]
    finite: list[bool]


def together(lines: Callable[[StepContext], Rounds[Any]], xs: Sequence[Tensor]) -> Meeting:
    """A function of requests in lock-step, one worker per tensor of ``xs``."""
    answers: dict[int, Any] = {}
    net = Lockstep(len(xs))
    layout = Layout.of([("w", tuple(xs[0].shape))])
    aggregations = [
        Aggregation(Script(lines, answers), x, {}, StepContext(rank, len(xs), layout, 0, Key.of(0)))
        for rank, x in enumerate(xs)
    ]
    net.run(aggregations)
    return Meeting(answers, net.ledgers, [bool(aggregation.finite) for aggregation in aggregations])
