"""Dion: orthonormal steps of low rank, against NumPy and against what Muon computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import dion
from distcomp.methods.base import State, StepContext
from distcomp.methods.dion import Dion, _enlivened
from distcomp.randomness import Key
from tests.lockstep import SEED, converse

LAYOUT = Layout.of([("wide", (6, 10)), ("tall", (9, 4)), ("vector", (5,))])


def gradients(size: int, step: int, layout: Layout = LAYOUT) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(layout.numel, generator=generator) for _ in range(size)]


def run(
    method: Dion, size: int, steps: int, constant: bool = False
) -> tuple[list[torch.Tensor], list[State]]:
    """The estimates of each step, and every rank's state after the last."""
    states, estimates = [method.init(LAYOUT) for _ in range(size)], []
    for step in range(steps):
        round_ = converse(method, gradients(size, 0 if constant else step), states, LAYOUT, step=step)
        states = round_.states
        estimates.append(round_.estimate)
    return estimates, states


def oracle(xs: list[np.ndarray], B: list[np.ndarray], Q: np.ndarray, mu: float) -> tuple:
    """One step of one matrix: the direction, every worker's momentum, and Q, as the paper lists it."""
    a, b = xs[0].shape
    B = [m + g for m, g in zip(B, xs, strict=True)]
    P, _ = np.linalg.qr(np.mean([each @ Q for each in B], axis=0))
    R_own = [each.T @ P for each in B]
    R = np.mean(R_own, axis=0)
    M = [each - (1 - mu) * P @ r.T for each, r in zip(B, R_own, strict=True)]
    Q = R / np.linalg.norm(R, axis=0)
    return np.sqrt(a / b) * P @ Q.T, M, Q


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_it_is_what_the_paper_says(size: int, rank: int) -> None:
    method = Dion(rank, mu=0.9)
    found, states = run(method, size, 5)
    for name, (a, b) in (("wide", (6, 10)), ("tall", (9, 4))):
        r = min(rank, a, b)
        first = StepContext(0, size, LAYOUT, 0, Key.of(SEED, 0))
        M = [np.zeros((a, b)) for _ in range(size)]
        at = {p.name: slice(o, o + p.numel) for p, o in zip(LAYOUT.slices, LAYOUT.offsets, strict=True)}[name]
        for step in range(5):
            if step == 0:
                Q = drawn(method, name, first)[:, :r].double().numpy()
            xs = [x[at].view(a, b).double().numpy() for x in gradients(size, step)]
            direction, M, Q = oracle(xs, M, Q, 0.9)
            np.testing.assert_allclose(found[step][at].view(a, b).numpy(), direction, atol=2e-4)
        for state, momentum in zip(states, M, strict=True):
            np.testing.assert_allclose(state["momentum"].data[at].view(a, b).numpy(), momentum, atol=2e-4)


def drawn(method: Dion, name: str, context: StepContext) -> torch.Tensor:
    """The start that all ranks draw."""
    return _enlivened(method.init(LAYOUT)["q"][name], name, context)


@pytest.mark.parametrize("size", [1, 3])
def test_at_full_rank_the_momentum_is_heavy_ball(size: int) -> None:
    mu, expected = 0.8, torch.zeros(LAYOUT.numel)
    _, states = run(Dion(99, mu), size, 6)
    for step in range(6):
        expected = mu * (expected + torch.stack(gradients(size, step)).mean(0))
    found = torch.stack([state["momentum"].data for state in states]).mean(0)
    matrices = LAYOUT.numel - 5
    torch.testing.assert_close(found[:matrices], expected[:matrices], atol=1e-4, rtol=1e-4)


def test_at_full_rank_it_goes_to_muons_orthonormal_step() -> None:
    """The same gradient again and again: power iteration ends in the polar factor ``U V^T``."""
    estimates, _ = run(Dion(99, mu=0.5), 4, 400, constant=True)
    mean = torch.stack(gradients(4, 0)).mean(0)
    for param, piece in LAYOUT.pieces(estimates[-1]):
        if len(param.shape) < 2:
            continue
        gradient = {p.name: g for p, g in LAYOUT.pieces(mean)}[param.name].view(param.shape)
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        scale = (param.shape[0] / param.shape[1]) ** 0.5
        torch.testing.assert_close(piece.view(param.shape), scale * (u @ vh), atol=5e-3, rtol=0)


def test_the_step_has_singular_values_of_one_and_the_rank_asked_for() -> None:
    estimates, _ = run(Dion(2), 2, 200, constant=True)
    for param, piece in LAYOUT.pieces(estimates[-1]):
        if len(param.shape) == 2:
            values = torch.linalg.svdvals(piece.view(param.shape)) / (param.shape[0] / param.shape[1]) ** 0.5
            torch.testing.assert_close(values[:2], torch.ones(2), atol=0.1, rtol=0)
            assert float(values[2:].abs().max()) < 1e-5


def test_what_is_no_matrix_is_the_plain_mean() -> None:
    estimates, states = run(Dion(2), 3, 2)
    torch.testing.assert_close(estimates[1][-5:], torch.stack(gradients(3, 1)).mean(0)[-5:])
    assert not states[0]["momentum"].data[-5:].any()


def test_an_optimizer_with_momentum_and_odd_settings_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(DistcompError, match="applied twice"):
        dion().check(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    dion().check(torch.optim.SGD([weight], lr=0.1))
    for wrong in ({"rank": 0}, {"mu": 1.0}):
        with pytest.raises(DistcompError, match="rank of 1 or more"):
            dion(**wrong)  # type: ignore[arg-type]
