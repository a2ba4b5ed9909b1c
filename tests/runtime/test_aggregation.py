"""A generator under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, Method, StepContext
from distcomp.methods.base import State
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Answer

LAYOUT = Layout.of([("w", (3,))])
CONTEXT = StepContext(0, 2, LAYOUT, 0, Key.of(0))
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@dataclass(frozen=True)
class TwoRounds(Method):
    """Ask twice; the estimate is what came first plus what came second."""

    propagates_nonfinite: bool = False

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        first = yield AllReduce(x.clone())
        second = yield AllReduce(first * 2)
        return AggregateResult(first + second, lambda: x, {"seen": context.step})

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return 0


def aggregate(propagates_nonfinite: bool = False, x: Tensor | None = None) -> Aggregation:
    return Aggregation(TwoRounds(propagates_nonfinite), torch.ones(3) if x is None else x, {}, CONTEXT)


def test_requests_come_one_by_one_until_the_result_is_there() -> None:
    aggregation = aggregate()
    first = aggregation.ask(None)
    assert isinstance(first, AllReduce)
    assert aggregation.result is None
    second = aggregation.ask(Answer(torch.full((3,), 5.0), TRUE))
    assert isinstance(second, AllReduce)
    assert torch.equal(second.x, torch.full((3,), 10.0))
    assert aggregation.ask(Answer(torch.full((3,), 1.0), TRUE)) is None
    assert aggregation.result is not None
    assert torch.equal(aggregation.result.estimate, torch.full((3,), 6.0))
    assert aggregation.result.state == {"seen": 0}
    assert bool(aggregation.finite)


def test_one_answer_that_is_not_finite_spoils_the_estimate() -> None:
    for round_ in range(2):
        aggregation = aggregate()
        aggregation.ask(None)
        for index in range(2):
            aggregation.ask(Answer(torch.ones(3), FALSE if index == round_ else TRUE))
        assert aggregation.result is not None
        assert aggregation.result.estimate.isnan().all()
        assert not bool(aggregation.finite)


def test_what_one_holds_is_looked_at_before_anything_is_asked() -> None:
    aggregation = aggregate(x=torch.tensor([1.0, float("inf"), 2.0]))
    aggregation.ask(None)
    assert not bool(aggregation.finite)


def test_a_transparent_method_is_not_watched() -> None:
    aggregation = aggregate(propagates_nonfinite=True, x=torch.tensor([1.0, float("inf"), 2.0]))
    aggregation.ask(None)
    assert not aggregation.watch
    for _ in range(2):
        aggregation.ask(Answer(torch.ones(3), TRUE))
    assert aggregation.result is not None
    assert torch.equal(aggregation.result.estimate, torch.full((3,), 2.0))
