"""State: cut by parameter and joined again, in other buckets, in another process, after a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch

from distcomp.collectives import AllToAll
from distcomp.methods import Method
from distcomp.methods.base import cut_state, join_state
from distcomp.methods.feedback import ErrorFeedback
from tests.buffers import ORDINARY, alike, by_name, draw, groups, same_bits
from tests.conformance.subjects import Subject, methods
from tests.conformance.test_law import law_error
from tests.lockstep import Grouping, converse, once

SIZE = 3
STEPS = 2

subjects = pytest.mark.parametrize("subject", methods(), ids=str)

ONE_BUCKET = groups(ORDINARY, range(4))
OTHER_BUCKETS = {
    "backwards in two": groups(ORDINARY, (3, 2), (1, 0)),
    "each alone": groups(ORDINARY, (1,), (0,), (3,), (2,)),
}


def gradients(step: int) -> list[dict[str, torch.Tensor]]:
    return [by_name(x, ORDINARY) for x in draw(SIZE, seed=step)]


@pytest.mark.parametrize("buckets", OTHER_BUCKETS.values(), ids=OTHER_BUCKETS)
@subjects
def test_buckets_cut_otherwise_change_no_value(subject: Subject, buckets) -> None:
    """Grown in one grouping, continued in another: DistributedDataParallel does this after its first step.

    Where chunks of a bucket have owners (a Swap), other buckets make other owners. Without state the step is
    the same all the same. With state, what the old owner's re-encoding erred by is owed through the first
    encoding once; then the law holds, and what is estimated and still owed adds up to the same.
    """
    straight = Grouping(subject.build(), ONE_BUCKET, SIZE)
    for step in range(STEPS):
        straight.aggregate(gradients(step))
    moved = straight.regroup(buckets)
    for step in range(STEPS, 2 * STEPS):
        expected, found = straight.aggregate(gradients(step)), moved.aggregate(gradients(step))
        if any(straight.states) and any(isinstance(request, AllToAll) for request in straight.asked):
            keeps_all = not subject.entry.direction and not forgets(straight.method)
            assert_alike_in_sum(straight, moved, expected, found, keeps_all)
            return
        for name in ORDINARY.names:
            assert same_bits(found[name], expected[name]), f"{name} at step {step}"


def forgets(method: Method) -> bool:
    """Whether a part of what was not sent is forgotten: another part, where another rank owns it."""
    filtered = isinstance(method, ErrorFeedback) and (method.beta < 1 or method.decay < 1)
    return filtered or any(forgets(inner) for inner in method.children().values())


def assert_alike_in_sum(one: Grouping, other: Grouping, expected, found, keeps_all: bool) -> None:
    """The law in the new buckets. Of a mean with residuals: the same total of what is sent and owed. (A
    direction is no mean, and what EF21 keeps is the estimate itself.)"""
    for round_ in other.rounds:
        error, allowed = law_error(round_)
        assert error <= allowed
    for name, leaves in one.states[0].items():
        for path in leaves:
            if not path.endswith("residual") or not keeps_all:
                continue
            a, b = (
                SIZE * estimate[name].double()
                + sum(states[name][path].reshape(-1).double() for states in world.states)
                for world, estimate in ((one, expected), (other, found))
            )
            assert (a - b).abs().max() <= 1e-6 * (1 + a.abs().max()), f"{name}/{path}"


@subjects
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(subject: Subject) -> None:
    method = subject.build()
    states = [method.init(ORDINARY) for _ in range(SIZE)]
    for step in range(STEPS):
        states = converse(method, draw(SIZE, seed=step), states, step=step).states

    resumed = [
        join_state(through_a_file(cut_state(state)), subject.build().init(ORDINARY)) for state in states
    ]
    assert all(alike(a, b) for a, b in zip(states, resumed, strict=True))
    for step in range(STEPS, 2 * STEPS):
        xs = draw(SIZE, seed=step)
        one, other = (
            converse(method, xs, states, step=step),
            converse(subject.build(), xs, resumed, step=step),
        )
        assert same_bits(one.estimate, other.estimate)
        states, resumed = one.states, other.states
    assert all(alike(a, b) for a, b in zip(states, resumed, strict=True))


def through_a_file(cut):
    buffer = io.BytesIO()
    torch.save(cut, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@subjects
def test_state_is_kept_by_parameter_and_a_fresh_one_fills_what_is_missing(subject: Subject) -> None:
    method = subject.build()
    state = once(method, draw(SIZE)).states[0]
    cut = cut_state(state)
    assert set(cut) <= set(ORDINARY.names)
    assert alike(join_state({}, method.init(ORDINARY)), method.init(ORDINARY))
    half = {name: leaves for name, leaves in cut.items() if name == ORDINARY.names[0]}
    mixed = cut_state(join_state(half, method.init(ORDINARY)))
    fresh = cut_state(method.init(ORDINARY))
    for name, leaves in mixed.items():
        wanted = (half if name in half else fresh)[name]
        assert all(same_bits(leaf, wanted[path]) for path, leaf in leaves.items())
