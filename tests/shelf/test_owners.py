"""Reduce-scatter: each rank is told its own piece of the mean, and the law of contributions holds for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distcomp
from distcomp.compressors import Cast, Compressor, Identity, Quantize, ScaledSign, TopK
from distcomp.methods import Choose, ErrorFeedback, Method, Rule, lift
from distcomp.methods.owners import OwnPiece, ToOwners, owned_layout, to_owners

from .world import World, slab

COMPRESSORS: dict[str, Compressor] = {
    "identity": Identity(),
    "bf16": Cast("bf16"),
    "4 bits": Quantize(4),
    "1 bit": Quantize(1),
    "sign": ScaledSign(),
    "top-k": TopK(0.1),
}
PATTERNED = [lift(Quantize(4), "gather"), lift(Quantize(4), "scatter"), lift(Quantize(4)), lift(Identity())]


def pieces_of(world: World, size: int, numel: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: the pieces laid end to end, and the sum of the contributions (float64)."""
    outcomes = world.talk([slab(world.layout, 10 * seed + rank) for rank in range(size)])
    given_ = torch.stack([outcome.contribution().double() for outcome in outcomes]).sum(0)
    return torch.cat([outcome.estimate for outcome in outcomes]), given_


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@settings(max_examples=12)
@given(size=st.integers(1, 4), piece=st.sampled_from([0, 1, 511, 512, 700]), seed=st.integers(0, 99))
def test_pieces_times_n_are_the_sum_of_the_contributions(compressor, size, piece, seed):
    world = World(ToOwners(compressor), size, owned_layout("u", size * piece, size))
    estimate, given_ = pieces_of(world, size, size * piece, seed)
    assert estimate.numel() == size * piece
    assert torch.allclose(size * estimate.double(), given_, rtol=0, atol=1e-5)
    assert world.sent_bytes == [world.method.payload_bytes(world.layout, size)] * size


@pytest.mark.parametrize("inner", PATTERNED, ids=str)
def test_nothing_is_lost_and_nothing_is_told_to_those_who_do_not_own_it(inner: Method):
    """sum_t n estimate_t + sum_i e_i = sum_t sum_i x_i, in half the bytes of the all-reduce."""
    size, numel = 4, 4 * 700
    method = to_owners(ErrorFeedback(inner))
    assert method == ErrorFeedback(ToOwners(inner.compressor))
    world = World(method, size, owned_layout("u", numel, size))
    came, sent = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(5):
        xs = [slab(world.layout, 100 * step + rank) for rank in range(size)]
        sent += size * torch.cat([outcome.estimate for outcome in world.talk(xs)]).double()
        came += torch.stack(xs).double().sum(0)
    owed = sum(state["residual"].data.double() for state in world.states)
    assert all(state["residual"].data.numel() == numel for state in world.states)
    assert torch.allclose(sent + owed, came, rtol=0, atol=1e-4)
    scatter = lift(inner.compressor, "all_reduce" if inner.compressor.summable else "scatter")
    assert abs(2 * world.sent_bytes[0] / 5 - scatter.payload_bytes(world.layout, size)) <= 200


def test_the_whole_is_agreed_on_where_a_method_needs_it():
    size, numel = 3, 3 * 40
    layout = owned_layout("u", numel, size)
    whole = World(distcomp.cyclic_topk(0.2).usual, size, layout)
    pieces = World(OwnPiece(distcomp.cyclic_topk(0.2).usual), size, layout)
    xs = [slab(layout, rank) for rank in range(size)]
    expected = whole.talk(xs)[0].estimate
    found = torch.cat([outcome.estimate for outcome in pieces.talk(xs)])
    assert np.array_equal(expected.numpy(), found.numpy())


CHANGING = {
    "warm-up": distcomp.warmup("qsgd:bits=4", 2),
    "schedule": distcomp.qsgd(bits="8 -> 4 @ 2"),
}


@pytest.mark.parametrize("method", CHANGING.values(), ids=CHANGING)
def test_warm_up_and_schedules_change_what_is_sent_to_the_owners(method: Method):
    layout = owned_layout("u", 4096, 2)
    world = World(to_owners(method), 2, layout)
    sent = [0]
    for step in range(4):
        outcomes = world.talk([slab(layout, 10 * step + rank) for rank in range(2)])
        assert [outcome.estimate.numel() for outcome in outcomes] == [2048, 2048]
        sent.append(world.sent_bytes[0])
    early, late = sent[2] - sent[1], sent[4] - sent[3]
    assert early > 1.8 * late


REFUSED = {
    "powersgd": distcomp.powersgd(),
    "gradiveq": distcomp.gradiveq(),
    "allocate": distcomp.allocate(),
    "inside error feedback": ErrorFeedback(distcomp.powersgd()),
    "inside a warm-up": distcomp.warmup(),
    "in a schedule": distcomp.powersgd(min_compression="2 -> 4 @ 9"),
    "by name": Choose(Rule(names=("*.bias",)), lift(Identity()), lift(Quantize(4))),
    "by size": Choose(Rule(below_numel=100), lift(Identity()), lift(Quantize(4))),
}


@pytest.mark.parametrize("method", REFUSED.values(), ids=REFUSED)
def test_what_needs_names_or_shapes_is_refused(method: Method):
    with pytest.raises(distcomp.DistcompError, match="without names, padded and interleaved"):
        to_owners(method)
