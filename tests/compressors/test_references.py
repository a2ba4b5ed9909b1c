"""What we compute beside what public implementations do: equal, or different exactly as the docs say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import distcomp
from distcomp.averaging.workers import Workers
from distcomp.compressors import Natural, OneBit, Quantize, ScaledSign, TopK
from distcomp.methods import (
    ErrorFeedback,
    MomentumCorrection,
    PowerSGD,
    TernGrad,
    from_compressor,
    majority_vote,
)
from distcomp.randomness import Key
from tests.buffers import layout_of
from tests.compressors import oracles, references
from tests.lockstep import SEED, World

KEY = Key.of(5, 0)
VECTOR = layout_of((300,))
MATRIX = layout_of((24, 18))


def gaussian(seed: int, numel: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(numel).astype(np.float32)


def ours(compressor, x: np.ndarray, layout=VECTOR) -> np.ndarray:
    values = torch.from_numpy(x)
    return compressor.decode(compressor.encode(values, layout, KEY), layout).double().numpy()


def few_differ(found: np.ndarray, expected: np.ndarray) -> None:
    """But for an element whose draw lies within rounding of its chance."""
    assert (~np.isclose(found, expected, rtol=2e-6, atol=1e-30)).sum() <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_that_of_grace(bits: int) -> None:
    """They round the magnitude and we the value, both up where the draw says so: draws mirrored."""
    x, u = gaussian(bits), oracles.noise(VECTOR, KEY)
    found = ours(Quantize(bits, block=128, norm="l2"), x)
    few_differ(found, references.grace_qsgd(x, np.where(x > 0, 1 - u, u), 2 ** (bits - 1) - 1, 128))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_of_cgx_is_not_symmetric(bits: int) -> None:
    """Over the symmetric range, in one step less, its arithmetic is ours, draw by draw; as it is, it has a
    level more, and none at zero."""
    x, u, s = gaussian(bits), oracles.noise(VECTOR, KEY), 2 ** (bits - 1) - 1
    largest = float(np.abs(x).max())
    found = ours(Quantize(bits, block=300), x)
    few_differ(found, references.cgx_range(x, u, -largest, largest, 2 * s))
    x[:150] = 0
    assert (ours(Quantize(bits, block=300), x)[:150] == 0).all()
    assert (references.cgx_maxmin(x, u, bits)[:150] != 0).all()
    even = np.linspace(-1, 1, 2000, dtype=np.float32)
    theirs = references.cgx_maxmin(even, np.full(2000, 0.5), bits)
    assert len(np.unique(theirs.round(6))) == 2**bits
    nearest = Quantize(bits, block=2000, rounding="nearest")
    assert len(np.unique(ours(nearest, even, layout_of((2000,))))) == 2 * s + 1


def test_an_owner_adds_its_own_part_as_it_is_under_error_feedback_as_cgx_always_does() -> None:
    """Of three ranks' equal tensors, whose chunks lie on levels, nothing is lost either way; of others CGX
    rounds two parts of three, and so do we with a residual."""
    xs = [gaussian(rank) for rank in range(3)]
    us = [np.full(300, 0.5)] * 3
    summed = references.cgx_all_reduce(xs, us, us[0], bits=8)
    exact = np.sum(xs, axis=0)
    assert 0 < np.abs(summed - exact).max() < 0.2
    compressor = Quantize(2, block=100, rounding="nearest")
    plain = from_compressor(compressor, "reduce_scatter")
    given = {}
    for name, method in (("plain", plain), ("owed", ErrorFeedback(plain))):
        results = World(method, 3, VECTOR).aggregate([torch.from_numpy(x) for x in xs])
        given[name] = [result.contribution().numpy() for result in results]
    # Rank 1 owns the middle: what it gave there is its own part and the error of the second stage.
    second = np.mean([ours(compressor, xs[0])[100:200], xs[1][100:200], ours(compressor, xs[2])[100:200]], 0)
    rounded = ours(compressor, np.concatenate([second, second, second]).astype(np.float32))[:100]
    np.testing.assert_allclose(
        given["owed"][1][100:200], xs[1][100:200] + 3 * (rounded - second), rtol=0, atol=1e-5
    )
    assert not np.allclose(given["plain"][1][100:200], given["owed"][1][100:200])


def test_terngrad_on_one_rank_is_that_of_grace() -> None:
    """Theirs has a scale for each rank; with one rank it is the shared one."""
    world = World(TernGrad(2.5), 1, VECTOR, SEED)
    u = oracles.noise(VECTOR, world.shared.fold("rank", 0).fold("round"))
    x = gaussian(3)
    expected = references.grace_terngrad(x, np.where(x > 0, 1 - u, u))
    few_differ(world.mean([torch.from_numpy(x)]), expected)


def test_a_large_mean_is_not_clipped_away_as_grace_does() -> None:
    x = np.full(300, 4.0, np.float32) + 0.01 * gaussian(1)
    assert np.abs(references.grace_terngrad(x, np.zeros(300))).max() < 0.1
    estimate = World(TernGrad(2.5), 1, VECTOR, SEED).mean([torch.from_numpy(x)])
    assert estimate.max() == pytest.approx(4.0, rel=0.01)


def test_natural_is_that_of_grace_where_its_eight_bits_reach() -> None:
    """Ours keeps the whole range in nine bits. Theirs is biased above 2^17, doubles exact powers of two, has
    no zero, and makes of what is negative and below 2^-110 a positive 2^17."""
    x = gaussian(2) * np.float32(2.0) ** np.random.default_rng(0).integers(-100, 14, 300).astype(np.float32)
    u = oracles.noise(VECTOR, KEY)
    few_differ(ours(Natural(), x), references.grace_natural(x, 1 - u))
    odd = np.array([1.5 * 2.0**17, 4.0, 0.0, -1.5 * 2.0**-111])
    np.testing.assert_array_equal(
        references.grace_natural(odd, np.zeros(4)), [2.0**17, 8.0, 2.0**-110, 2.0**17]
    )
    here = ours(Natural(), np.tile(odd, 75).astype(np.float32)).reshape(75, 4)
    assert set(here[:, 0]) == {2.0**17, 2.0**18}
    assert (here[:, 1] == 4).all()
    assert (here[:, 2] == 0).all()
    assert set(here[:, 3]) == {-(2.0**-111), -(2.0**-110)}


def test_one_bit_of_a_vector_and_signs_are_those_of_grace() -> None:
    x = gaussian(4)
    np.testing.assert_allclose(ours(ScaledSign(), x), references.grace_sign(x), rtol=1e-6)
    np.testing.assert_allclose(ours(OneBit(), x), references.grace_onebit(x), rtol=1e-6)
    rows = gaussian(5, 24 * 18)
    each = [references.grace_onebit(row) for row in rows.reshape(24, 18)]
    np.testing.assert_allclose(ours(OneBit(), rows, MATRIX), np.concatenate(each), rtol=1e-6)


def test_the_vote_is_that_of_grace() -> None:
    xs = [gaussian(rank, 24 * 18) for rank in range(4)]
    found = World(majority_vote(magnitude="one"), 4, MATRIX).mean([torch.from_numpy(x) for x in xs])
    np.testing.assert_array_equal(found, references.grace_vote(xs))


def test_the_largest_are_those_of_grace_and_their_number_is_rounded_not_cut() -> None:
    x = gaussian(6)
    np.testing.assert_array_equal(ours(TopK(0.05), x), references.grace_top(x, 0.05))
    assert np.count_nonzero(references.grace_top(x, 0.0099)) == 2  # int(2.97)
    assert np.count_nonzero(ours(TopK(0.0099), x)) == 3


@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_error_feedback_is_the_residual_memory_of_grace(beta: float) -> None:
    world = World(ErrorFeedback(from_compressor(TopK(0.05), "all_gather"), decay=beta), 2, VECTOR)
    memories = [references.GraceResidual(beta) for _ in range(2)]
    for step in range(6):
        xs = [gaussian(10 * step + rank) for rank in range(2)]
        sent = []
        for memory, x in zip(memories, xs, strict=True):
            whole = memory.compensate(x)
            sent.append(references.grace_top(whole, 0.05))
            memory.update(whole, sent[-1])
        found = world.aggregate([torch.from_numpy(x) for x in xs])[0].estimate.numpy()
        np.testing.assert_allclose(found, np.mean(sent, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr", [1.0, 0.1])
def test_signs_with_feedback_sum_with_the_rate_inside_in_grace(lr: float) -> None:
    """Theirs is the *sum* over ranks, and its first gradient has no rate in it."""
    world = World(ErrorFeedback(from_compressor(ScaledSign(), "all_gather")), 2, VECTOR)
    memories = [references.GraceSignResidual(lr) for _ in range(2)]
    for step in range(5):
        xs = [gaussian(10 * step + rank) for rank in range(2)]
        sent = []
        for memory, x in zip(memories, xs, strict=True):
            whole = memory.compensate(x if step else lr * x)
            sent.append(references.grace_sign(whole))
            memory.update(whole, sent[-1])
        found = world.aggregate([torch.from_numpy(x) for x in xs])[0].estimate.numpy()
        np.testing.assert_allclose(2 * found, np.sum(sent, axis=0) / lr, rtol=1e-4, atol=1e-5)


def test_momentum_and_masks_of_dgc_are_those_of_grace() -> None:
    inner = ErrorFeedback(from_compressor(TopK(0.05), "all_gather"))
    world = World(MomentumCorrection(inner, 0.9, masking=True), 2, VECTOR)
    memories = [references.GraceDeepGradient(0.9) for _ in range(2)]
    for step in range(6):
        xs = [gaussian(10 * step + rank) for rank in range(2)]
        sent = []
        for memory, x in zip(memories, xs, strict=True):
            sent.append(references.grace_top(memory.compensate(x), 0.05))
            memory.update(sent[-1])
        found = world.aggregate([torch.from_numpy(x) for x in xs])[0].estimate.numpy()
        np.testing.assert_allclose(found, np.mean(sent, axis=0), rtol=1e-5, atol=1e-6)


def test_powersgd_is_that_of_grace_whose_ranks_owe_against_the_mean() -> None:
    world = World(PowerSGD(2, min_compression=0), 3, MATRIX, SEED)
    name = MATRIX.names[0]
    generator = Key.of(SEED, 0).fold("powersgd", name).generator()
    q = torch.randn(2, 18, generator=generator).double().numpy().T
    for step in range(3):
        xs = [gaussian(10 * step + rank, 24 * 18) for rank in range(3)]
        ms = [x.reshape(24, 18).astype(np.float64) for x in xs]
        estimate, q = references.grace_powersgd(ms, q)
        results = world.aggregate([torch.from_numpy(x) for x in xs])
        np.testing.assert_allclose(results[0].estimate.view(24, 18), estimate, rtol=1e-3, atol=1e-4)
        shares = [result.contribution().view(24, 18).numpy() for result in results]
        assert not np.allclose(shares[0], estimate, atol=1e-2)
        np.testing.assert_allclose(np.mean(shares, axis=0), estimate, rtol=1e-3, atol=1e-4)


RING = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]) / 3


@pytest.mark.parametrize(
    ("gossip", "theirs"),
    [
        (distcomp.choco("topk:ratio=0.1", gamma=0.3), references.ChocoFromZero(RING, 300, 0.3, 30)),
        (
            distcomp.averaging.deepsqueeze("topk:ratio=0.1", eta=0.2),
            references.SqueezeFromZero(RING, 300, 0.2, 30),
        ),
    ],
    ids=["choco", "deepsqueeze"],
)
def test_gossip_from_a_common_zero_is_that_of_choco_sgd(gossip, theirs) -> None:
    """Their public copies begin at zero, ours at the common model: the same where that is zero."""
    workers = Workers(gossip, torch.zeros(300), 4)
    models = np.zeros((4, 300))
    for step in range(8):
        pull = np.stack([gaussian(10 * step + rank) for rank in range(4)])
        models = theirs.step(models + pull)
        workers.stacked += torch.from_numpy(pull)
        workers.step()
        np.testing.assert_allclose(workers.stacked, models, rtol=1e-4, atol=1e-5)


def test_choco_sgd_damps_by_the_bound_and_we_by_what_is_measured() -> None:
    from distcomp.compressors.contraction import measured_contraction

    layout = layout_of((1, 300))
    ours_damps = measured_contraction(Quantize(2, block=300, norm="l2"), layout).damping
    x = gaussian(7)
    whole, damped = (references.choco_qsgd(x, np.zeros(300), 1, biased) for biased in (False, True))
    theirs = float(damped.sum() / whole.sum())
    assert theirs == pytest.approx(1 / (1 + np.sqrt(300)))
    assert theirs < ours_damps < 1
