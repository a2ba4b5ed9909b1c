"""Reduce-scatter: each rank is told its own piece of the mean, and the law of contributions holds for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distcomp
from distcomp.collectives import AllReduce, Rounds
from distcomp.compressors import Cast, Compressor, Identity, Quantize, ScaledSign, TopK
from distcomp.layout import Layout
from distcomp.methods import (
    AggregateResult,
    ErrorFeedback,
    Method,
    Partition,
    Rule,
    StepContext,
    from_compressor,
)
from distcomp.methods.base import SHAPES, State, all_reduce_bytes
from distcomp.methods.reduce_scatter import OwnShard, ShardMean, owned_layout, to_shards
from tests.buffers import buffer
from tests.lockstep import World

COMPRESSORS: dict[str, Compressor] = {
    "identity": Identity(),
    "bf16": Cast("bf16"),
    "4 bits": Quantize(4),
    "1 bit": Quantize(1),
    "sign": ScaledSign(),
    "top-k": TopK(0.1),
}
PATTERNED = [
    from_compressor(Quantize(4), "all_gather"),
    from_compressor(Quantize(4), "reduce_scatter"),
    from_compressor(Quantize(4)),
    from_compressor(Identity()),
]


def pieces_of(world: World, size: int, numel: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: the pieces laid end to end, and the sum of the contributions (float64)."""
    results = world.aggregate([buffer(world.layout, 10 * seed + rank) for rank in range(size)])
    given_ = torch.stack([result.contribution().double() for result in results]).sum(0)
    return torch.cat([result.estimate for result in results]), given_


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@settings(max_examples=12)
@given(size=st.integers(1, 4), piece=st.sampled_from([0, 1, 511, 512, 700]), seed=st.integers(0, 99))
def test_pieces_times_n_are_the_sum_of_the_contributions(compressor, size, piece, seed):
    world = World(ShardMean(compressor), size, owned_layout("u", size * piece, size))
    estimate, given_ = pieces_of(world, size, size * piece, seed)
    assert estimate.numel() == size * piece
    assert torch.allclose(size * estimate.double(), given_, rtol=0, atol=1e-5)
    assert world.sent_bytes == [world.method.payload_bytes(world.layout, size, 0)] * size


@pytest.mark.parametrize("inner", PATTERNED, ids=str)
def test_nothing_is_lost_and_nothing_is_told_to_those_who_do_not_own_it(inner: Method):
    """sum_t n estimate_t + sum_i e_i = sum_t sum_i x_i, in half the bytes of the all-reduce."""
    size, numel = 4, 4 * 700
    method = to_shards(ErrorFeedback(inner))
    assert method == ErrorFeedback(ShardMean(inner.compressor))
    world = World(method, size, owned_layout("u", numel, size))
    came, sent = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(5):
        xs = [buffer(world.layout, 100 * step + rank) for rank in range(size)]
        sent += size * torch.cat([result.estimate for result in world.aggregate(xs)]).double()
        came += torch.stack(xs).double().sum(0)
    residual = sum(state["residual"].data.double() for state in world.states)
    assert all(state["residual"].data.numel() == numel for state in world.states)
    assert torch.allclose(sent + residual, came, rtol=0, atol=1e-4)
    scatter = from_compressor(
        inner.compressor, "all_reduce" if inner.compressor.summable else "reduce_scatter"
    )
    assert abs(2 * world.sent_bytes[0] / 5 - scatter.payload_bytes(world.layout, size, 0)) <= 200


def test_the_whole_is_agreed_on_where_a_method_needs_it():
    size, numel = 3, 3 * 40
    layout = owned_layout("u", numel, size)
    whole = World(distcomp.methods.cyclic_topk(0.2).usual, size, layout)
    pieces = World(OwnShard(distcomp.methods.cyclic_topk(0.2).usual), size, layout)
    xs = [buffer(layout, rank) for rank in range(size)]
    expected = whole.aggregate(xs)[0].estimate
    found = torch.cat([result.estimate for result in pieces.aggregate(xs)])
    assert np.array_equal(expected.numpy(), found.numpy())


CHANGING = {
    "warm-up": distcomp.warmup("qsgd:bits=4", 2),
    "schedule": distcomp.qsgd(bits="8 -> 4 @ 2"),
}


@pytest.mark.parametrize("method", CHANGING.values(), ids=CHANGING)
def test_warm_up_and_schedules_change_what_is_sent_to_the_owners(method: Method):
    layout = owned_layout("u", 4096, 2)
    world = World(to_shards(method), 2, layout)
    sent = [0]
    for step in range(4):
        results = world.aggregate([buffer(layout, 10 * step + rank) for rank in range(2)])
        assert [result.estimate.numel() for result in results] == [2048, 2048]
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
    "by name": Partition(Rule(names=("*.bias",)), from_compressor(Identity()), from_compressor(Quantize(4))),
    "by size": Partition(Rule(below_numel=100), from_compressor(Identity()), from_compressor(Quantize(4))),
}


@pytest.mark.parametrize("method", REFUSED.values(), ids=REFUSED)
def test_what_needs_names_or_shapes_is_refused(method: Method):
    with pytest.raises(distcomp.DistcompError, match="without names, padded and interleaved"):
        to_shards(method)


@dataclass(frozen=True)
class Newcomer(Method):
    """A method of somebody's own, in a file of its own: half of the mean."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        total = yield AllReduce(x * (0.5 / context.size))
        return AggregateResult(total, lambda: 0.5 * x, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return all_reduce_bytes(4 * layout.numel, size)


class Demanding(Newcomer):
    """Another, that looks at the matrices."""

    needs = frozenset({SHAPES})


def test_a_newcomers_method_is_served_or_refused_by_what_it_says_it_needs() -> None:
    served = to_shards(ErrorFeedback(Newcomer()))
    assert served == ErrorFeedback(OwnShard(Newcomer()))
    for method in (Demanding(), ErrorFeedback(Demanding()), Partition(Rule(), Newcomer(), Demanding())):
        with pytest.raises(distcomp.DistcompError, match="Demanding needs whole parameters in their shapes"):
            to_shards(method)
