"""Reduce-scatter and the uneven all-to-all in lock-step, in the ledger, in parts, and priced."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.advice.profile import profiles_of
from distcomp.advice.scenario import Scenario
from distcomp.advice.virtual_clock import VirtualClock
from distcomp.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    NeighborExchange,
    ReduceScatter,
    Rounds,
    partitioned,
    partitioned_bytes,
)
from distcomp.errors import DistcompError, Mismatch
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, Method, StepContext
from distcomp.methods.base import State
from distcomp.network import Fabric
from distcomp.network.model import uneven_all_to_all
from distcomp.network.request_sizes import sizes_of
from distcomp.payload import Part, Payload, wire_bytes
from tests.collectives import script
from tests.collectives.toys import Maximum
from tests.lockstep import together

ORDINARY = Layout.of([("w", (30, 11))])


def ones(size: int) -> list[Tensor]:
    return [torch.ones(4)] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_answer_of_the_script_is_right(size: int) -> None:
    meeting = together(script.script, ones(size))
    for right in meeting.answers.values():
        assert len(right) == 2 * (len(script.DTYPES) + 1)
        assert [name for name, good in right.items() if not good] == []


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_reduce_scatter_is_the_sum_in_rank_order_cut_in_pieces(
    sizes: list[int], dtype: torch.dtype, seed: int
) -> None:
    count = len(sizes)
    xs = [
        (3 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed + 100 * rank))).to(dtype)
        for rank in range(count)
    ]
    kept = [x.clone() for x in xs]

    def lines(context: StepContext) -> Rounds[Tensor]:
        return (yield ReduceScatter(xs[context.rank], tuple(sizes), kind="codes"))

    meeting = together(lines, ones(count))
    total = xs[0].clone()
    for x in xs[1:]:
        total = total + x
    for rank, piece in enumerate(torch.split(total, sizes)):
        assert meeting.answers[rank].dtype == dtype
        assert torch.equal(meeting.answers[rank], piece)
        body = sum(size for other, size in enumerate(sizes) if other != rank) * dtype.itemsize
        sent = meeting.ledgers[rank].sent_bytes
        assert sent["codes"] == body
        assert 32 * (count - 1) <= sent["header"] < 40 * (count - 1) or count == 1
    assert all(torch.equal(x, same) for x, same in zip(xs, kept, strict=True))  # x is not given away


@given(
    table=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
@settings(max_examples=60, deadline=None)
def test_an_all_to_all_of_any_table_of_sizes(table: list[list[int]]) -> None:
    count = len(table)

    def part(sender: int, to: int) -> tuple[Part, ...]:
        return (Part("values", torch.float32, table[sender][to]),)

    def lines(context: StepContext) -> Rounds[list[Payload]]:
        sent = tuple(Payload.empty(part(context.rank, to)) for to in range(count))
        for to, payload in enumerate(sent):
            payload["values"].fill_(10 * context.rank + to)
        return (yield AllToAll(sent, tuple(part(sender, context.rank) for sender in range(count))))

    meeting = together(lines, ones(count))
    for rank, received in meeting.answers.items():
        for sender, payload in enumerate(received):
            assert payload["values"].tolist() == [10 * sender + rank] * table[sender][rank]
        others = [wire_bytes(part(rank, to)) for to in range(count) if to != rank]
        assert meeting.ledgers[rank].total_bytes == sum(others)


def test_the_owner_of_an_empty_piece_learns_of_a_nan_too() -> None:
    xs = [torch.ones(4), torch.full((4,), torch.nan), torch.ones(4)]

    def lines(context: StepContext) -> Rounds[Tensor]:
        return (yield ReduceScatter(xs[context.rank], (0, 1, 3)))

    meeting = together(lines, xs)
    assert meeting.finite == [False] * 3
    assert together(lines, ones(3)).answers[0].numel() == 0


def test_pieces_that_do_not_make_up_the_tensor_are_refused() -> None:
    for sizes in ((1, 1), (4, -1), ()):
        with pytest.raises(DistcompError, match="give each rank a piece"):
            ReduceScatter(torch.ones(3), sizes)


@pytest.mark.parametrize(
    "request_",
    [
        ReduceScatter(torch.ones(3), (1, 2)),
        AllToAll((script.message(0, 0),) * 2),
        AllToAll((script.message(0, 0),) * 3, (script.parts(0, 0),) * 2),
    ],
    ids=["reduce-scatter", "all-to-all", "all-to-all, declared"],
)
def test_a_piece_too_few_is_refused_in_lock_step_and_by_any_transport(request_: Any) -> None:
    def lines(context: StepContext) -> Rounds[Any]:
        return (yield request_)

    with pytest.raises(DistcompError, match="among 3 ranks was given 2 pieces; give one for each rank"):
        together(lines, ones(3))
    with pytest.raises(DistcompError, match="among 3 ranks was given 2 pieces; give one for each rank"):
        request_.drive(SimpleNamespace(rank=0, size=3))


def test_ranks_that_cut_differently_are_named() -> None:
    def lines(context: StepContext) -> Rounds[Tensor]:
        return (yield ReduceScatter(torch.ones(4), (1, 3) if context.rank == 0 else (2, 2)))

    with pytest.raises(Mismatch, match=r"rank 0 asks .*\(1, 3\).* while rank 1 asks .*\(2, 2\)"):
        together(lines, ones(2))


def test_who_is_sent_something_else_than_declared_is_named() -> None:
    def lines(context: StepContext) -> Rounds[Any]:
        parts = [script.parts(sender, context.rank) for sender in range(3)]
        if context.rank == 2:
            parts[1] = (Part("codes", torch.uint8, 12345),)
        return (yield AllToAll(tuple(script.message(context.rank, to) for to in range(3)), tuple(parts)))

    with pytest.raises(Mismatch, match=r"rank 2 expects .*12345.* from rank 1, which sends it .*scales"):
        together(lines, ones(3))


# ------------------------------------------------------------------------------------------ carried in shares


def whole(kind: str, rank: int) -> Any:
    """What node ``rank`` of two asks, in each of the ways."""
    payload = Payload.empty((Part("scales", torch.float32, 3), Part("codes", torch.uint8, 10)))
    payload["scales"].fill_(rank + 0.5)
    payload["codes"].fill_(rank + 3)
    return {
        "sum": lambda: AllReduce(torch.arange(7.0) + rank),
        "gather": lambda: AllGather(payload),
        "broadcast": lambda: Broadcast(payload, 1),
        "uneven all-to-all": lambda: script.uneven_swap(rank, (0, 1)),
        "reduce-scatter": lambda: ReduceScatter(torch.arange(7.0) * (rank + 1), (2, 5)),
    }[kind]()


@pytest.mark.parametrize("near", [2, 3])
@pytest.mark.parametrize("kind", ["sum", "gather", "broadcast", "uneven all-to-all", "reduce-scatter"])
def test_a_request_carried_in_shares_has_the_answer_of_the_whole(kind: str, near: int) -> None:
    def alone(context: StepContext) -> Rounds[Any]:
        return (yield whole(kind, context.rank))

    def shared(context: StepContext) -> Rounds[Any]:
        node, index = divmod(context.rank, near)
        across, inside = (index, near + index), tuple(range(node * near, (node + 1) * near))
        return (yield from partitioned(whole(kind, node), node, across, index, inside))

    answers, meeting = together(alone, ones(2)).answers, together(shared, ones(2 * near))
    for rank, answer in meeting.answers.items():
        wanted = answers[rank // near]
        if isinstance(wanted, Tensor):
            assert torch.equal(answer, wanted)
            continue
        got, wanted = (one if isinstance(one, list) else [one] for one in (answer, wanted))
        assert len(got) == len(wanted)
        assert all(script.same_message(a, b) for a, b in zip(got, wanted, strict=True))
    if kind != "uneven all-to-all":  # what other ranks hear there, one rank's request does not tell
        sent = sum(ledger.total_bytes for ledger in meeting.ledgers) / (2 * near)
        assert sent == pytest.approx(partitioned_bytes(whole(kind, 0), near, 2), abs=8 * near)


def test_what_neighbors_say_is_not_cut() -> None:
    payload = Payload.empty((Part("codes", torch.uint8, 4),))
    with pytest.raises(DistcompError, match="give across a method of gradients"):
        NeighborExchange(payload, (1,)).share(0, 2)


# ----------------------------------------------------------------------------------------------------- priced


@dataclass(frozen=True)
class Scripted(Method):
    """Asks one thing."""

    kind: str

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        everyone = range(context.size)
        if self.kind == "reduce-scatter":
            yield ReduceScatter(x, (0, 30, *(100,) * (context.size - 3), 330 - 30 - 100 * (context.size - 3)))
        else:
            yield script.uneven_swap(context.rank, everyone)
        return AggregateResult(x, lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return 0


@pytest.mark.parametrize("kind", ["reduce-scatter", "uneven all-to-all"])
def test_the_advisor_counts_what_the_ledgers_count(kind: str) -> None:
    (exchange,) = profiles_of(Scripted(kind), [ORDINARY], 4)
    meeting = together(lambda context: Scripted(kind).aggregate(torch.zeros(330), {}, context), ones(4))
    (round_,) = exchange.rounds
    assert round_.ask.sent_bytes(4) == sum(one.total_bytes for one in meeting.ledgers) / 4


def test_an_uneven_all_to_all_takes_as_long_as_its_busiest_link() -> None:
    fabric = Fabric.uniform(4, "10mbit", "5ms")
    requests = [script.uneven_swap(rank, range(4)) for rank in range(4)]
    sent = [(i, j, wire_bytes(script.parts(i, j))) for i in range(4) for j in range(4) if i != j]
    clock = VirtualClock(fabric, Scenario())
    clock.exchange(requests)
    expected = uneven_all_to_all(sent, fabric).cost(fabric).seconds
    assert expected > 8 * 60_000 / 1e7
    assert clock.now_s.tolist() == pytest.approx([expected] * 4)
    ask = sizes_of(requests[2], 4, None, frozenset(), requests)
    assert ask.exchange(fabric).sent_bytes == pytest.approx(sum(n for _, _, n in sent) / 4)


# ------------------------------------------------------------------------------ a collective in one file only


def test_a_collective_that_nobody_knows_is_carried_counted_and_priced() -> None:
    def lines(context: StepContext) -> Rounds[Tensor]:
        return (yield Maximum(torch.tensor([1.0, -5.0, 7.0]) * (context.rank - 1)))

    meeting = together(lines, ones(3))
    assert all(answer.tolist() == [1.0, 5.0, 7.0] for answer in meeting.answers.values())
    assert meeting.ledgers[1].sent_bytes == {"header": 2 * (32 + 4), "values": 2 * 12}
    assert meeting.ledgers[1].requests == {"Maximum": 1}
    ask = sizes_of(Maximum(torch.zeros(3)), 3, None, frozenset())
    assert ask.sent_bytes(3) == meeting.ledgers[1].total_bytes
    with pytest.raises(Mismatch, match=r"rank 0 asks .*'Maximum'.* while rank 1 asks .*'AllReduce'"):
        together(lambda context: iter_one(context), ones(2))


def iter_one(context: StepContext) -> Rounds[None]:
    yield Maximum(torch.zeros(3)) if context.rank == 0 else AllReduce(torch.zeros(3))
