"""Requests, and the same exchange held inside a group."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distcomp.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    NeighborExchange,
    ReduceScatter,
    Rounds,
    within,
)
from distcomp.payload import Part, Payload

PAYLOAD = Payload.empty((Part("values", torch.float32, 2),))
REQUESTS = [
    AllReduce(torch.ones(2)),
    AllGather(PAYLOAD),
    AllToAll((PAYLOAD, PAYLOAD)),
    ReduceScatter(torch.ones(2), (1, 1)),
    NeighborExchange(PAYLOAD, (1,)),
    Broadcast(PAYLOAD, 0),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_requests_are_frozen_and_about_all_ranks(request_) -> None:
    assert request_.group is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_.group = (0,)


def both() -> Rounds[str]:
    first = yield AllReduce(torch.ones(1))
    second = yield AllGather(PAYLOAD)
    return f"{first} {second}"


def test_within_a_group_the_same_is_asked_answered_and_returned() -> None:
    aggregation = within((0, 2), both())
    asked = next(aggregation)
    assert isinstance(asked, AllReduce)
    assert asked.group == (0, 2)
    asked = aggregation.send("one")
    assert isinstance(asked, AllGather)
    assert asked.group == (0, 2)
    assert asked.payload is PAYLOAD
    with pytest.raises(StopIteration) as stop:
        aggregation.send("two")
    assert stop.value.value == "one two"


def test_within_a_group_sources_and_neighbours_are_places_in_it() -> None:
    def naming() -> Rounds[None]:
        yield Broadcast(PAYLOAD, 1)
        yield NeighborExchange(PAYLOAD, (0, 2))

    aggregation = within((3, 5, 8), naming())
    assert next(aggregation).source == 5
    assert aggregation.send(None).neighbours == (3, 8)


def test_within_a_group_a_talk_that_asks_nothing_returns_at_once() -> None:
    def silent() -> Rounds[int]:
        yield from ()
        return 5

    with pytest.raises(StopIteration) as stop:
        next(within((0,), silent()))
    assert stop.value.value == 5
