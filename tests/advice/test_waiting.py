"""A step that waits for its exchanges: bounds of the law, and a step of real ranks that is observed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcomp.advice.waiting import waiting_step_s
from distcomp.attaching.observe_waits import Wait, WaitingStep
from distcomp.network import Fabric
from distcomp.network.framing import acknowledged_bytes, framed_bytes
from distcomp.network.request_sizes import RequestSizes
from tests.conditional import wait_jobs as jobs


def wait(out: float, back: float, took_s: float = 0.0, after_s: float = 0.0) -> Wait:
    """Of two ranks: the first sends ``out`` bytes, the second ``back``."""
    messages = ((0, 1, out), (1, 0, back))
    return Wait(RequestSizes("all_to_all", (0.0,), messages=messages), after_s, took_s)


def wire_s(one: Wait, bps: float) -> float:
    """By hand: the busier of the two directions."""
    (_, _, out), (_, _, back) = one.ask.messages
    return max(8 * (framed_bytes(a) + acknowledged_bytes(b)) / bps for a, b in ((out, back), (back, out)))


sizes = st.floats(0, 1e7)
seconds = st.floats(0, 0.1)
waits = st.lists(st.builds(wait, sizes, sizes, seconds, seconds), min_size=1, max_size=8)
rates = st.sampled_from([1e7, 1e8, 1e9, 1e10])


@given(waits, rates, seconds, st.floats(0, 5e-3))
def test_between_the_longer_of_both_and_their_sum(found, bps, rest_s, burst_s):
    step_s = sum(one.took_s + one.after_s for one in found) + rest_s
    step = WaitingStep(step_s, tuple(found))
    predicted_s = waiting_step_s(step, Fabric((bps, bps)), burst_s=burst_s)
    wires_s = sum(wire_s(one, bps) for one in found)
    assert predicted_s >= step_s * (1 - 1e-9)
    assert predicted_s >= wires_s - len(found) * burst_s - 1e-9
    assert predicted_s <= step_s + wires_s + len(found) * step.least_s + 1e-9
    # A bucket cannot give more than it held and what came in while time passed.
    computed_s = step_s - sum(one.took_s for one in found)
    assert predicted_s - computed_s >= wires_s - burst_s - sum(one.after_s for one in found) - 1e-9


@given(waits, st.floats(1e6, 1e10), st.floats(1, 10), st.floats(0, 5e-3))
def test_a_faster_link_is_never_slower(found, bps, times, burst_s):
    step = WaitingStep(1.0, tuple(found))
    slow_s, fast_s = (
        waiting_step_s(step, Fabric((rate, rate)), burst_s=burst_s) for rate in (bps, times * bps)
    )
    assert fast_s <= slow_s + 1e-9


@given(waits, seconds)
def test_without_limits_it_is_what_was_observed(found, step_s):
    step = WaitingStep(step_s, tuple(found))
    assert waiting_step_s(step, Fabric.uniform(2)) == pytest.approx(step_s)
    assert waiting_step_s(WaitingStep(step_s, ()), Fabric.uniform(2, "1mbit")) == step_s


@given(waits, rates, seconds, seconds)
def test_what_a_delay_costs_beyond_itself_is_paid_by_each_wait_that_is_longer(found, bps, delay_s, wake_s):
    step = WaitingStep(1.0, tuple(found))
    told = step.delayed(1.0 + len(found) * (delay_s + wake_s), delay_s)
    assert told.wake_s == pytest.approx(wake_s, abs=1e-9)
    assert step.delayed(1.0, delay_s).wake_s == 0
    without_s, with_s = (waiting_step_s(one, Fabric((bps, bps))) for one in (step, told))
    assert without_s <= with_s <= without_s + len(found) * (wake_s + 1e-9)
    assert with_s <= without_s + (without_s - 1.0) + 1e-9
    far = Fabric((1e12, 1e12), 1.0)
    longer_s = waiting_step_s(told, far) - waiting_step_s(step, far)
    assert longer_s == pytest.approx(len(found) * wake_s, abs=1e-8)


def test_rows_there_and_back_by_hand():
    """Carrying takes 2 ms where the wire takes 8: 6 ms more each, and what the smallest message takes; the
    busier direction counts, in whichever it is."""
    frame = framed_bytes(1) * 1e6
    large = [wait(1e6, 0, 2e-3), wait(0, 1e6, 2e-3)]
    small = wait(0, 0, 1e-4)
    step = WaitingStep(0.05, (small, *large))
    fabric = Fabric((1e9, 1e9))
    assert waiting_step_s(step, fabric) == pytest.approx(0.05 + 2 * (8 * frame / 1e9 + 1e-4 - 2e-3))
    far = Fabric((1e9, 1e9), 3e-3)
    assert waiting_step_s(step, far) == pytest.approx(waiting_step_s(step, fabric) + 3 * 3e-3)
    slower = Fabric((1e9, 1e8))  # both directions cross the slower link
    assert waiting_step_s(step, slower) == pytest.approx(0.05 + 2 * (8 * frame / 1e8 + 1e-4 - 2e-3))


def test_a_bucket_gives_what_it_holds_and_fills_while_computing():
    one_ms = 1e-3 * 1e9 / 8 / framed_bytes(1)  # bytes that take 1 ms
    full = WaitingStep(0.0, (wait(one_ms, 0), wait(one_ms, 0, after_s=1e-3)))
    assert waiting_step_s(full, Fabric((1e9, 1e9)), burst_s=1e-3) == pytest.approx(0, abs=1e-12)
    empty = WaitingStep(0.0, (wait(one_ms, 0), wait(one_ms, 0, after_s=2e-4)))
    assert waiting_step_s(empty, Fabric((1e9, 1e9)), burst_s=1e-3) == pytest.approx(8e-4)
    assert waiting_step_s(empty, Fabric((1e9, 1e9))) == pytest.approx(2e-3)


def test_what_ranks_really_wait_for_is_observed(cluster):
    """Seven calls of a mixture and the gate's gradients, with the bytes that each rank sends to the other."""
    for found, rows, due in cluster(2).run(jobs.observed):
        assert len(found.waits) == 8
        assert [one.ask.kind for one in found.waits[:7]] == [
            "all_to_all",
            "all_gather",
            *["all_to_all"] * 4,
            "all_to_all",
        ]
        assert found.waits[2].ask.messages == tuple(rows)
        assert sum(one.ask.sent_bytes(2) for one in found.waits[:7]) == pytest.approx(due)
        assert 0 < found.least_s <= found.waits[2].took_s < found.step_s
        assert sum(one.took_s for one in found.waits) < found.step_s


def test_steps_that_ask_unequally_often_are_refused(cluster):
    for words in cluster(2).run(jobs.unequal):
        assert words == (
            "between 1 and 2 exchanges were seen in a step; let all ranks make the same ones in every step"
        )
