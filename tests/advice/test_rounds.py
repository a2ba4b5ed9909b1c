"""Outer rounds in virtual time: who is in which, what it costs, and what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcomp import cli
from distcomp.advice import RoundsSimulation, Scenario, Setting, Simulation, task_of
from distcomp.advice.scenario import Down, Slow
from distcomp.errors import DistcompError
from distcomp.methods import parse
from distcomp.network.fabric import Fabric
from tests.advice.test_simulate import SCRIPT, training_task

PERIOD = 4


def simulated(
    failing: str = "continue", workers: int = 4, scenario: Scenario | None = None, **changes: Any
) -> RoundsSimulation:
    method = parse(f"diloco:period={PERIOD},outer_momentum=0.5,on_failure=({failing})")
    return RoundsSimulation(
        training_task(**changes), method, Fabric.uniform(workers), scenario or Scenario(compute_s=1.0)
    )


def test_without_faults_it_is_the_simulation_of_all() -> None:
    rounds = simulated()
    every = Simulation(
        training_task(),
        parse(f"diloco:period={PERIOD},outer_momentum=0.5"),
        Setting(Fabric.uniform(4), Scenario(compute_s=1.0)),
    )
    for _ in range(3):
        rounds.round()
        for _ in range(PERIOD):
            every.step()
    torch.testing.assert_close(rounds.anchor, every.models[0])
    assert rounds.now_s == pytest.approx(every.seconds)
    assert rounds.sent_bytes == every.sent_bytes > 0
    assert rounds.goodput == pytest.approx(1.0)
    assert rounds.account.members == [4, 4, 4]


def test_seconds_by_hand_where_one_is_three_times_as_slow() -> None:
    """Three take 4 s for a round, the fourth 12 s; the window is 2 s.

    Round 1 closes at 6 s without it, 2 at 10 s: nobody waits for one that has not announced itself. It comes
    at 12 s, two rounds after the one that it began from: what it learnt is dropped. It takes the anchor over,
    and is waited for again: round 3 closes at 16 s.
    """
    slow = Scenario(compute_s=1.0, slow=(Slow((3,), 3.0),))
    one = simulated("continue:quorum=3,grace_s=2", scenario=slow)
    one.round()
    assert one.now_s == pytest.approx(6.0)
    assert one.account.members == [3]
    one.round()
    assert one.now_s == pytest.approx(10.0)
    one.round()
    assert one.account.dropped == 1
    assert one.account.carried == 0
    assert one.now_s == pytest.approx(16.0)
    assert one.account.applied_s == pytest.approx(9 * 4.0)
    assert one.goodput == pytest.approx(36 / (4 * 16))


def test_what_is_one_round_late_is_carried_and_counts() -> None:
    """The fourth takes 7 s: round 1 closes at 4.5 s without it, and it comes in the middle of round 2."""
    slow = Scenario(compute_s=1.0, slow=(Slow((3,), 1.75),))
    one = simulated("continue:quorum=3,grace_s=0.5", scenario=slow)
    start = one.anchor.clone()
    one.round()
    assert (one.now_s, one.account.members) == (pytest.approx(4.5), [3])
    first = one.anchor.clone()
    late = one._stints[3]
    one.round()
    # It came at 7 s, took the anchor over, and did the 2 steps that were left: ready at 10.5 s, and round 2
    # closes at 9 s without it again.
    assert one.account.carried == 1
    assert one.now_s == pytest.approx(9.0)
    carried = one._stints[3]
    assert (late.steps, carried.steps, carried.seen) == (4, 2, 6.0)
    assert carried.useful_s == pytest.approx(7.0 + 3.5)
    assert carried.carries is late
    assert torch.equal(carried.model, first)
    assert torch.equal(late.model, start)
    alone = one._inner.trained({3: late})[3]
    one._inner.forget(3)
    begun = {}
    trained = one._inner.trained
    one._inner.trained = lambda stints: begun.update(stints) or trained(stints)  # type: ignore[method-assign]
    one._models({3: carried})
    torch.testing.assert_close(begun[3].model, first + (alone - start))


def test_each_weighs_its_steps() -> None:
    """The mean by hand in NumPy, of contributions of 4 steps and one of 6."""
    slow = Scenario(compute_s=1.0, slow=(Slow((3,), 1.2),))
    one = simulated("continue:quorum=3,grace_s=0", scenario=slow)
    one.round()
    models: dict[int, Any] = {}
    exchange = one._exchange

    def watched(members: list[int], trained: Any) -> float:
        models.update({worker: trained[worker].numpy().astype(np.float64) for worker in members})
        return exchange(members, trained)

    one._exchange = watched  # type: ignore[method-assign]
    before = one.anchor.numpy().astype(np.float64)
    momentum = one._common["outer"]["momentum"].data.numpy().astype(np.float64)
    one.round()
    weights = dict.fromkeys(models, 4.0)
    if 3 in weights:
        weights[3] = one._stints[3].seen
    total = sum(weights.values())
    gradient = sum(weights[worker] * (before - models[worker]) for worker in models) / total
    momentum = 0.5 * momentum + gradient
    expected = before - 0.7 * (gradient + 0.5 * momentum)
    np.testing.assert_allclose(one.anchor.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_workers_die_and_are_replaced() -> None:
    often = Scenario(compute_s=60.0, failures_per_hour=0.9, replaced_s=300.0)
    one = simulated("continue:quorum=2,grace_s=30", workers=6, scenario=often)
    for _ in range(10):
        one.round()
    account = one.account
    assert account.died > 3
    assert account.died - 6 < account.joined <= account.died
    assert min(account.members) >= 2
    assert min(account.members) < 6
    assert 0.4 < one.goodput < 1.0
    assert torch.isfinite(one.anchor).all()


@pytest.mark.parametrize("sent", ["identity", "qsgd:bits=4", "topk:ratio=0.1"])
def test_seconds_without_training_are_those_with_it(sent: str) -> None:
    method = parse(f"diloco:period={PERIOD},compressor=({sent}),on_failure=(continue:quorum=3,grace_s=1)")
    often = Scenario(1.0, straggler_chance=0.1, straggler_factor=5.0, failures_per_hour=0.9, replaced_s=9.0)
    fabric = Fabric.uniform(6, "10mbit", "5ms")
    both = [
        RoundsSimulation(training_task(), method, fabric, often, trains=trains) for trains in (True, False)
    ]
    for _ in range(6):
        for one in both:
            one.round()
    assert both[0].now_s == both[1].now_s
    assert both[0].account == both[1].account
    assert not torch.equal(both[0].anchor, both[1].anchor)


def test_fewer_than_the_quorum_and_what_is_not_simulated_are_told() -> None:
    dying = Scenario(compute_s=3600.0, failures_per_hour=0.999999, replaced_s=float("inf"))
    one = simulated("continue:quorum=4", scenario=dying)
    told = ""
    for _ in range(5):
        try:
            one.round()
        except DistcompError as error:
            told = str(error)
            break
    assert "of at least 4 workers (the quorum) come to outer round" in told
    with pytest.raises(DistcompError, match="simulated of on_failure='continue'"):
        RoundsSimulation(training_task(), parse("diloco"), Fabric.uniform(2), Scenario())


FAILING = """
compute = "60s"

