"""Settings that change with the step, and the warm-up."""

from __future__ import annotations

import pytest
import torch

from distcomp.errors import DistcompError
from distcomp.methods import METHODS, Method, Scheduled, Warmup, identity, parse, powersgd, qsgd, topk, warmup
from distcomp.schedule import Schedule
from tests.buffers import ORDINARY, draw
from tests.lockstep import converse, once


def steps_of(method: Method, count: int, size: int = 3) -> list[torch.Tensor]:
    states, found = [method.init(ORDINARY)] * size, []
    for step in range(count):
        round_ = converse(method, draw(size, seed=step), states, step=step)
        states = round_.states
        found.append(round_.estimate)
        assert sum(round_.sent_bytes) / size == pytest.approx(
            method.payload_bytes(ORDINARY, size, step), abs=8
        )
    return found


def test_each_step_is_that_of_the_setting_which_its_schedule_gives() -> None:
    method = qsgd(bits=Schedule(((0, 8), (1, 4), (3, 2))))
    assert isinstance(method, Scheduled)
    for step, bits in enumerate([8, 4, 4, 2, 2]):
        assert method.in_step(step) == qsgd(bits)
        xs = draw(3, seed=step)
        assert torch.equal(once(method, xs, step=step).estimate, once(qsgd(bits), xs, step=step).estimate)
    steps_of(method, 5)


def test_a_config_string_may_hold_a_schedule() -> None:
    assert parse("qsgd:bits=8 -> 4 @ 1,block=64") == qsgd(bits="8 -> 4 @ 1", block=64)
    assert parse("topk:ratio=0.25 *> 0.01 @ 4") == topk(Schedule(((0, 0.25), (4, 0.01)), "geometric"))
    assert parse("powersgd:rank=1 -> 2 @ 1") == powersgd(Schedule(((0, 1), (1, 2))))


def test_what_is_owed_is_carried_over_a_change() -> None:
    """Density rises to all: then everything owed is paid, and the estimates sum to the means."""
    method = topk(Schedule(((0, 0.05), (4, 1.0))))
    means = sum(torch.stack(draw(3, seed=step)).mean(0) for step in range(5))
    torch.testing.assert_close(sum(steps_of(method, 5)), means, atol=1e-5, rtol=1e-5)


def test_a_schedule_that_changes_what_is_remembered_is_refused() -> None:
    with pytest.raises(DistcompError, match="step 5"):
        qsgd(bits="4 -> 1 @ 5")
    with pytest.warns(UserWarning, match="contraction"):
        qsgd(bits="4 -> 1 @ 5", error_feedback=True)
    with pytest.raises(DistcompError, match="not 9"):
        qsgd(bits="4 -> 9 @ 5")


def test_plain_settings_are_left_as_they_were() -> None:
    for entry in METHODS.values():
        assert not isinstance(entry.recipe(), Scheduled)
    assert repr(qsgd(bits=4)) == repr(parse("qsgd"))


def test_the_reprs_that_ranks_compare_tell_schedules_apart() -> None:
    assert repr(qsgd(bits="8 -> 4 @ 10")) != repr(qsgd(bits="8 -> 4 @ 11"))
    assert "0x" not in repr(qsgd(bits="8 -> 4 @ 10"))


def test_a_warm_up_is_exact_and_then_the_method_begins_afresh() -> None:
    method = warmup("(qsgd:bits=1,block=64)", steps=2)
    assert method == Warmup(qsgd(1, 64), 2)
    estimates = steps_of(method, 5)
    plain = steps_of(identity(), 2)
    assert torch.equal(estimates[0], plain[0])
    assert torch.equal(estimates[1], plain[1])
    states = [qsgd(1, 64).init(ORDINARY)] * 3
    for step in range(2, 5):
        round_ = converse(qsgd(1, 64), draw(3, seed=step), states, step=step)
        states = round_.states
        assert torch.equal(estimates[step], round_.estimate)


def test_a_warm_up_refuses_what_is_none() -> None:
    with pytest.raises(DistcompError, match="-1"):
        warmup(steps=-1)
    with pytest.raises(DistcompError, match="no method"):
        warmup("nonsense")
    with pytest.raises(DistcompError, match="inner takes Method or str, not 3"):
        warmup(3)  # type: ignore[arg-type]
