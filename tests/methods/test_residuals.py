"""Residuals in fewer bits: right in expectation, never farther off than a step of their grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distcomp
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import ErrorFeedback, compact_residuals, parse
from distcomp.methods.base import cut_state, join_state
from distcomp.methods.residuals import PackedBuffer, kept, to_bf16
from distcomp.randomness import Key
from distcomp.runtime.states import States
from tests.buffers import buffer
from tests.lockstep import World

LAYOUT = Layout.of([("a", (40, 30)), ("b", (7,))])
FORMS = ("bf16", "int8")


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 towards zero from each float32, and the one away from it (from the format alone)."""
    low = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    exact = low == x.astype(np.float32).view(np.uint32)
    high = np.where(exact, low, low + np.uint32(0x10000))
    return low.view(np.float32), high.astype(np.uint32).view(np.float32)


@given(seed=st.integers(0, 2**32), power=st.integers(-30, 30))
@settings(max_examples=25)
def test_bf16_is_one_of_the_two_neighbours(seed, power):
    x = torch.randn(600, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    found = to_bf16(x, Key.of(seed)).float().numpy()
    low, high = neighbours(x.numpy())
    assert ((found == low) | (found == high)).all()
    assert torch.equal(to_bf16(x.bfloat16().float(), Key.of(seed)), x.bfloat16())


def test_bf16_keeps_what_is_no_number():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    assert torch.equal(to_bf16(special, Key.of(1)).float().nan_to_num(7.0), special.nan_to_num(7.0))


@pytest.mark.parametrize("form", FORMS)
def test_every_number_is_right_on_average(form):
    """Of 2,000 roundings, within five standard errors of the mean, whose variance is at most step^2 / 4."""
    x, layout = torch.linspace(-1.0, 1.0, 64), Layout.of([("x", (64,))])
    count = 2000
    mean = torch.stack([kept(x, layout, form, Key.of(index)).data for index in range(count)]).double().mean(0)
    step = 2.0**-7 * x.abs() if form == "bf16" else torch.full_like(x, 1 / 127)
    assert ((mean - x).abs() <= 5 * step / 2 / count**0.5 + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ["qsgd:bits=1", "topk:ratio=0.1", "powersgd:rank=1,min_compression=0"])
def test_what_was_sent_and_is_owed_is_what_came_in_but_for_rounding(spec, form):
    """sum n estimate + sum e = sum x + the rounding errors: each bounded by a step, together about zero."""
    size, steps = 2, 25
    world = World(compact_residuals(parse(spec), form), size, LAYOUT)
    balance = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    allowed = torch.zeros_like(balance)
    for step in range(steps):
        xs = [buffer(LAYOUT, 100 * step + rank) for rank in range(size)]
        (first, *_) = world.aggregate(xs)
        balance += size * first.estimate.double() - torch.stack(xs).double().sum(0)
        for owed in owed_of(world):
            reach = owed.abs() * 2.0**-6 if form == "bf16" else owed.abs().max().expand_as(owed) / 120
            allowed += reach.double()
    balance += torch.stack(owed_of(world)).double().sum(0)
    rough = balance.abs() > 1e-4
    assert rough.any()  # it is rounded
    assert (balance.abs() <= allowed + 1e-3).all()
    assert abs(balance.sum()) < 5 * (allowed.square().sum() / steps) ** 0.5 + 1e-3


def owed_of(world: World) -> list[torch.Tensor]:
    """Each worker's residual, laid out as the buffer; nothing of what has none."""
    found = []
    for state in world.states:
        cut = cut_state(state)
        leaves = {
            name: next((v for path, v in one.items() if path.endswith("residual")), None)
            for name, one in cut.items()
        }
        pieces = [
            leaves[p.name] if leaves.get(p.name) is not None else torch.zeros(p.numel) for p in LAYOUT.slices
        ]
        found.append(torch.cat(pieces))
    return found


def test_what_is_small_adds_up_where_rounding_to_nearest_would_lose_it():
    """A thousandth, four hundred times on top of 1: to the nearest bfloat16 it stays 1 for ever."""
    x = torch.ones(4000)
    nearest = x.bfloat16()
    for step in range(400):
        x = to_bf16(x + 1e-3, Key.of(step)).float()
        nearest = (nearest.float() + 1e-3).bfloat16()
    assert (nearest == 1).all()
    assert x.mean().item() == pytest.approx(1.4, abs=0.005)


@pytest.mark.parametrize(("form", "per_value"), [("float32", 4.0), ("bf16", 2.0), ("int8", 1.0 + 4 / 512)])
def test_what_it_takes_in_memory(form, per_value):
    layout = Layout.of([("a", (64, 512))])
    method = ErrorFeedback(parse("qsgd:bits=1").children().get("inner") or parse("identity"), kept=form)
    states = States(method)
    world = World(method, 1, layout)
    world.aggregate([buffer(layout, 1)])
    states.of(layout, torch.device("cpu"))
    states.commit(layout, world.states[0])
    assert states.held_bytes == pytest.approx(per_value * layout.numel, abs=64)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_holds_the_numbers_and_goes_on_with_them(form):
    """Cut and joined it is float32, the same numbers; the next step is the same bit for bit."""
    method = compact_residuals(parse("qsgd:bits=1"), form)
    through, resumed = World(method, 2, LAYOUT), World(method, 2, LAYOUT)
    for step in range(4):
        xs = [buffer(LAYOUT, 10 * step + rank) for rank in range(2)]
        if step == 2:
            resumed.states = [join_state(cut_state(state), method.init(LAYOUT)) for state in resumed.states]
        one, other = through.aggregate(xs), resumed.aggregate(xs)
        assert torch.equal(one[0].estimate, other[0].estimate)
    for left, right in zip(owed_of(through), owed_of(resumed), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_not_finite_keeps_the_old_one_without_asking_the_host(form):
    x, y = buffer(LAYOUT, 1), buffer(LAYOUT, 2)
    new, old = kept(x, LAYOUT, form, Key.of(1)), kept(y, LAYOUT, form, Key.of(2))
    assert isinstance(new, PackedBuffer)
    for finite, expected in ((True, new), (False, old)):
        found = new.where(torch.tensor(finite), old)
        assert isinstance(found, PackedBuffer)
        assert torch.equal(found.data, expected.data)
        plain = new.where(torch.tensor(finite), FlatBuffer(y, LAYOUT))
        assert torch.equal(plain.data, new.data if finite else y)


def test_all_error_feedback_within_is_compacted_and_nothing_else():
    assert compact_residuals(parse("powersgd"), "int8").walk().__next__() == ErrorFeedback(
        parse("powersgd").inner, kept="int8"
    )
    (inside,) = [
        part for part in compact_residuals(parse("dgc"), "bf16").walk() if isinstance(part, ErrorFeedback)
    ]
    assert inside.kept == "bf16"
    scheduled = compact_residuals("topk:ratio=0.1 -> 0.2 @ 3", "int8")
    for step in (0, 3):
        assert [p.kept for p in scheduled.in_step(step).walk() if isinstance(p, ErrorFeedback)] == ["int8"]
    with pytest.raises(distcomp.DistcompError, match="keeps no residual"):
        compact_residuals(parse("qsgd:bits=8"), "bf16")
    with pytest.raises(distcomp.DistcompError, match="kept in float32, bf16 or int8"):
        compact_residuals(parse("powersgd"), "int4")
