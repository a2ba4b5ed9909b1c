"""The source of active parameters that contributors read: found, run, and trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distcomp
from distcomp.active import Planned
from distcomp.errors import DistcompError
from tests.active import rank_jobs as jobs
from tests.buffers import ORDINARY, draw
from tests.conformance.toys import active_toy
from tests.conformance.toys.active_toy import SharedCoins
from tests.lockstep import converse

ROOT = Path(__file__).parent.parent.parent


def test_the_worked_example_that_contributors_read_is_the_file_that_is_tested():
    toy = Path(active_toy.__file__).read_text()
    assert f"```python\n{toy}```" in (ROOT / "CONTRIBUTING.md").read_text()


def test_coins_fall_as_often_as_they_should_and_leave_the_rest_alone():
    coins = SharedCoins(("fc", "conv"), survival=0.7)
    sets = [coins.active(ORDINARY, Planned(step)) for step in range(400)]
    assert all("norm.weight" in each.elements for each in sets)
    for layer in ("fc.weight", "conv.weight"):
        share = sum(layer in each.elements for each in sets) / 400
        assert share == pytest.approx(0.7, abs=0.08)
    assert all(("fc.weight" in each.elements) == ("fc.bias" in each.elements) for each in sets)


def test_around_any_method_what_sleeps_is_not_sent():
    coins = SharedCoins(("fc",), survival=0.5)
    method = distcomp.averaging.active_only("qsgd:bits=1", coins, compare=False)
    states = [method.init(ORDINARY)] * 2
    by_sleep: dict[bool, set[int]] = {True: set(), False: set()}
    for step in range(8):
        round_ = converse(method, draw(2, seed=step), states, step=step)
        states = round_.states
        asleep = bool((round_.estimate[: 40 * 37] == 0).all())
        by_sleep[asleep].add(round_.sent_bytes[0])
    assert max(by_sleep[True]) < 0.7 * min(by_sleep[False])


def test_a_probability_beyond_one_is_refused():
    with pytest.raises(DistcompError, match=r"lies in \[0, 1\], not 2"):
        SharedCoins(("fc",), survival=2)


def test_two_processes_train_with_it(cluster):
    (sent, awake, weights), (_, also_awake, others) = cluster(2).run(jobs.with_coins)
    rest, layer, asked = 4 * (12 * 24 + 24 + 24 * 5 + 5), 4 * (24 * 24 + 24), 40 + 40
    assert awake == also_awake
    assert set(awake) == {0, 1, 2}
    assert sent == [rest + count * layer + asked for count in awake]
    assert torch.equal(weights, others)
