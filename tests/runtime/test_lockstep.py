"""N workers in one process: exact answers, and a name for every disagreement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, Rounds, within
from distcomp.errors import Mismatch
from distcomp.layout import Layout
from distcomp.methods import StepContext, parse
from distcomp.payload import Part, Payload
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep
from tests.lockstep import together

LAYOUT = Layout.of([("w", (4,))])
PARTS = (Part("values", torch.float32, 1),)


def payload(value: float, numel: int = 1) -> Payload:
    made = Payload.empty((Part("values", torch.float32, numel),))
    made["values"].fill_(value)
    return made


def hear(lines: Callable[[StepContext], Rounds[Any]], size: int = 3) -> dict[int, Any]:
    return together(lines, [torch.zeros(4)] * size).answers


def numbers(payloads: list[Payload]) -> list[float]:
    return [float(one["values"][0]) for one in payloads]


def test_a_sum_is_added_in_rank_order() -> None:
    def lines(context: StepContext) -> Rounds[float]:
        total = yield AllReduce(torch.tensor([[1e8, 1.0, -1e8][context.rank]]))
        return float(total)

    assert hear(lines) == {0: 0.0, 1: 0.0, 2: 0.0}  # (1e8 + 1) - 1e8 in float32; any other order gives 1


def test_gather_answers_in_rank_order() -> None:
    def lines(context: StepContext) -> Rounds[list[float]]:
        return numbers((yield AllGather(payload(context.rank))))

    assert hear(lines) == {rank: [0, 1, 2] for rank in range(3)}


def test_a_gather_of_unequal_parts_that_all_know_of() -> None:
    parts = tuple((Part("values", torch.float32, rank + 1),) for rank in range(3))

    def lines(context: StepContext) -> Rounds[list[int]]:
        answer = yield AllGather(payload(1, context.rank + 1), parts=parts)
        return [one["values"].numel() for one in answer]

    assert hear(lines) == {rank: [1, 2, 3] for rank in range(3)}


def test_swap_answers_with_what_each_sent_here() -> None:
    def lines(context: StepContext) -> Rounds[list[float]]:
        return numbers((yield AllToAll(tuple(payload(10 * context.rank + to) for to in range(3)))))

    assert hear(lines) == {rank: [rank, 10 + rank, 20 + rank] for rank in range(3)}


def test_mix_answers_with_the_neighbours_alone() -> None:
    def lines(context: StepContext) -> Rounds[list[float]]:
        ring = ((context.rank - 1) % 4, (context.rank + 1) % 4)
        return numbers((yield NeighborExchange(payload(context.rank), ring)))

    assert hear(lines, 4) == {0: [3, 1], 1: [0, 2], 2: [1, 3], 3: [2, 0]}


def test_broadcast_answers_with_the_source() -> None:
    def lines(context: StepContext) -> Rounds[float]:
        return float((yield Broadcast(payload(context.rank), 2))["values"][0])

    assert hear(lines) == {0: 2, 1: 2, 2: 2}


def test_two_groups_talk_at_once() -> None:
    def lines(context: StepContext) -> Rounds[Any]:
        group = (0, 1) if context.rank < 2 else (2, 3)

        def inside() -> Rounds[Any]:
            total = yield AllReduce(torch.tensor([float(context.rank)]))
            others = yield AllGather(payload(context.rank))
            swapped = yield AllToAll(tuple(payload(10 * context.rank + to) for to in range(2)))
            mixed = yield NeighborExchange(payload(context.rank), (1 - context.rank % 2,))
            return float(total), numbers(others), numbers(swapped), numbers(mixed)

        return (yield from within(group, inside()))

    low, high = (1.0, [0, 1]), (5.0, [2, 3])
    answers = hear(lines, 4)
    assert [answers[rank][:2] for rank in range(4)] == [low, low, high, high]
    assert [answers[rank][2] for rank in range(4)] == [[0, 10], [1, 11], [20, 30], [21, 31]]
    assert [answers[rank][3] for rank in range(4)] == [[1], [0], [3], [2]]


def odd_one(usual: Callable[[], Any], odd: Callable[[], Any]) -> Callable[[StepContext], Rounds[Any]]:
    """Rank 2 asks something else in the second round."""

    def lines(context: StepContext) -> Rounds[Any]:
        yield AllReduce(torch.zeros(1))
        request = (odd if context.rank == 2 else usual)()
        if request is not None:
            yield request

    return lines


DISAGREEMENTS = {
    "another request": (
        lambda: AllReduce(torch.zeros(1)),
        lambda: AllGather(payload(1)),
        "AllReduce",
        "AllGather",
    ),
    "another shape": (
        lambda: AllReduce(torch.zeros(3)),
        lambda: AllReduce(torch.zeros(4)),
        r"\(3,\)",
        r"\(4,\)",
    ),
    "another type": (
        lambda: AllReduce(torch.zeros(3)),
        lambda: AllReduce(torch.zeros(3, dtype=torch.bfloat16)),
        "float32",
        "bfloat16",
    ),
    "other parts": (lambda: AllGather(payload(1)), lambda: AllGather(payload(1, 2)), "numel=1", "numel=2"),
    "another source": (lambda: Broadcast(payload(1), 0), lambda: Broadcast(payload(1), 1), ", 0,", ", 1,"),
    "one is done": (lambda: AllReduce(torch.zeros(1)), lambda: None, "AllReduce", "nothing"),
    "others are done": (lambda: None, lambda: AllReduce(torch.zeros(1)), "nothing", "AllReduce"),
    "other chunks": (
        lambda: AllToAll((payload(1), payload(1), payload(1))),
        lambda: AllToAll((payload(1), payload(1), payload(1, 2))),
        "AllToAll",
        "numel=2",
    ),
    "another group": (
        lambda: AllReduce(torch.zeros(1)),
        lambda: AllReduce(torch.zeros(1), group=(0, 2)),
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
    def lines(context: StepContext) -> Rounds[None]:
        yield AllReduce(torch.zeros(1), group=(0, 1) if context.rank == 0 else (1, 2))

    with pytest.raises(Mismatch, match=r"rank 0 asks .*\(0, 1\).* while rank 1 asks .*\(1, 2\)"):
        hear(lines)


def test_a_neighbour_that_does_not_look_back_is_an_error() -> None:
    def lines(context: StepContext) -> Rounds[None]:
        yield NeighborExchange(payload(1), ((context.rank + 1) % 3,))

    with pytest.raises(Mismatch, match="rank 0 exchanges with rank 1, which does not with rank 0"):
        hear(lines)


@pytest.mark.parametrize(("mine", "theirs"), [("qsgd:bits=4", "qsgd:bits=2"), ("identity", "bf16")])
def test_ranks_with_different_settings_do_not_hang(mine: str, theirs: str) -> None:
    layout = Layout.of([("w", (40, 20))])
    aggregations = [
        Aggregation(
            method, torch.ones(layout.numel), method.init(layout), StepContext(rank, 3, layout, 0, Key.of(0))
        )
        for rank, method in enumerate([parse(mine), parse(mine), parse(theirs)])
    ]
    with pytest.raises(Mismatch, match=r"rank 0 asks .* while rank 2 asks"):
        Lockstep(3).run(aggregations)


def test_a_channel_goes_on_after_a_conversation_is_over() -> None:
    net, layout, method = Lockstep(2), Layout.of([("w", (8, 8))]), parse("qsgd:pattern=all_gather")
    for step in range(3):
        aggregations = [
            Aggregation(
                method, torch.ones(64), method.init(layout), StepContext(r, 2, layout, step, Key.of(step))
            )
            for r in range(2)
        ]
        net.run(aggregations)
        assert all(aggregation.result is not None for aggregation in aggregations)
    assert net.ledgers[0].requests == {"AllGather": 3}
