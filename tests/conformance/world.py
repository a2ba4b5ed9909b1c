"""A world of n workers in lock-step, with a record of what they asked of each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import AggregateResult, Method, StepContext
from distcomp.methods.base import PerParameter, State, cut_state, join_state, map_state
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

SEED = 7

ORDINARY = Layout.of(
    [("fc.weight", (40, 37)), ("fc.bias", (37,)), ("conv.weight", (8, 3, 3, 3)), ("norm.weight", (8,))],
    roles={"norm.weight": "norm"},
)
"""Several blocks, a short last one, roles of both kinds: big enough to be cut, small enough to be quick."""

ODD = {
    "nothing": Layout.of([]),
    "empty": Layout.of([("e", (0,)), ("w", (4, 5)), ("f", (3, 0))]),
    "only empty": Layout.of([("e", (0, 4))]),
    "scalar": Layout.of([("s", ()), ("t", ())]),
    "one short of a block": Layout.of([("w", (7, 73)), ("b", (511,))]),
    "one past a block": Layout.of([("w", (27, 19)), ("b", (513,))]),
    "eight dimensions": Layout.of([("w", (2, 1, 3, 2, 1, 2, 2, 3))]),
    "many tiny": Layout.of([(f"p{i}", (3,) if i % 3 else (1, 2)) for i in range(40)]),
    "only biases": Layout.of([("a", (9,)), ("b", (4,))]),
    "one value": Layout.of([("w", (1, 1))]),
}


class Recorded(Method):
    """A method whose requests are written down, and whose sums come back in the buffer that was given away.

    A real all-reduce works in place; a method that keeps a tensor it has given away is found out here.
    """

    def __init__(self, inner: Method, asked: list[Any]) -> None:
        self.inner = inner
        self.asked = asked
        self.propagates_nonfinite = inner.propagates_nonfinite

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
) -> Round:
    """All workers talk once about a flat buffer."""
    size = len(xs)
    net = Lockstep(size)
    asked: list[Any] = []
    shared = Key.of(SEED, step)
    each = [observed] * size if isinstance(observed, Mapping) else observed
    aggregations = [
        Aggregation(
            Recorded(method, asked), x, state, StepContext(rank, size, layout, step, shared, observed=seen)
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
        [ledger.total_bytes for ledger in net.ledgers],
    )


def once(method: Method, xs: Sequence[Tensor], layout: Layout = ORDINARY, step: int = 0) -> Round:
    """All workers talk about a flat buffer for the first time."""
    return converse(method, xs, [method.init(layout) for _ in xs], layout, step)


def draw(size: int, layout: Layout = ORDINARY, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """One random flat buffer per worker: each parameter with a magnitude of its own, as gradients have."""
    generator = torch.Generator().manual_seed(1000 * seed + size)
    buffers = []
    for _ in range(size):
        buffer = torch.randn(layout.numel, generator=generator)
        for index, (_, piece) in enumerate(layout.pieces(buffer)):
            piece.mul_(scale * 3.0 ** -(index % 4))
        buffers.append(buffer)
    return buffers


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


def slab_of(named: dict[str, Tensor], layout: Layout) -> Tensor:
    return torch.cat([named[name] for name in layout.names]) if layout.names else torch.empty(0)


def by_name(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {param.name: piece for param, piece in layout.pieces(buffer)}


def groups(layout: Layout, *cuts: Iterable[int]) -> list[Layout]:
    """Layouts of the segments with these indices."""
    return [Layout(tuple(layout.slices[index] for index in cut)) for cut in cuts]


def tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of a state by a flat name."""
    return {
        f"{name}/{path}": value for name, leaves in cut_state(state).items() for path, value in leaves.items()
    }


def alike(one: State, other: State) -> bool:
    """Whether two states hold the same bits (a NaN equals itself)."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
    )


def copied(state: State) -> dict[str, Any]:
    """A state that shares no memory with the one given."""
    return map_state(
        state,
        lambda _, leaf: FlatBuffer(leaf.data.clone(), leaf.layout),
        lambda _, leaf: PerParameter({name: value.clone() for name, value in leaf.items()}),
    )
