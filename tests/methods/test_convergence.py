"""Every biased method arrives with error feedback and stops short without it.

Worker i pulls towards its own centre; the optimum is the mean of the centres, where no worker's gradient is
zero. A method without memory keeps forgetting the same part of every gradient there.
"""

from __future__ import annotations

import pytest
import torch

from distcomp.compressors import (
    Chain,
    DctTopK,
    Identity,
    Natural,
    NonUniform,
    OneBit,
    Quantize,
    RandomK,
    ScaledSign,
    TopK,
)
from distcomp.methods import (
    CyclicTopK,
    DecoupledMomentum,
    ErrorFeedback,
    HomomorphicQuantizer,
    MajorityVote,
    Method,
    RandomHadamard,
    SharedRandomK,
    TernGrad,
    dgc,
    from_compressor,
)
from tests.buffers import buffer, layout_of
from tests.lockstep import World

EXACT = from_compressor(Identity())


def distance(method: Method, size: int = 3, steps: int = 120, apart: float = 1.0) -> float:
    """What is left of the distance to the optimum. Centres are ``apart``, steps shrink like 1/t."""
    layout = layout_of((8, 8))
    centres = [apart * buffer(layout, rank) for rank in range(size)]
    optimum = torch.stack(centres).mean(0)
    w = optimum + 5 * buffer(layout, 99)
    start = float((w - optimum).norm())
    world = World(method, size, layout)
    for step in range(steps):
        result = world.aggregate([w - centre for centre in centres])[0]
        w = w - result.estimate / (8 + step / 4)
    return float((w - optimum).norm()) / start


BIASED: dict[str, Method] = {
    "scaled sign": from_compressor(ScaledSign()),
    "one bit": from_compressor(OneBit()),
    "top-k": from_compressor(TopK(0.1), "all_gather"),
    "top-k in 8 bits": from_compressor(Chain(TopK(0.1)), "all_gather"),
    "top-k signs, selected again": from_compressor(Chain(TopK(0.1, 8), Quantize(1)), "reduce_scatter"),
    "cyclic top-k": CyclicTopK(TopK(0.1), EXACT),
}


@pytest.mark.parametrize("method", BIASED.values(), ids=BIASED)
def test_error_feedback_is_what_makes_it_arrive(method: Method) -> None:
    residual, forgotten = distance(ErrorFeedback(method)), distance(method)
    assert residual < 0.03
    assert forgotten > 0.1
    assert forgotten > 10 * residual


ARRIVING: dict[str, Method] = {
    "random-k, owed": ErrorFeedback(SharedRandomK(RandomK(0.1, scaled=False), EXACT)),
    "random-k, scaled": SharedRandomK(RandomK(0.1), EXACT),
    "cyclic top-k through a filter": ErrorFeedback(CyclicTopK(TopK(0.1), EXACT), beta=0.5),
    "deep gradient compression": dgc(0.1, 0.5),
    "natural": from_compressor(Natural()),
    "NUQSGD": from_compressor(NonUniform(4, 512, "l2")),
    "TernGrad": TernGrad(),
    "shared range": HomomorphicQuantizer(4),
    "shared range, rotated": RandomHadamard(HomomorphicQuantizer(4, 64), 64),
}


@pytest.mark.parametrize("method", ARRIVING.values(), ids=ARRIVING)
def test_unbiased_methods_and_those_with_a_memory_of_their_own_arrive(method: Method) -> None:
    assert distance(method) < 0.06


def test_a_vote_stops_short_and_error_feedback_does_not_mend_it() -> None:
    """A vote does not weigh a debt: with four ranks, that can tie, what is outvoted stays and grows."""
    assert distance(MajorityVote()) > 0.1
    few, many = (distance(ErrorFeedback(MajorityVote()), size=4, steps=steps) for steps in (100, 300))
    assert few > 0.2
    assert many > 0.9 * few


def test_demo_arrives_where_workers_agree() -> None:
    method = DecoupledMomentum(DctTopK(6, 8), 0.5, sign=False)
    assert distance(method, apart=0.0, steps=240) < 0.15
