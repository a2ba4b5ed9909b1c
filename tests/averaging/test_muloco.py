"""MuLoCo: few bits with error feedback between outer steps, around Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distcomp.averaging.muloco import muloco
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.workers import Workers
from distcomp.layout import Layout
from tests.averaging import inner_jobs as jobs
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, stacked

NUMEL, RATE = 40, 0.1


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize(("bits", "levels"), [(2, 1), (4, 7)])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_it_is_what_the_paper_says(workers: int, bits: int, levels: int, decay: float) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(x: Matrix) -> Matrix:
        return RATE * curvature * (x - optima)

    averaging = muloco(period=4, bits=bits, decay=decay, pattern="all_gather")
    found = problem.train(averaging, 40, RATE)
    start = np.zeros((workers, NUMEL))
    expected = oracles.muloco(start, step, oracles.nearest(levels), (4, 40), 0.7, 0.9, decay)
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=1e-4)


def test_what_was_not_sent_is_owed() -> None:
    """Ten exchanges of the same progress: at two bits the small values come through all the same."""
    layout = Layout.of([("x", (1, 3))])
    workers = Workers(muloco(period=1, outer_lr=1.0, outer_momentum=0.0), torch.zeros(3), 2, layout)
    for _ in range(10):
        workers.stacked += torch.tensor([1.0, 0.3, -0.1])
        workers.step()
    torch.testing.assert_close(workers.models[0], torch.tensor([10.0, 3.0, -1.0]), atol=1.5, rtol=0)
    assert workers.models[0][1] > 1.5


def test_bytes_are_what_is_declared() -> None:
    layout = Layout.of([("w", (64, 40)), ("bias", (40,))], {"bias": "bias"})
    for size in (2, 4):
        averaging = muloco(period=2)
        assert isinstance(averaging, Periodic)
        workers = Workers(averaging, torch.zeros(layout.numel), size, layout)
        for _ in range(6):
            workers.stacked += torch.randn(size, layout.numel, generator=torch.Generator().manual_seed(1))
            workers.step()
        sent = sum(ledger.total_bytes for ledger in workers.net.ledgers) / size
        assert sent == pytest.approx(3 * averaging.method.payload_bytes(layout, size, 0), abs=6)
        assert torch.equal(workers.models[0], workers.models[-1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_runs_inside_and_replicas_are_equal(cluster: Callable[[int], Any]) -> None:
    (few, many), (same, _) = cluster(2).run(
        jobs.weights_of_each, [muloco(period=3), muloco(period=3, bits=8)], "muon", 6
    )
    assert torch.equal(few, same)
    assert not torch.equal(few, many)
