"""Requests, and the same conversation held inside a group."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distcomp.exchange import Broadcast, Gather, Mix, Sum, Swap, Talk, within
from distcomp.payload import Part, Payload

PAYLOAD = Payload.empty((Part("values", torch.float32, 2),))
REQUESTS = [
    Sum(torch.ones(2)),
    Gather(PAYLOAD),
    Swap((PAYLOAD, PAYLOAD)),
    Mix(PAYLOAD, (1,)),
    Broadcast(PAYLOAD, 0),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_requests_are_frozen_and_about_all_ranks(request_) -> None:
    assert request_.group is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_.group = (0,)


def both() -> Talk[str]:
    first = yield Sum(torch.ones(1))
    second = yield Gather(PAYLOAD)
    return f"{first} {second}"


def test_within_a_group_the_same_is_asked_answered_and_returned() -> None:
    talk = within((0, 2), both())
    asked = next(talk)
    assert isinstance(asked, Sum)
    assert asked.group == (0, 2)
    asked = talk.send("one")
    assert isinstance(asked, Gather)
    assert asked.group == (0, 2)
    assert asked.payload is PAYLOAD
    with pytest.raises(StopIteration) as stop:
        talk.send("two")
    assert stop.value.value == "one two"


def test_within_a_group_sources_and_neighbours_are_places_in_it() -> None:
    def naming() -> Talk[None]:
        yield Broadcast(PAYLOAD, 1)
        yield Mix(PAYLOAD, (0, 2))

    talk = within((3, 5, 8), naming())
    assert next(talk).source == 5
    assert talk.send(None).neighbours == (3, 8)


def test_within_a_group_a_talk_that_asks_nothing_returns_at_once() -> None:
    def silent() -> Talk[int]:
        yield from ()
        return 5

    with pytest.raises(StopIteration) as stop:
        next(within((0,), silent()))
    assert stop.value.value == 5
