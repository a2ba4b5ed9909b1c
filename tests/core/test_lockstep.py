"""N workers in one process: exact answers, and a name for every disagreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distcomp.errors import Mismatch
from distcomp.exchange import Broadcast, Gather, Mix, Sum, Swap, Talk, within
from distcomp.layout import Layout
from distcomp.methods import Method, Outcome, Turn, parse
from distcomp.methods.base import State
from distcomp.payload import Part, Payload
from distcomp.randomness import Key
from distcomp.transports.conversation import Conversation
from distcomp.transports.lockstep import Lockstep

LAYOUT = Layout.of([("w", (4,))])
PARTS = (Part("values", torch.float32, 1),)


def payload(value: float, numel: int = 1) -> Payload:
    made = Payload.empty((Part("values", torch.float32, numel),))
    made["values"].fill_(value)
    return made


@dataclass(frozen=True)
class Script(Method):
    """Run a function as a talk; whatever it returns is kept in ``heard``."""

    lines: Callable[[Turn], Talk[Any]]
    heard: dict[int, Any]

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        self.heard[turn.rank] = yield from self.lines(turn)
        return Outcome(x.clone(), lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return 0


def hear(lines: Callable[[Turn], Talk[Any]], size: int = 3) -> dict[int, Any]:
    heard: dict[int, Any] = {}
    key = Key.of(0)
    Lockstep(size).run(
        [
            Conversation(Script(lines, heard), torch.zeros(4), {}, Turn(rank, size, LAYOUT, 0, key))
            for rank in range(size)
        ]
    )
    return heard


def numbers(payloads: list[Payload]) -> list[float]:
    return [float(one["values"][0]) for one in payloads]


def test_a_sum_is_added_in_rank_order() -> None:
    def lines(turn: Turn) -> Talk[float]:
        total = yield Sum(torch.tensor([[1e8, 1.0, -1e8][turn.rank]]))
        return float(total)

    assert hear(lines) == {0: 0.0, 1: 0.0, 2: 0.0}  # (1e8 + 1) - 1e8 in float32; any other order gives 1


def test_gather_answers_in_rank_order() -> None:
    def lines(turn: Turn) -> Talk[list[float]]:
        return numbers((yield Gather(payload(turn.rank))))

    assert hear(lines) == {rank: [0, 1, 2] for rank in range(3)}


def test_a_gather_of_unequal_parts_that_all_know_of() -> None:
    parts = tuple((Part("values", torch.float32, rank + 1),) for rank in range(3))

    def lines(turn: Turn) -> Talk[list[int]]:
        answer = yield Gather(payload(1, turn.rank + 1), parts=parts)
        return [one["values"].numel() for one in answer]

    assert hear(lines) == {rank: [1, 2, 3] for rank in range(3)}


def test_swap_answers_with_what_each_sent_here() -> None:
    def lines(turn: Turn) -> Talk[list[float]]:
        return numbers((yield Swap(tuple(payload(10 * turn.rank + to) for to in range(3)))))

    assert hear(lines) == {rank: [rank, 10 + rank, 20 + rank] for rank in range(3)}


def test_mix_answers_with_the_neighbours_alone() -> None:
    def lines(turn: Turn) -> Talk[list[float]]:
        ring = ((turn.rank - 1) % 4, (turn.rank + 1) % 4)
        return numbers((yield Mix(payload(turn.rank), ring)))

    assert hear(lines, 4) == {0: [3, 1], 1: [0, 2], 2: [1, 3], 3: [2, 0]}


def test_broadcast_answers_with_the_source() -> None:
    def lines(turn: Turn) -> Talk[float]:
        return float((yield Broadcast(payload(turn.rank), 2))["values"][0])

    assert hear(lines) == {0: 2, 1: 2, 2: 2}


def test_two_groups_talk_at_once() -> None:
    def lines(turn: Turn) -> Talk[Any]:
        group = (0, 1) if turn.rank < 2 else (2, 3)

        def inside() -> Talk[Any]:
            total = yield Sum(torch.tensor([float(turn.rank)]))
            others = yield Gather(payload(turn.rank))
            swapped = yield Swap(tuple(payload(10 * turn.rank + to) for to in range(2)))
            mixed = yield Mix(payload(turn.rank), (1 - turn.rank % 2,))
            return float(total), numbers(others), numbers(swapped), numbers(mixed)

        return (yield from within(group, inside()))

    low, high = (1.0, [0, 1]), (5.0, [2, 3])
    heard = hear(lines, 4)
    assert [heard[rank][:2] for rank in range(4)] == [low, low, high, high]
    assert [heard[rank][2] for rank in range(4)] == [[0, 10], [1, 11], [20, 30], [21, 31]]
    assert [heard[rank][3] for rank in range(4)] == [[1], [0], [3], [2]]


def odd_one(usual: Callable[[], Any], odd: Callable[[], Any]) -> Callable[[Turn], Talk[Any]]:
    """Rank 2 asks something else in the second round."""

    def lines(turn: Turn) -> Talk[Any]:
        yield Sum(torch.zeros(1))
        request = (odd if turn.rank == 2 else usual)()
        if request is not None:
            yield request

    return lines


DISAGREEMENTS = {
    "another request": (lambda: Sum(torch.zeros(1)), lambda: Gather(payload(1)), "Sum", "Gather"),
    "another shape": (lambda: Sum(torch.zeros(3)), lambda: Sum(torch.zeros(4)), r"\(3,\)", r"\(4,\)"),
    "another type": (
        lambda: Sum(torch.zeros(3)),
        lambda: Sum(torch.zeros(3, dtype=torch.bfloat16)),
        "float32",
        "bfloat16",
    ),
    "other parts": (lambda: Gather(payload(1)), lambda: Gather(payload(1, 2)), "numel=1", "numel=2"),
    "another source": (lambda: Broadcast(payload(1), 0), lambda: Broadcast(payload(1), 1), ", 0,", ", 1,"),
    "one is done": (lambda: Sum(torch.zeros(1)), lambda: None, "Sum", "nothing"),
    "others are done": (lambda: None, lambda: Sum(torch.zeros(1)), "nothing", "Sum"),
    "other chunks": (
        lambda: Swap((payload(1), payload(1), payload(1))),
        lambda: Swap((payload(1), payload(1), payload(1, 2))),
        "Swap",
        "numel=2",
    ),
    "another group": (
        lambda: Sum(torch.zeros(1)),
        lambda: Sum(torch.zeros(1), group=(0, 2)),
        "None",
        r"\(0, 2\)",
    ),
}


@pytest.mark.parametrize(("usual", "odd", "one", "other"), DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_a_disagreement_names_both_ranks_and_what_they_ask(usual, odd, one, other) -> None:
    message = f"rank 0 asks .*{one}.* while rank 2 asks .*{other}.*; every rank must run the same method"
    with pytest.raises(Mismatch, match=message):
        hear(odd_one(usual, odd))


def test_groups_that_overlap_are_an_error() -> None:
    def lines(turn: Turn) -> Talk[None]:
        yield Sum(torch.zeros(1), group=(0, 1) if turn.rank == 0 else (1, 2))

    with pytest.raises(Mismatch, match=r"rank 0 asks .*\(0, 1\).* while rank 1 asks .*\(1, 2\)"):
        hear(lines)


def test_a_neighbour_that_does_not_look_back_is_an_error() -> None:
    def lines(turn: Turn) -> Talk[None]:
        yield Mix(payload(1), ((turn.rank + 1) % 3,))

    with pytest.raises(Mismatch, match="rank 0 mixes with rank 1, which does not mix with rank 0"):
        hear(lines)


@pytest.mark.parametrize(("mine", "theirs"), [("qsgd:bits=4", "qsgd:bits=2"), ("identity", "bf16")])
def test_ranks_with_different_settings_do_not_hang(mine: str, theirs: str) -> None:
    layout = Layout.of([("w", (40, 20))])
    talks = [
        Conversation(
            method, torch.ones(layout.numel), method.init(layout), Turn(rank, 3, layout, 0, Key.of(0))
        )
        for rank, method in enumerate([parse(mine), parse(mine), parse(theirs)])
    ]
    with pytest.raises(Mismatch, match=r"rank 0 asks .* while rank 2 asks"):
        Lockstep(3).run(talks)


def test_a_channel_goes_on_after_a_conversation_is_over() -> None:
    net, layout, method = Lockstep(2), Layout.of([("w", (8, 8))]), parse("qsgd:pattern=gather")
    for step in range(3):
        talks = [
            Conversation(method, torch.ones(64), method.init(layout), Turn(r, 2, layout, step, Key.of(step)))
            for r in range(2)
        ]
        net.run(talks)
        assert all(talk.outcome is not None for talk in talks)
    assert net.ledgers[0].requests == {"Gather": 3}
