"""PowerSGD against the paper's lines in NumPy, and what holds beyond them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distcomp.collectives import all_reduce_sent_bytes
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.methods import AggregateResult, ErrorFeedback, PowerSGD, StepContext, parse, powersgd
from distcomp.randomness import Key
from distcomp.schedule import Schedule
from tests.buffers import by_name, draw, groups
from tests.lockstep import SEED, Grouping, converse, once

NET = Layout.of([("fc", (24, 18)), ("bias", (18,)), ("conv", (16, 4, 3, 3)), ("tiny", (2, 2))])


def matrices(x: torch.Tensor, layout: Layout = NET) -> dict[str, np.ndarray]:
    return {
        s.name: piece.view(s.shape[0], -1).double().numpy()
        for s, piece in layout.pieces(x)
        if len(s.shape) >= 2
    }


def first_q(name: str, rank: int, columns: int, step: int = 0) -> np.ndarray:
    key = Key.of(SEED, step).fold("powersgd", name)
    return torch.randn(rank, columns, generator=key.generator()).double().numpy().T


def paper(ms: list[np.ndarray], q: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Algorithm 1 of Vogels et al. for one matrix: the estimate, each worker's share, the next Q."""
    p, _ = np.linalg.qr(np.mean([m @ q for m in ms], axis=0))
    qs = [m.T @ p for m in ms]
    q = np.mean(qs, axis=0)
    return p @ q.T, [p @ one.T for one in qs], q


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_papers_algorithm(rank: int) -> None:
    method, size = PowerSGD(rank, min_compression=0), 3
    states = [method.init(NET)] * size
    q = {
        "fc": first_q("fc", rank, 18),
        "conv": first_q("conv", rank, 36),
        "tiny": first_q("tiny", min(rank, 2), 2),
    }
    for step in range(4):
        xs = draw(size, NET, seed=step)
        round_ = converse(method, xs, states, NET, step)
        states = round_.states
        found, shares = matrices(round_.estimate), [matrices(c) for c in round_.contributions()]
        for name in q:
            ms = [matrices(x)[name] for x in xs]
            estimate, contributions, q[name] = paper(ms, q[name])
            np.testing.assert_allclose(found[name], estimate, atol=2e-5 * np.abs(ms).max())
            for share, contribution in zip(shares, contributions, strict=True):
                np.testing.assert_allclose(share[name], contribution, atol=2e-5 * np.abs(ms).max())
        bias = slice(24 * 18, 24 * 18 + 18)
        torch.testing.assert_close(round_.estimate[bias], torch.stack(xs).mean(0)[bias])


def test_one_round_takes_the_halves_in_turn() -> None:
    method, size = PowerSGD(2, min_compression=0, one_round=True), 3
    states, factor = [method.init(NET)] * size, first_q("fc", 2, 18)
    for step in range(5):
        xs = draw(size, NET, seed=step)
        round_ = converse(method, xs, states, NET, step)
        states = round_.states
        assert len(round_.asked) == size  # one request each
        m = np.mean([matrices(x)["fc"] for x in xs], axis=0)
        fixed, _ = np.linalg.qr(factor)
        factor = (m if step % 2 == 0 else m.T) @ fixed
        estimate = factor @ fixed.T if step % 2 == 0 else fixed @ factor.T
        np.testing.assert_allclose(matrices(round_.estimate)["fc"], estimate, atol=1e-4)
        assert method.payload_bytes(NET, size, step) == round_.sent_bytes[0]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_full_rank_is_the_exact_mean(size: int, shapes: list[tuple[int, int]], seed: int) -> None:
    layout = Layout.of([(f"w{i}", shape) for i, shape in enumerate(shapes)])
    xs = draw(size, layout, seed)
    round_ = once(PowerSGD(9, min_compression=0), xs, layout)
    mean = torch.stack(xs).mean(0)
    torch.testing.assert_close(round_.estimate, mean, atol=1e-5, rtol=1e-4)


