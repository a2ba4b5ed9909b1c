"""The laws of one exchange: contributions, agreement, bytes, purity, determinism."""

from __future__ import annotations

import pytest
import torch

from distcomp.layout import Layout
from distcomp.methods import Method
from tests.buffers import ODD, ORDINARY, alike, copied, draw, same_bits
from tests.conformance.subjects import Subject, default_methods, methods
from tests.lockstep import Round, converse, once

ARITHMETIC = 64 * torch.finfo(torch.float32).eps
"""Room for a method's own float32 arithmetic, relative to the largest magnitude."""

subjects = pytest.mark.parametrize("subject", methods(), ids=str)
defaults = pytest.mark.parametrize("subject", default_methods(), ids=str)
sizes = pytest.mark.parametrize("size", [1, 3])


def law_error(round_: Round) -> tuple[float, float]:
    """How far the contributions sum to from n times the estimate, and how far rounding may put them."""
    parts = round_.contributions()
    size = len(parts)
    gap = torch.stack(parts).double().sum(0) - size * round_.estimate.double()
    largest = max((float(torch.stack(parts).abs().sum(0).max()) if parts[0].numel() else 0.0), 0.0)
    allowed = largest * ((size - 1) * round_.rounding + ARITHMETIC)
    return (float(gap.abs().max()) if gap.numel() else 0.0), allowed


def check_one_conversation(method: Method, size: int, layout: Layout = ORDINARY) -> Round:
    """The laws that need no second look: one estimate on all ranks, contributions, and bytes as declared."""
    declared = method.payload_bytes(layout, size, 0)
    round_ = once(method, draw(size, layout), layout)
    for estimate in round_.estimates:
        assert estimate.shape == (layout.numel,)
        assert estimate.dtype == torch.float32
        assert torch.equal(estimate, round_.estimate), "ranks hold different estimates"
    error, allowed = law_error(round_)
    assert error <= allowed, f"contributions miss n times the estimate by {error}, {allowed} is rounding"
    check_bytes(method, round_, size, declared)
    return round_


def check_bytes(method: Method, round_: Round, size: int, declared: int, where: str = "") -> None:
    """As declared, or no more where what is sent depends on the data."""
    requests, sent = len(round_.asked) // size, sum(round_.sent_bytes) / size
    if any(part.bytes_are_bound for part in method.walk()):
        assert sent <= declared + 2 * requests, where
        assert (sent > 0) == (declared > 0), where
    else:
        assert sent == pytest.approx(declared, abs=2 * requests), where


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@subjects
def test_one_estimate_that_the_contributions_sum_to_for_the_bytes_declared(
    subject: Subject, size: int
) -> None:
    round_ = check_one_conversation(subject.build(), size)
    assert all(round_.finite)
    assert round_.estimate.isfinite().all()


@pytest.mark.parametrize("size", [1, 3])
@subjects
def test_odd_shapes(subject: Subject, size: int) -> None:
    for layout in ODD.values():
        check_one_conversation(subject.build(), size, layout)


@pytest.mark.parametrize("scale", [1e30, 1e5, 1e-20, 1e-30, 1e-40])
@subjects
def test_every_finite_magnitude_stays_finite(subject: Subject, scale: float) -> None:
    """From the far end of float32 to the denormals. What a narrow type cannot hold is clamped, not lost."""
    round_ = once(subject.build(), draw(3, scale=scale))
    assert round_.estimate.isfinite().all()
    assert all(contribution.isfinite().all() for contribution in round_.contributions())
    error, allowed = law_error(round_)
    subnormal = 3 * 2.0**-24 if round_.rounding else 1e-44
    assert error <= allowed + subnormal


@sizes
@subjects
def test_zeros_stay_zeros(subject: Subject, size: int) -> None:
    round_ = once(subject.build(), [torch.zeros(ORDINARY.numel) for _ in range(size)])
    assert not round_.estimate.any()


@defaults
def test_the_bytes_of_a_step_do_not_depend_on_the_values(subject: Subject) -> None:
    method = subject.build()
    sent = {
        tuple(once(method, xs).sent_bytes)
        for xs in (draw(3), draw(3, seed=1), draw(3, scale=1e-30), [torch.zeros(ORDINARY.numel)] * 3)
    }
    assert len(sent) == 1


@sizes
@subjects
def test_neither_x_nor_the_state_is_changed(subject: Subject, size: int) -> None:
    method = subject.build()
    before = once(method, draw(size)).states
    xs = draw(size, seed=1)
    kept_xs, kept_states = [x.clone() for x in xs], [copied(state) for state in before]
    round_ = converse(method, xs, before, step=1)
    round_.contributions()
    assert all(torch.equal(x, kept) for x, kept in zip(xs, kept_xs, strict=True))
    assert all(alike(state, kept) for state, kept in zip(before, kept_states, strict=True))


@subjects
def test_a_contribution_asked_for_twice_is_the_same(subject: Subject) -> None:
    round_ = once(subject.build(), draw(3))
    first = [contribution.clone() for contribution in round_.contributions()]
    estimate = round_.estimate.clone()
    assert all(torch.equal(a, b) for a, b in zip(first, round_.contributions(), strict=True))
    assert torch.equal(round_.estimate, estimate)


@subjects
def test_what_is_owed_is_what_was_given_less_the_contribution(subject: Subject) -> None:
    xs = draw(3)
    for x, result in zip(xs, once(subject.build(), xs).results, strict=True):
        wanted = x.double() - result.contribution().double()
        residual = result.residual(x.clone()).double()
        largest = float(x.abs().max() + result.contribution().abs().max())
        assert float((residual - wanted).abs().max()) <= ARITHMETIC * largest


@defaults
def test_the_bytes_of_every_step_are_those_declared_for_it(subject: Subject) -> None:
    method, size = subject.build(), 3
    states = [method.init(ORDINARY) for _ in range(size)]
    for step in range(6):
        declared = method.payload_bytes(ORDINARY, size, step)
        round_ = converse(method, draw(size, seed=step), states, step=step)
        states = round_.states
        check_bytes(method, round_, size, declared, f"step {step}")


@sizes
@subjects
def test_the_same_conversation_twice_gives_the_same_bits(subject: Subject, size: int) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator must not matter, and must not be touched
        at = torch.get_rng_state()
        results.append(once(subject.build(), draw(size)))
        assert torch.equal(torch.get_rng_state(), at)
    one, other = results
    assert same_bits(one.estimate, other.estimate)
    assert all(same_bits(a, b) for a, b in zip(one.contributions(), other.contributions(), strict=True))
    assert all(alike(a, b) for a, b in zip(one.states, other.states, strict=True))
