"""my_method against its oracle, the law of contributions, and the bytes that it declares."""

from __future__ import annotations

from typing import Any

import my_method_oracle as oracle
import pytest
import torch
from my_method import my_method

from distcomp.layout import Layout
from distcomp.methods import Method, StepContext, parse
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

LAYOUT = Layout.of([("weight", (16, 8)), ("bias", (5,))])
RANKS = 3
GRID = 0.25


def given() -> list[torch.Tensor]:
    """One bucket of each rank."""
    draws = [torch.Generator().manual_seed(rank) for rank in range(RANKS)]
    return [torch.randn(LAYOUT.numel, generator=draw, dtype=torch.float32) for draw in draws]


def step(method: Method, xs: list[torch.Tensor], states: list[Any], at: int = 0) -> tuple[list[Any], int]:
    """One exchange of all ranks in this process: each one's result, and the bytes that rank 0 sent."""
    net = Lockstep(RANKS)
    contexts = [StepContext(rank, RANKS, LAYOUT, at, Key.of(0, at)) for rank in range(RANKS)]
    given_to = zip(xs, states, contexts, strict=True)
    talks = [Aggregation(method, x.clone(), state, context) for x, state, context in given_to]
    net.run(talks)
    return [talk.finished() for talk in talks], net.ledgers[0].total_bytes


def test_every_step_is_the_oracle_s() -> None:
    method, xs = my_method(grid=GRID), given()
    states = [method.init(LAYOUT) for _ in xs]
    for at, expected in enumerate(oracle.steps([x.numpy() for x in xs], GRID, count=4)):
        results, _ = step(method, xs, states, at)
        for result in results:
            wanted = torch.from_numpy(expected)
            torch.testing.assert_close(result.estimate.double(), wanted, rtol=0, atol=1e-5)
        states = [result.state for result in results]


def test_contributions_sum_to_n_times_the_estimate() -> None:
    method, xs = my_method(grid=GRID), given()
    results, _ = step(method, xs, [method.init(LAYOUT) for _ in xs])
    total = torch.stack([result.contribution() for result in results]).sum(0)
    torch.testing.assert_close(total, RANKS * results[0].estimate)


def test_what_is_declared_is_sent() -> None:
    method, xs = my_method(grid=GRID), given()
    _, sent_bytes = step(method, xs, [method.init(LAYOUT) for _ in xs])
    assert sent_bytes == method.payload_bytes(LAYOUT, RANKS, 0)


def test_its_text_makes_it() -> None:
    assert parse(f"my_method:grid={GRID}") == my_method(grid=GRID)
    with pytest.raises(Exception, match="nosuch"):
        parse("my_method:nosuch=1")
