"""AD-PSGD: pairs average in the background, and nothing of a local step is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp.averaging.adpsgd import ADPSGD, ad_psgd
from distcomp.averaging.pairs import partners
from distcomp.averaging.workers import Workers
from distcomp.compressors import Identity
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.randomness import Key
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, consensus, stacked

NUMEL, RATE = 40, 0.1


def mixing(step: int, size: int) -> Matrix:
    """The pairs of the exchange that begins after a step, as a matrix."""
    met = partners(Key.of(0, step).fold("averaging", "0.0"), size)
    matrix = np.zeros((size, size))
    for rank, partner in enumerate(met):
        matrix[rank, rank] += 0.5
        matrix[rank, partner] += 0.5
    return matrix


@pytest.mark.parametrize("workers", [4, 5, 8])
def test_it_is_what_the_paper_says(workers: int) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(x: Matrix) -> Matrix:
        return RATE * curvature * (x - optima)

    found = problem.train(ad_psgd(), 40, RATE)
    expected = oracles.ad_psgd(np.zeros((workers, NUMEL)), lambda t: mixing(t, workers), step, 40)
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(("staleness", "period"), [(1, 1), (2, 3), (4, 4)])
def test_only_local_steps_move_the_sum_and_all_meet(staleness: int, period: int) -> None:
    starts = torch.randn(7, 100, generator=torch.Generator().manual_seed(3))
    workers = consensus(ad_psgd(staleness, period=period), starts, 60 * period)
    torch.testing.assert_close(stacked(workers).sum(0), starts.sum(0), atol=1e-4, rtol=0)
    assert workers.spread < 1e-6


def test_a_step_made_meanwhile_is_kept() -> None:
    workers = Workers(ad_psgd(staleness=2, period=2), torch.zeros(10), 2)
    workers.stacked += torch.tensor([[0.0], [4.0]])
    workers.step()
    workers.step()  # sent: 0 and 4
    workers.stacked += torch.tensor([[1.0], [10.0]])
    workers.step()
    assert torch.equal(stacked(workers)[:, 0], torch.tensor([1.0, 14.0]))
    workers.step()
    assert torch.equal(stacked(workers)[:, 0], torch.tensor([3.0, 12.0]))


def test_one_payload_whatever_the_number_of_workers() -> None:
    payload_bytes = Identity().wire_bytes(Layout.of([("x", (1, NUMEL))]))
    for size in (2, 8):
        workers = Workers(ad_psgd(), torch.zeros(NUMEL), size)
        for _ in range(5):
            workers.step()
        assert [ledger.total_bytes for ledger in workers.net.ledgers] == [5 * payload_bytes] * size


def test_a_staleness_that_cannot_be_is_refused() -> None:
    for staleness, period in ((0, 1), (3, 2)):
        with pytest.raises(DistcompError, match="at most the period"):
            ADPSGD(staleness=staleness, period=period)
    with pytest.raises(DistcompError, match="stops when a partner dies"):
        ADPSGD(on_failure="continue")
