"""Methods among workers, step after step, against the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors import DctTopK, Identity, RandomK, TopK
from distcomp.compressors.dct import largest_divisor
from distcomp.errors import DistcompError
from distcomp.kernels.dct import Grid, Grids, transform
from distcomp.methods import (
    Clipped,
    CyclicTopK,
    DecoupledMomentum,
    ErrorFeedback,
    MajorityVote,
    Method,
    SharedRandomK,
    cyclic_topk,
    demo,
    dgc,
    ef_signsgd,
    from_compressor,
    majority_vote,
    natural,
    nuqsgd,
    onebit,
    random_k,
    shared_range,
    terngrad,
    topk,
)
from distcomp.methods.base import cut_state
from tests.buffers import buffer, kinds, layout_of, layouts, seeds
from tests.compressors import oracles
from tests.lockstep import World

EXACT = from_compressor(Identity())
sizes = st.sampled_from([1, 2, 3, 4, 5])


@given(layouts, seeds, kinds, sizes)
def test_the_majority_decides_and_a_tie_is_plus(layout, seed, kind, size) -> None:
    xs = [buffer(layout, seed + rank, kind) for rank in range(size)]
    found = World(MajorityVote("one"), len(xs), layout).mean(xs)
    scaled = World(MajorityVote(), len(xs), layout).mean(xs)
    at = 0
    for param in layout.slices:
        part = slice(at, at + param.numel)
        pieces = [x.numpy()[part] for x in xs]
        alive = any(piece.any() for piece in pieces)
        np.testing.assert_array_equal(found[part], oracles.vote(pieces) * alive)
        mean = np.mean([np.abs(piece.astype(np.float64)).mean() for piece in pieces]) if param.numel else 0
        np.testing.assert_allclose(scaled[part], oracles.vote(pieces) * mean, rtol=1e-5, atol=1e-44)
        at += param.numel


def test_votes_contribute_exactly_what_was_decided() -> None:
    """Counts are integers: with magnitude one contributions sum to n times the outcome to the last bit."""
    layout = layout_of((5000,), (77,))
    results = World(MajorityVote("one"), 4, layout).aggregate([buffer(layout, rank) for rank in range(4)])
    total = torch.stack([result.contribution() for result in results]).sum(0)
    assert torch.equal(total, 4 * results[0].estimate)
    own = torch.where(buffer(layout, 3) >= 0, 1.0, -1.0)
    owned_by_3 = slice(-77, None)
    assert torch.equal(results[3].contribution()[:-77][:1000], own[:1000])
    assert not torch.equal(results[3].contribution()[owned_by_3], own[owned_by_3])


@given(seeds, kinds, sizes)
def test_random_k_is_the_mean_at_the_same_places_on_all_ranks(seed, kind, size) -> None:
    layout = layout_of((40, 9), (), (0,), (13,))
    xs = [buffer(layout, seed + rank, kind) for rank in range(size)]
    for scaled in (True, False):
        select = RandomK(0.1, scaled)
        world = World(SharedRandomK(select, EXACT), size, layout, seed)
        where = select.drawn(layout, world.shared).numpy()
        estimate = world.mean(xs)
        assert len(where) == 36 + 1 + 0 + 1
        factor = np.concatenate([np.full(36, 10.0), [1.0], [13.0]]) if scaled else np.ones(38)
        expected = np.zeros(layout.numel)
        expected[where] = torch.stack(xs).double().mean(0).numpy()[where] * factor
        np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_random_k_is_unbiased_when_scaled() -> None:
    layout, draws = layout_of((200,)), 600
    xs = [buffer(layout, rank) for rank in range(2)]
    world = World(SharedRandomK(RandomK(0.1), EXACT), 2, layout)
    exact = torch.stack(xs).double().mean(0).numpy()
    drawn = np.stack([world.mean(xs) for _ in range(draws)]).astype(np.float64)
    variance = np.square(drawn - exact).sum(1).mean()
    assert variance == pytest.approx(9 * np.square(exact).sum(), rel=0.1)
    assert np.square(drawn.mean(0) - exact).sum() <= 2 * variance / draws


@given(seeds, kinds, sizes)
@settings(max_examples=15)
def test_cyclic_top_k_sends_what_is_largest_on_the_rank_whose_turn_it_is(seed, kind, size) -> None:
    layout = layout_of((40, 9), (0,), (13,))
    world = World(CyclicTopK(TopK(0.1), EXACT), size, layout, seed)
    for step in range(3):
        xs = [buffer(layout, seed + 10 * step + rank, kind) for rank in range(size)]
        estimate = world.mean(xs)
        leader, mean = xs[step % size].numpy(), torch.stack(xs).double().mean(0).numpy()
        expected = np.zeros(layout.numel)
        for start, stop in ((0, 360), (360, 373)):
            places = start + oracles.top(leader[start:stop], oracles.count(stop - start, 0.1))
            expected[places] = mean[places]
        np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@given(seeds, st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=10)
def test_the_low_pass_filter_follows_scalecom(seed, beta) -> None:
    layout, size = layout_of((60,)), 3
    world = World(ErrorFeedback(CyclicTopK(TopK(0.1), EXACT), beta=beta), size, layout, seed)
    e = [np.zeros(60) for _ in range(size)]
    for step in range(5):
        xs = [buffer(layout, seed + 10 * step + rank) for rank in range(size)]
        estimate = world.aggregate(xs)[0].estimate
        corrected = [x.double().numpy() + residual for x, residual in zip(xs, e, strict=True)]
        places = oracles.top(corrected[step % size], 6)
        np.testing.assert_allclose(
            estimate, oracles.kept(np.mean(corrected, 0), places), rtol=1e-4, atol=1e-6
        )
        e = [
            (1 - beta) * residual + beta * (p - oracles.kept(p, places))
            for residual, p in zip(e, corrected, strict=True)
        ]
    for state, residual in zip(world.states, e, strict=True):
        np.testing.assert_allclose(state["residual"].data, residual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_deep_gradient_compression_follows_the_paper(size, nesterov) -> None:
    layout = layout_of((30, 10))
    world = World(dgc(0.05, 0.9, nesterov), size, layout)
    paper = oracles.DeepGradient(size, 300, 0.05, 0.9, nesterov)
    for step in range(12):
        xs = [buffer(layout, 100 * step + rank) for rank in range(size)]
        expected = paper.step([x.double().numpy() for x in xs])
        np.testing.assert_allclose(world.mean(xs), expected, rtol=1e-4, atol=1e-5)
    for state, u, v in zip(world.states, paper.u, paper.v, strict=True):
        kept = {path: leaf["p0"] for path, leaf in by_path(state).items()}
        np.testing.assert_allclose(kept["usual/momentum"], u, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kept["usual/inner/residual"], v, rtol=1e-4, atol=1e-5)


def by_path(state) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, leaves in cut_state(state).items():
        for path, leaf in leaves.items():
            found.setdefault(path, {})[name] = leaf
    return found


@pytest.mark.parametrize("nesterov", [False, True])
def test_biases_beside_it_get_torchs_momentum(nesterov) -> None:
    layout = layout_of((6,))
    world = World(dgc(0.05, 0.9, nesterov), 3, layout)
    weight = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=nesterov)
    for step in range(5):
        xs = [buffer(layout, 10 * step + rank) for rank in range(3)]
        before = weight.detach().clone()
        weight.grad = torch.stack(xs).mean(0)
        optimizer.step()
        np.testing.assert_allclose(world.mean(xs), (before - weight).detach(), rtol=1e-4, atol=1e-5)


def test_clipping_shrinks_a_parameter_to_the_share_of_one_rank() -> None:
    layout = layout_of((50,), (50,), (0,))
    xs = [torch.cat([torch.full((50,), 10.0), torch.full((50,), 1e-3)]) for _ in range(4)]
    estimate = World(Clipped(EXACT, 3.0), len(xs), layout).mean(xs)
    assert np.linalg.norm(estimate[:50]) == pytest.approx(3.0 / 4**0.5, rel=1e-5)
    np.testing.assert_allclose(estimate[50:], 1e-3)
    huge = [torch.full((100,), 1e30) for _ in range(4)]
    clipped = World(Clipped(EXACT, 3.0), len(huge), layout).mean(huge)
    assert np.linalg.norm(clipped[:50]) == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("recipe", [dgc, demo])
def test_an_optimizer_with_momentum_of_its_own_is_refused(recipe) -> None:
    weight = torch.zeros(3, requires_grad=True)
    recipe().check(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(DistcompError, match="momentum=0"):
        recipe().check(torch.optim.SGD([weight], lr=0.1, momentum=0.9))


@pytest.mark.parametrize(
    ("shape", "side", "chunk"),
    [((12, 20), 8, (6, 5)), ((7, 9), 64, (7, 9)), ((30,), 8, (1, 6)), ((4, 3, 2), 3, (2, 3))],
)
@pytest.mark.parametrize("size", [1, 3])
def test_demo_follows_the_paper(shape, side, chunk, size) -> None:
    layout = layout_of(shape)
    matrix = (shape[0], layout.numel // shape[0]) if len(shape) > 1 else (1, shape[0])
    paper = oracles.Demo(size, matrix, chunk, 3, 0.9)
    world = World(DecoupledMomentum(DctTopK(3, side), 0.9, sign=False), size, layout)
    signs = World(DecoupledMomentum(DctTopK(3, side), 0.9), size, layout)
    for step in range(6):
        xs = [buffer(layout, 50 * step + rank) for rank in range(size)]
        expected = paper.step([x.double().numpy().reshape(matrix) for x in xs]).reshape(-1)
        np.testing.assert_allclose(world.mean(xs), expected, rtol=1e-3, atol=1e-4)
        clear = np.abs(expected) > 1e-3
        np.testing.assert_array_equal(signs.mean(xs)[clear], np.sign(expected)[clear])
    for state, d in zip(world.states, paper.d, strict=True):
        np.testing.assert_allclose(state["momentum"].data, d.reshape(-1), rtol=1e-3, atol=1e-4)


def test_the_cosine_transform_is_orthonormal_and_tells_waves_apart() -> None:
    for side in (1, 2, 7, 34, 61, 64, 96):
        # Each row of the identity is a chunk: its coefficients are a column of the matrix.
        chunks = Grids((Grid(0, side, 1, 1, side, 1),))
        matrix = transform(torch.eye(side).view(-1), chunks).view(side, side).T
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(side), atol=1e-5)
        np.testing.assert_allclose(matrix, oracles.dct_matrix(side), atol=1e-6)


@given(st.integers(1, 5000), st.integers(1, 80))
def test_the_largest_divisor(number, limit) -> None:
    divisors = [side for side in range(1, min(number, limit) + 1) if number % side == 0]
    assert largest_divisor(number, limit) == max(divisors)


METHODS: list[Method] = [
    natural(),
    natural(bits=4),
    nuqsgd(),
    terngrad(),
    majority_vote(),
    ef_signsgd(),
    ef_signsgd(block=64),
    onebit(),
    shared_range(),
    shared_range(hadamard=True, block=64),
    topk(0.1),
    topk(0.1, values="int8", chunk=64),
    topk(0.1, pattern="reduce_scatter", chunk=64, values="sign"),
    random_k(0.1),
    random_k(0.1, values="int4", error_feedback=False),
    cyclic_topk(0.1),
    cyclic_topk(0.1, values="int8", chunk=64, beta=0.5),
    dgc(0.1),
    dgc(0.1, clip=1.0, nesterov=True, values="int8"),
    demo(),
    demo(k=3, side=8, sign=False),
]
every = pytest.mark.parametrize("method", METHODS, ids=repr)


@every
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_bytes_counted_are_the_bytes_declared(method, size) -> None:
    """To the byte, but for one of rounding per request where ranks send unequal chunks."""
    layout = layout_of((40, 37), (9,), (8, 3, 3, 3), (0,))
    world = World(method, size, layout)
    world.mean([buffer(layout, rank) for rank in range(size)])
    requests = sum(world.net.ledgers[0].requests.values())
    declared = method.payload_bytes(layout, size, 0)
    assert abs(np.mean(world.sent_bytes) - declared) <= (requests if len(set(world.sent_bytes)) > 1 else 0)


@every
def test_a_nan_on_one_rank_is_a_nan_on_all_and_the_state_before_still_serves(method) -> None:
    layout = layout_of((40, 37), (9,))
    world = World(method, 3, layout)
    world.mean([buffer(layout, rank) for rank in range(3)])
    before = world.states
    xs = [buffer(layout, 10 + rank) for rank in range(3)]
    xs[1][5] = float("nan")
    assert all(result.estimate.isnan().all() for result in world.aggregate(xs))
    assert not any(world.finite)
    world.states = before
    assert np.isfinite(world.mean([buffer(layout, 20 + rank) for rank in range(3)])).all()


def test_what_cannot_be_is_refused_in_words() -> None:
    for make, said in (
        (lambda: majority_vote(magnitude="two"), "mean or one"),
        (lambda: topk(values="int3"), "int8"),
        (lambda: random_k(values="sign"), "summed"),
        (lambda: topk(0.0), "density"),
        (lambda: cyclic_topk(beta=0.0), "beta"),
        (lambda: dgc(momentum=1.0), "momentum"),
        (lambda: dgc(clip=-1.0), "clipped"),
        (lambda: demo(k=0), "chunks of side"),
        (lambda: demo(decay=1.5), "decay"),
        (lambda: natural(bits=10), "2 to 8 bits"),
    ):
        with pytest.raises(DistcompError, match=said):
            make()
