"""A budget of bytes over layers: the knapsack against all plans there are, and what it buys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.compressors import Identity, Quantize, TopK
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Allocate, ErrorFeedback, allocate, parse
from distcomp.methods.allocate import LADDER, _sizes, knapsack
from distcomp.payload import body_bytes
from distcomp.schedule import Schedule
from tests.buffers import draw
from tests.lockstep import Round, converse

NET = Layout.of([("dense", (40, 30)), ("sparse", (50, 40)), ("bias", (40,)), ("zero", (20, 30))])

tables = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=3, max_size=3),
        min_size=layers,
        max_size=layers,
    )
)


@given(tables, st.integers(1, 120))
def test_no_plan_within_the_budget_has_less_error(table: list[list[tuple[int, int]]], budget: int) -> None:
    errors = np.array([[error for error, _ in row] for row in table], dtype=float)
    sizes = np.array([[size for _, size in row] for row in table])
    rows = range(len(table))
    plans = list(itertools.product(range(3), repeat=len(table)))
    fitting = [plan for plan in plans if sum(sizes[row, plan[row]] for row in rows) <= budget]
    found = knapsack(errors, sizes, budget)
    spent = sum(sizes[row, found[row]] for row in rows)
    if not fitting:
        assert spent == sizes.min(1).sum()
        return
    assert spent <= budget
    best = min(sum(errors[row, plan[row]] for row in rows) for plan in fitting)
    assert sum(errors[row, found[row]] for row in rows) == best


@given(st.integers(1, 40), st.integers(10**5, 10**9), st.integers(0, 99))
def test_a_large_budget_is_never_exceeded_and_nearly_spent(layers: int, budget: int, seed: int) -> None:
    """Many near ties: more is always better, so that a plan that rounds sizes down spends too much."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 3 * budget // layers, size=(layers, 5))
    plan = knapsack(-sizes.astype(float), sizes, budget)
    spent = sizes[range(layers), plan].sum()
    if sizes.min(1).sum() <= budget * (1 - (layers + 1) / 8192):
        assert spent <= budget
        widest = np.minimum(np.diff(np.sort(sizes, 1)).max(), budget)
        assert spent >= min(sizes.max(1).sum(), budget - widest) - budget * (layers + 1) / 8192
    if sizes.max(1).sum() <= budget * (1 - (layers + 1) / 8192):
        assert list(plan) == list(sizes.argmax(1))


def gradients(step: int, size: int = 3) -> list[torch.Tensor]:
    """One layer of even values, one with few large ones, one with none."""
    xs = draw(size, NET, seed=step)
    for x in xs:
        for param, piece in NET.pieces(x):
            if param.name == "sparse":
                piece[torch.arange(piece.numel()) % 40 != 0] *= 0.01
                piece *= 30
            if param.name == "zero":
                piece.zero_()
    return xs


def run(method: Allocate | ErrorFeedback, steps: int) -> list[Round]:
    states, found = [method.init(NET)] * 3, []
    for step in range(steps):
        found.append(converse(method, gradients(step), states, NET, step))
        states = found[-1].states
    return found


@pytest.mark.parametrize("budget", [1 / 8, 1 / 16, 1 / 32])
def test_it_errs_less_than_any_single_option_of_the_same_bytes(budget: float) -> None:
    planned = run(Allocate(budget, period=2), 4)[-1]
    limit = int(budget * 4 * NET.numel)
    mean = torch.stack(gradients(3)).mean(0)
    uniform = [
        converse(Allocate(8.0, (one,)), gradients(3), [Allocate(8.0, (one,)).init(NET)] * 3, NET, 3)
        for one in LADDER
        if body_bytes(one.parts(NET)) <= limit
    ]
    best = min(float((round_.estimate - mean).norm()) for round_ in uniform)
    assert float((planned.estimate - mean).norm()) < 0.8 * best
    options = {name: int(option) for name, option in planned.states[0]["option"].items()}
    spent = sum(_sizes(NET, LADDER)[row, options[name]] for row, name in enumerate(NET.names))
    assert spent <= limit
    assert all(state["option"] == planned.states[0]["option"] for state in planned.states)


def test_each_layer_gets_what_suits_it() -> None:
    options = run(Allocate(1 / 16, period=1), 2)[-1].states[0]["option"]
    kinds = {name: LADDER[int(option)] for name, option in options.items()}
    assert isinstance(kinds["dense"], Quantize)
    assert not isinstance(kinds["sparse"], Quantize | Identity)
    assert int(options["zero"]) == len(LADDER) - 1


def test_with_room_for_all_nothing_is_compressed() -> None:
    for step, round_ in enumerate(run(Allocate(1.0, period=1), 2)):
        torch.testing.assert_close(round_.estimate, torch.stack(gradients(step)).mean(0))
        assert {int(one) for one in round_.states[0]["option"].values()} == {0, len(LADDER) - 1}


def test_the_plan_is_made_in_its_steps_and_holds_between_them() -> None:
    rounds = run(Allocate(1 / 16, period=3), 8)
    plans = [tuple(int(one) for one in round_.states[0]["option"].values()) for round_ in rounds]
    uniform = plans[0]
    assert len(set(uniform)) == 1
    assert plans[0] == plans[1]
    assert plans[2] == plans[3] == plans[4]
    assert plans[5] == plans[6] == plans[7]
    assert plans[2] != uniform
    gathers = [len(round_.asked) for round_ in rounds]
    assert gathers[2] > gathers[1]


def test_a_budget_may_follow_a_schedule() -> None:
    method = parse("allocate:budget=0.25 -> 0.02 @ 3,period=1.0")
    assert method == allocate(Schedule(((0, 0.25), (3, 0.02))), 1.0)
    sent = [sum(round_.sent_bytes) for round_ in run(method, 6)]
    assert sent[5] < sent[2] / 3


def test_with_error_feedback_nothing_is_lost_when_the_plan_changes() -> None:
    rounds = run(allocate(1 / 32, 2.0), 9)
    sent = sum(3 * round_.estimate.double() for round_ in rounds)
    residual = sum(state["residual"].data.double() for state in rounds[-1].states)
    came = sum(x.double() for step in range(9) for x in gradients(step))
    torch.testing.assert_close(sent + residual, came, atol=1e-3, rtol=1e-4)


def test_a_budget_that_cannot_be_met_is_told_with_the_numbers() -> None:
    with pytest.warns(UserWarning, match="cannot be met in a bucket of 3840 elements"):
        run(Allocate(1e-4, period=1), 1)


def test_what_it_cannot_do_is_refused() -> None:
    for refused in (lambda: allocate(0.0), lambda: allocate(period=0.5), lambda: Allocate(ladder=())):
        with pytest.raises(DistcompError):
            refused()
    assert Allocate(ladder=(TopK(0.1),)).init(NET)["option"]["bias"] == -1