[failures]
per_hour = 0.9
replaced = "300s"
"""


def test_the_command_holds_rounds_where_workers_may_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is what the simulation says, at the rounds that end in or after the steps asked for."""
    script, scenario = tmp_path / "script.py", tmp_path / "scenario.toml"
    script.write_text(SCRIPT)
    scenario.write_text(FAILING)
    method = "diloco:period=4,on_failure=(continue:quorum=2,grace_s=30)"
    given = ["simulate", "--workers", "6", "--method", method, "--scenario", str(scenario), "--json"]
    asked = ["--steps", "30", "--eval-every", "8", "-o", str(tmp_path / "run"), str(script), "7"]
    assert cli.main([*given, *asked]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    one = RoundsSimulation(
        task_of(script, ["7"]), parse(method), Fabric.uniform(6, "10gbit"), Scenario.from_toml(scenario)
    )
    expected = []
    for round_ in range(1, 9):
        one.round()
        if round_ % 2 == 0:
            expected.append({"step": 4 * round_, **one.evaluate(), **one.told()})
    assert told == expected
    assert told[-1]["step"] == 32
    assert told[-1]["died"] == one.account.died > 0


@pytest.mark.parametrize(
    ("method", "more", "word"),
    [
        ("qsgd:bits=4", [], "only outer rounds survive"),
        ("diloco", [], "diloco:on_failure=continue"),
        ("diloco:on_failure=continue", ["--sharded"], "leave --sharded out"),
        ("streaming_diloco:on_failure=continue", [], "leave on_failure"),
    ],
)
def test_the_command_says_what_cannot_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, more: list[str], word: str
) -> None:
    script, scenario = tmp_path / "script.py", tmp_path / "scenario.toml"
    script.write_text(SCRIPT)
    scenario.write_text(FAILING)
    given = ["simulate", "--workers", "4", "--method", method, "--scenario", str(scenario), *more]
    assert cli.main([*given, str(script), "7"]) == 2
    assert word in capsys.readouterr().err


def test_links_that_fail_are_refused_in_rounds() -> None:
    with pytest.raises(DistcompError, match=r"give \[failures\] for \[\[down\]\]"):
        simulated(scenario=Scenario(1.0, down=(Down((1,), 0.0, 9.0),)))
