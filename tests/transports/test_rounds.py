"""Rounds of workers in threads of one process: who takes part, and whether a round counts."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from distcomp.collectives import AllGather, AllReduce, Broadcast
from distcomp.payload import Part, Payload
from distcomp.transports.mesh import HELLO, Broken, MemberLine, Mesh
from distcomp.transports.rounds import Missed, OuterRounds, Round

TIMEOUT_S = 20.0


def opened(size: int, **settings: Any) -> list[OuterRounds]:
    """The rounds of so many founders."""
    store = HashStore()
    store.add("workers", size)
    store.set("latest", json.dumps([0, list(range(size))]))
    given = {"quorum": 1, "grace_s": 60.0, "timeout_s": TIMEOUT_S, **settings}
    return [
        OuterRounds(store, Mesh(store, worker, lambda least: b""), expected=set(range(size)), **given)
        for worker in range(size)
    ]


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each job returns or raises, each on a thread of its own."""
    found: list[Any] = [None] * len(jobs)

    def run(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT_S)
        assert not thread.is_alive()
    return found


def summed(x: torch.Tensor) -> Callable[[MemberLine, Round], tuple[tuple[int, ...], torch.Tensor]]:
    return lambda line, held: (held.members, line.start(AllReduce(x.clone())).wait())


@pytest.mark.parametrize("numel", [1, 5, 3000, 10_001])
def test_all_members_hold_the_same_sum_to_the_last_bit(numel: int) -> None:
    rounds = opened(3)
    generator = torch.Generator().manual_seed(numel)
    each = [torch.randn(numel, generator=generator) for _ in rounds]
    for _ in range(2):  # over the same connections
        found = together(
            [
                lambda one=one, x=x: one.carry("sum", 1.0, summed(x))
                for one, x in zip(rounds, each, strict=True)
            ]
        )
        expected = (each[0].numpy() + each[1].numpy()) + each[2].numpy()
        for members, total in found:
            assert members == (0, 1, 2)
            np.testing.assert_array_equal(total.numpy(), expected)
    for one in rounds:
        one.close()


def test_payloads_and_broadcasts_arrive() -> None:
    rounds = opened(3)

    def said(line: MemberLine, held: Round) -> tuple[list[float], float]:
        payload = Payload.empty((Part("values", torch.float32, 1),))
        payload["values"].fill_(line.rank)
        gathered = line.start(AllGather(payload)).wait()
        (first,) = line.start(Broadcast(payload, source=1)).wait()
        read = [float(Payload(wire, payload.parts)["values"]) for wire in (*gathered, first)]
        return read[:3], read[3]

    found = together([lambda one=one: one.carry("said", 1.0, said) for one in rounds])
    assert found == [([0.0, 1.0, 2.0], 1.0)] * 3
    for one in rounds:
        one.close()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.sampled_from(["before", "within", "after"]))
def test_a_round_in_which_one_dies_counts_for_all_who_are_left(dies: int, when: str) -> None:
    """Wherever it dies, the others agree on who took part, and what they brought is in the sum."""
    rounds = opened(4, grace_s=10.0)
    weights = [float(2**worker) for worker in range(4)]

    def dying(line: MemberLine, held: Round) -> Any:
        if when == "after":
            summed(torch.ones(4000))(line, held)
        line.close()
        rounds[dies].mesh.close()
        raise KeyboardInterrupt

    def job(worker: int) -> Any:
        if worker == dies and when == "before":
            rounds[dies].mesh.close()
            raise KeyboardInterrupt
        exchange = dying if worker == dies else summed(torch.full((4000,), weights[worker]))
        return rounds[worker].carry("sum", 1.0, exchange)

    found = together([lambda worker=worker: job(worker) for worker in range(4)])
    left = [worker for worker in range(4) if worker != dies]
    assert isinstance(found[dies], KeyboardInterrupt)
    for worker in left:
        members, total = found[worker]
        assert members == tuple(left)
        assert torch.equal(total, torch.full((4000,), sum(weights[one] for one in left)))
        assert rounds[worker].number == 1
        assert rounds[worker].lost == {dies: "died or has ended"}
    for worker in left:
        rounds[worker].close()


def test_nobody_waits_longer_than_the_window_and_the_late_one_is_told() -> None:
    rounds = opened(3, quorum=2, grace_s=0.2)
    x = torch.ones(3)
    first = together([lambda one=one: one.carry("sum", 1.0, summed(x)) for one in rounds[:2]])
    assert [members for members, _ in first] == [(0, 1), (0, 1)]
    assert "did not come to outer round 1 within grace_s=0.2" in rounds[0].lost[2]
    late = together([lambda: rounds[2].carry("sum", 1.0, summed(x))])[0]
    assert isinstance(late, Missed)
    assert "worker 2 came to outer round 1 after workers 0, 1 had closed it" in str(late)
    rounds[2].come_to(2)  # as after it has caught up
    again = together([lambda one=one: one.carry("sum", 1.0, summed(x)) for one in rounds])
    assert [members for members, _ in again] == [(0, 1, 2)] * 3
    assert rounds[0].lost == {}
    for one in rounds:
        one.close()


def test_one_that_comes_for_something_else_ends_alone() -> None:
    rounds = opened(3)
    x = torch.ones(3)
    whats = ["sum", "sum", "the end"]
    found = together(
        [
            lambda one=one, what=what: one.carry(what, 1.0, summed(x))
            for one, what in zip(rounds, whats, strict=True)
        ]
    )
    assert [members for members, _ in found[:2]] == [(0, 1), (0, 1)]
    assert isinstance(found[2], Missed) or "came for the end and workers 0, 1 for sum" in str(found[2])
    for one in rounds:
        one.close()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.0, 0.0)])
def test_shares_are_multiples_of_the_mean_weight(weights: tuple[float, float]) -> None:
    rounds = opened(2)
    found = together(
        [
            lambda one=one, weight=weight: one.carry("it", weight, lambda line, held: held.share(one.mesh.me))
            for one, weight in zip(rounds, weights, strict=True)
        ]
    )
    mean = sum(weights) / 2
    assert found == ([weight / mean for weight in weights] if mean else [1.0, 1.0])
    for one in rounds:
        one.close()


def test_who_does_not_know_the_token_is_not_heard() -> None:
    store = HashStore()
    mesh = Mesh(store, 0, lambda least: b"secret")
    door = json.loads(store.get("door/0"))
    other = Mesh(store, 1, lambda least: b"")
    assert other.download(0, 0, TIMEOUT_S) == b"secret"
    for token in (b"0" * 32, door["token"].encode()[:-1] + b"!"):
        with socket.create_connection(("127.0.0.1", door["port"]), TIMEOUT_S) as connection:
            connection.sendall(HELLO.pack(token, 1, -1, 0))
            assert connection.recv(1) == b""
    mesh.close()
    assert other.is_gone(0)
    with pytest.raises(Broken):
        other.download(0, 0, TIMEOUT_S)
    other.close()