def test_warm_start_finds_the_leading_subspace_of_a_gradient_that_stays() -> None:
    """A power iteration: on a fixed matrix the error falls to that of the best approximation of its rank."""
    xs = draw(2, NET)
    mean = matrices(torch.stack(xs).mean(0))["fc"]
    best = float(np.sqrt((np.linalg.svd(mean)[1][2:] ** 2).sum()))
    method, errors = PowerSGD(2, min_compression=0), []
    states = [method.init(NET)] * 2
    for step in range(60):
        round_ = converse(method, xs, states, NET, step)
        states = round_.states
        errors.append(float(np.linalg.norm(matrices(round_.estimate)["fc"] - mean)))
    assert errors[0] > 1.05 * best
    assert errors[-1] < 1.005 * best


def test_a_factor_that_died_in_a_zero_gradient_comes_alive_again() -> None:
    method = PowerSGD(2, min_compression=0)
    dead = once(method, [torch.zeros(NET.numel)] * 2, NET)
    assert not dead.states[0]["q"]["fc"].any()
    alive = converse(method, draw(2, NET), dead.states, NET, step=1)
    assert all(piece.any() for piece in by_name(alive.estimate, NET).values())


def test_the_rank_follows_its_schedule_and_so_do_the_bytes() -> None:
    method = parse("powersgd:rank=1 -> 4 @ 2 -> 2 @ 4,min_compression=0,error_feedback=false")
    assert method == PowerSGD(Schedule(((0, 1), (2, 4), (4, 2))), 0)
    states, ranks = [method.init(NET)] * 2, []
    for step in range(6):
        round_ = converse(method, draw(2, NET, seed=step), states, NET, step)
        states = round_.states
        ranks.append(int(np.linalg.matrix_rank(matrices(round_.estimate)["fc"], tol=1e-4)))
        assert round_.sent_bytes[0] == method.payload_bytes(NET, 2, step)
    assert ranks == [1, 1, 4, 4, 2, 2]


def test_two_rounds_however_many_matrices_and_bytes_by_the_formula() -> None:
    method = PowerSGD(2, min_compression=2.0)
    round_ = once(method, draw(4, NET), NET)
    assert [type(request).__name__ for request in round_.asked] == ["AllReduce"] * 8
    # tiny does not pay and goes as it is, with the bias
    sent = all_reduce_sent_bytes(4 * (2 * (24 + 16) + 18 + 4), 4) + all_reduce_sent_bytes(
        4 * 2 * (18 + 36), 4
    )
    assert round_.sent_bytes == [sent] * 4
    assert method.payload_bytes(NET, 4, 0) == sent


def bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, of two equally near to the even one."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def paper_in_bf16(ms: list[np.ndarray], q: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """As :func:`paper`, with factors that are rounded before they are summed, and at each addition."""
    n = len(ms)

    def summed(terms: list[np.ndarray]) -> np.ndarray:
        total = terms[0]
        for term in terms[1:]:
            total = bf16(total + term)
        return total

    p, _ = np.linalg.qr(summed([bf16(m @ q / n) for m in ms]))
    qs = [bf16(m.T @ p / n) for m in ms]
    return p @ summed(qs).T, [n * p @ one.T for one in qs], summed(qs)


@pytest.mark.parametrize("size", [2, 3])
def test_factors_in_bfloat16_are_half_the_bytes_and_what_rounding_took_is_owed(size: int) -> None:
    method, exact = PowerSGD(2, 0, values="bf16"), PowerSGD(2, 0)
    xs, bias = draw(size, NET), slice(24 * 18, 24 * 18 + 18)
    round_, unrounded = once(method, xs, NET), once(exact, xs, NET)
    ms = [matrices(x)["fc"] for x in xs]
    start, _ = np.linalg.qr(first_q("fc", 2, 18))
    estimate, shares, _ = paper_in_bf16(ms, start)
    found = matrices(round_.estimate)["fc"]
    largest = np.abs(estimate).max()
    np.testing.assert_allclose(found, estimate, atol=2e-3 * largest)
    assert np.abs(found - matrices(unrounded.estimate)["fc"]).max() > 1e-4 * largest
    for x, share, contribution in zip(xs, shares, round_.contributions(), strict=True):
        np.testing.assert_allclose(matrices(contribution)["fc"], share, atol=2e-3 * largest)
        rounded = size * bf16(x[bias].numpy() / np.float32(size))
        np.testing.assert_allclose(contribution[bias].numpy(), rounded, rtol=1e-6)
    assert round_.sent_bytes == [unrounded.sent_bytes[0] // 2] * size
    assert method.payload_bytes(NET, size, 0) == round_.sent_bytes[0]


def test_equal_shapes_in_other_buckets_change_no_bit() -> None:
    layout = Layout.of([("a", (37, 41)), ("b", (5,)), ("c", (37, 41)), ("d", (37, 41))])
    for rank in (1, 2, 3):
        whole = Grouping(powersgd(rank), [layout], 2)
        apart = Grouping(powersgd(rank), groups(layout, (3, 1), (2,), (0,)), 2)
        for step in range(3):
            given = [by_name(x, layout) for x in draw(2, layout, step)]
            one, other = whole.aggregate(given), apart.aggregate(given)
            assert all(torch.equal(one[name], other[name]) for name in layout.names)


def test_with_error_feedback_nothing_is_lost_and_without_it_much_is() -> None:
    """On a gradient that stays, the mean of the estimates comes to the gradient; else it cannot."""
    xs = draw(2, NET)
    mean, misses = torch.stack(xs).mean(0), []
    for method in (powersgd(1, 0), powersgd(1, 0, error_feedback=False)):
        states, total = [method.init(NET)] * 2, torch.zeros(NET.numel)
        for step in range(100):
            round_ = converse(method, xs, states, NET, step)
            states, total = round_.states, total + round_.estimate
        misses.append(float((total / 100 - mean).norm() / mean.norm()))
    assert misses[0] < 0.15
    assert misses[1] > 0.6


def test_what_it_cannot_do_is_refused() -> None:
    piece = Layout((ParamSlice("w", (8, 8), 0, 32),))
    for refused in (
        lambda: PowerSGD(0),
        lambda: PowerSGD(2, -1.0),
        lambda: PowerSGD(2, values="fp16"),
        lambda: PowerSGD(2).init(piece),
    ):
        with pytest.raises(DistcompError):
            refused()
    assert isinstance(powersgd(), ErrorFeedback)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("one_round", [False, True])
@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_a_residual_is_added_as_if_before(step: int, one_round: bool, values: str) -> None:
    """Bit for bit, and what it then owes is what its contribution leaves; neither tensor is changed."""
    method = PowerSGD(2, one_round=one_round, values=values)
    x, residual = (torch.randn(NET.numel, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    given = x.clone(), residual.clone()
    context = StepContext(0, 2, NET, step, Key.of(3))
    plainly = with_a_twin(method, x + residual, context)
    added = with_a_twin(method, x, replace(context, error_feedback=True, residual=residual))
    assert added.owed is not None
    assert torch.equal(added.estimate, plainly.estimate)
    assert torch.equal(added.owed, plainly.residual(x + residual))
    assert torch.equal(x, given[0])
    assert torch.equal(residual, given[1])


def with_a_twin(method: PowerSGD, x: Tensor, context: StepContext) -> AggregateResult:
    """The exchange of two ranks that hold the same."""
    rounds = method.aggregate(x, method.init(context.layout), context)
    try:
        request = next(rounds)
        while True:
            request = rounds.send(2 * request.x)
    except StopIteration as stop:
        result: AggregateResult = stop.value
        return result
