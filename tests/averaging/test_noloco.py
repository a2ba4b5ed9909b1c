"""NoLoCo: pairs instead of an all-reduce, and a momentum that pulls slow weights together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.averaging.noloco import NoLoCo, noloco
from distcomp.averaging.outer import Outer
from distcomp.averaging.pairs import partners
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.workers import Workers
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.randomness import Key
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, consensus, stacked

NUMEL, RATE = 40, 0.1


def met(step: int, size: int) -> tuple[int, ...]:
    """Who meets whom after a step of workers with seed 0."""
    return partners(Key.of(0, step).fold("averaging", "0.0"), size)


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_pairs_are_mutual_and_nobody_is_left_out_but_one(bits: int, size: int) -> None:
    drawn = partners(Key.of(bits), size)
    assert all(drawn[drawn[rank]] == rank for rank in range(size))
    assert sum(drawn[rank] == rank for rank in range(size)) == size % 2


def test_everybody_meets_everybody_equally_often() -> None:
    seen = Counter(pair for step in range(2100) for pair in enumerate(met(step, 8)))
    assert len(seen) == 8 * 7
    assert min(seen.values()) > 230
    assert max(seen.values()) < 370


@pytest.mark.parametrize("workers", [4, 5, 8])
@pytest.mark.parametrize("gamma", [0.7, 0.9])
def test_it_is_what_the_paper_says(workers: int, gamma: float) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(x: Matrix) -> Matrix:
        return RATE * curvature * (x - optima)

    found = problem.train(NoLoCo(gamma=gamma, period=3), 30, RATE)
    start = np.zeros((workers, NUMEL))
    expected = oracles.noloco(start, step, lambda t: met(t, workers), (3, 30), 0.5, 0.7, gamma)
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=2e-5)


def test_one_worker_is_its_optimizer_with_outer_momentum() -> None:
    problem = Quadratic(1, NUMEL)
    alone = problem.train(noloco(period=4), 40)
    outer = problem.train(Periodic(outer=Outer(0.7, 0.5), period=4), 40)
    torch.testing.assert_close(alone.models[0], outer.models[0])


def test_the_mean_of_all_moves_as_with_an_all_reduce() -> None:
    """What differs between workers is pulled together and adds nothing to their mean, whatever gamma is."""
    starts = torch.randn(6, 200, generator=torch.Generator().manual_seed(3))
    for gamma in (0.7, 1.1):
        workers = consensus(noloco(period=1, gamma=gamma, outer_momentum=0.3), starts, 30)
        anchor = Workers(Periodic(outer=Outer(0.7, 0.3), period=1), torch.zeros(200), 6)
        anchor.stacked += starts
        for _ in range(30):
            anchor.step()
        torch.testing.assert_close(workers.mean, anchor.mean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("workers", [4, 7, 8])
def test_replicas_contract(workers: int) -> None:
    """What workers differ by after their first step of their own is forgotten."""
    starts = torch.randn(workers, 200, generator=torch.Generator().manual_seed(3))
    apart = float((starts - starts.mean(0)).square().mean())
    assert consensus(noloco(period=1), starts, 60).spread < 1e-6 * apart


def test_without_the_term_they_never_meet() -> None:
    starts = torch.randn(8, 200, generator=torch.Generator().manual_seed(3))
    apart = float((starts - starts.mean(0)).square().mean())
    assert consensus(NoLoCo(gamma=1e-9, period=1), starts, 60).spread > 0.1 * apart


def test_two_models_are_sent_only_where_gamma_is_another_rate() -> None:
    payload_bytes = Identity().wire_bytes(Layout.of([("x", (1, 100))]))
    for gamma, models in ((0.7, 1), (0.8, 2)):
        workers = Workers(noloco(period=2, gamma=gamma), torch.zeros(100), 4)
        for _ in range(6):
            workers.step()
        assert [ledger.total_bytes for ledger in workers.net.ledgers] == [3 * models * payload_bytes] * 4
        assert workers.net.ledgers[0].requests == Counter(NeighborExchange=3 * models)


def test_a_worker_goes_on_without_a_partner_that_is_lost() -> None:
    workers = Workers(noloco(period=1, on_failure="continue"), torch.zeros(50), 4)
    workers.stacked += torch.arange(4.0)[:, None]
    lost = met(1, 4)[0]
    workers.absent = {0: frozenset({lost}), lost: frozenset({0})}
    before = workers.stacked.clone()
    workers.step()
    torch.testing.assert_close(workers.models[0], 0.7 * before[0])  # from 0, by 0.7 of its own progress


def test_settings_that_cannot_work_are_refused_and_those_that_diverge_are_named() -> None:
    with pytest.raises(DistcompError, match=r"momentum in \[0, 1\)"):
        noloco(outer_momentum=1.0)
    layout = Layout.of([("w", (8, 8))])
    assert (
        "apart from gamma = 2 (1 + outer_momentum) = 3 on"
        in NoLoCo(gamma=3.0).conditions(layout, 4)["warning"]
    )
    assert "warning" not in NoLoCo(gamma=3.0).conditions(layout, 1)
    assert NoLoCo().conditions(layout, 8)["rho"] == pytest.approx((6 / 14) ** 0.5)
    starts = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    assert consensus(NoLoCo(gamma=3.1, period=1), starts, 60).spread > 1
