"""DES-LOC: weights and moments at periods of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import distcomp
from distcomp.averaging.des_loc import DesLoc, des_loc
from distcomp.averaging.workers import Workers
from distcomp.collectives import all_reduce_sent_bytes
from distcomp.errors import DistcompError
from tests.averaging import inner_jobs as jobs
from tests.averaging import oracles
from tests.averaging.problems import Quadratic, stacked

NUMEL, RATE = 40, 0.05
NEVER = 10**6
Clusters = Callable[[int], Any]


def with_adam(averaging: DesLoc, problem: Quadratic, steps: int) -> Workers:
    """All workers descend by one Adam over all their rows: elementwise, so each row has its own."""
    workers = Workers(averaging, torch.zeros(NUMEL), len(problem.optima))
    weights = workers.stacked
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for _ in range(steps):
        weights.grad = problem.curvature * (weights - problem.optima)
        optimizer.step()
        state = optimizer.state[weights]
        workers.moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        workers.step()
    return workers


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize("periods", [(1, 1, 1), (2, 3, 5), (4, 4, 4), (3, NEVER, NEVER)])
def test_it_is_what_the_paper_says(workers: int, periods: tuple[int, int, int]) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()
    averaging = DesLoc(period=periods[0], first_period=periods[1], second_period=periods[2])
    found = with_adam(averaging, problem, 24)
    expected = oracles.des_loc(
        np.zeros((workers, NUMEL)), lambda x: curvature * (x - optima), periods, 24, RATE
    )
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=2e-5)


def test_each_is_sent_as_often_as_its_period_says() -> None:
    workers = with_adam(DesLoc(period=2, first_period=3, second_period=6), Quadratic(4, NUMEL), 12)
    each = all_reduce_sent_bytes(4 * NUMEL, 4)
    assert [ledger.total_bytes for ledger in workers.net.ledgers] == [(6 + 4 + 2) * each] * 4
    assert des_loc(period=5) == DesLoc(period=5, first_period=15, second_period=30)
    numbers = DesLoc(period=2, first_period=3, second_period=6).conditions(workers.layout, 4)
    assert numbers["bytes_per_step"] == pytest.approx(each)


def test_equal_periods_are_local_adam_and_no_moments_are_local_sgd(cluster: Clusters) -> None:
    specs = [
        des_loc(period=2, first_period=2, second_period=2),
        distcomp.local_sgd(period=2, optimizer_state="average"),
        des_loc(period=2, first_period=NEVER, second_period=NEVER),
        distcomp.local_sgd(period=2),
    ]
    for local_adam, averaged, alone, kept in cluster(2).run(jobs.weights_of_each, specs, "adam", 6):
        assert torch.equal(local_adam, averaged)
        assert torch.equal(alone, kept)
        assert not torch.equal(local_adam, alone)


def test_with_momentum_and_periods_of_one_it_is_ddp(cluster: Clusters) -> None:
    """SGD is linear: averaged weights and momenta are those of averaged gradients."""
    specs = [des_loc(period=1, first_period=1, second_period=1), distcomp.local_sgd(period=1)]
    problem = cluster(2).run(jobs.weights_of_each, specs, "sgd", 8)
    for both, weights_only in problem:
        torch.testing.assert_close(both, weights_only, atol=1e-5, rtol=1e-4)
    assert torch.equal(problem[0][0], problem[1][0])


def test_moments_agree_when_they_are_due(cluster: Clusters) -> None:
    spec = des_loc(period=2, first_period=3, second_period=5)
    for steps, equal in ((3, ("exp_avg",)), (5, ("exp_avg_sq",)), (4, ())):
        one, other = cluster(2).run(jobs.moments_after, spec, steps)
        assert tuple(name for name in one if torch.equal(one[name], other[name])) == equal


def test_it_needs_the_optimizer_and_periods(cluster: Clusters) -> None:
    for sentence in cluster(2).run(jobs.refused_without_optimizer, des_loc()):
        assert "needs the optimizer" in sentence
    with pytest.raises(DistcompError, match="at least 1 step"):
        DesLoc(first_period=0)
