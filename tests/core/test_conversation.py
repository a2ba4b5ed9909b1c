"""A generator under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.exchange import Sum, Talk
from distcomp.layout import Layout
from distcomp.methods import Method, Outcome, Turn
from distcomp.methods.base import State
from distcomp.randomness import Key
from distcomp.transports.base import Answer
from distcomp.transports.conversation import Conversation

LAYOUT = Layout.of([("w", (3,))])
TURN = Turn(0, 2, LAYOUT, 0, Key.of(0))
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@dataclass(frozen=True)
class TwoRounds(Method):
    """Ask twice; the estimate is what came first plus what came second."""

    transparent: bool = False

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        first = yield Sum(x.clone())
        second = yield Sum(first * 2)
        return Outcome(first + second, lambda: x, {"seen": turn.step})

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return 0


def talk(transparent: bool = False, x: Tensor | None = None) -> Conversation:
    return Conversation(TwoRounds(transparent), torch.ones(3) if x is None else x, {}, TURN)


def test_requests_come_one_by_one_until_the_outcome_is_there() -> None:
    conversation = talk()
    first = conversation.ask(None)
    assert isinstance(first, Sum)
    assert conversation.outcome is None
    second = conversation.ask(Answer(torch.full((3,), 5.0), TRUE))
    assert isinstance(second, Sum)
    assert torch.equal(second.x, torch.full((3,), 10.0))
    assert conversation.ask(Answer(torch.full((3,), 1.0), TRUE)) is None
    assert conversation.outcome is not None
    assert torch.equal(conversation.outcome.estimate, torch.full((3,), 6.0))
    assert conversation.outcome.state == {"seen": 0}
    assert bool(conversation.finite)


def test_one_answer_that_is_not_finite_spoils_the_estimate() -> None:
    for round_ in range(2):
        conversation = talk()
        conversation.ask(None)
        for index in range(2):
            conversation.ask(Answer(torch.ones(3), FALSE if index == round_ else TRUE))
        assert conversation.outcome is not None
        assert conversation.outcome.estimate.isnan().all()
        assert not bool(conversation.finite)


def test_what_one_holds_is_looked_at_before_anything_is_asked() -> None:
    conversation = talk(x=torch.tensor([1.0, float("inf"), 2.0]))
    conversation.ask(None)
    assert not bool(conversation.finite)


def test_a_transparent_method_is_not_watched() -> None:
    conversation = talk(transparent=True, x=torch.tensor([1.0, float("inf"), 2.0]))
    conversation.ask(None)
    assert not conversation.watch
    for _ in range(2):
        conversation.ask(Answer(torch.ones(3), TRUE))
    assert conversation.outcome is not None
    assert torch.equal(conversation.outcome.estimate, torch.full((3,), 2.0))
