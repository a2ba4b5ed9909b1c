"""Eager outer updates: an exchange that lasts a period, and a share of one's own that does not wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp.averaging.eager import Eager, eager_diloco
from distcomp.averaging.outer import Outer
from distcomp.averaging.recipes import diloco
from distcomp.averaging.workers import Workers
from distcomp.collectives import all_reduce_sent_bytes
from distcomp.errors import DistcompError
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, stacked

NUMEL, RATE = 40, 0.1


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize("period", [1, 3])
def test_it_is_what_the_paper_says(workers: int, period: int) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(x: Matrix) -> Matrix:
        return RATE * curvature * (x - optima)

    found = problem.train(eager_diloco(period=period, outer_momentum=0.5), 30, RATE)
    expected = oracles.eager(np.zeros((workers, NUMEL)), step, period, 30, 0.7, 0.5)
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=1e-4)


def test_one_worker_has_nobody_to_wait_for_and_is_diloco() -> None:
    problem = Quadratic(1, NUMEL)
    eager, plain = (problem.train(each, 40) for each in (eager_diloco(period=4), diloco(period=4)))
    torch.testing.assert_close(eager.models[0], plain.models[0])


def test_without_delay_it_is_diloco_bit_for_bit() -> None:
    problem = Quadratic(4, NUMEL)
    assert eager_diloco(period=4, delay=0) == diloco(period=4)
    eager, plain = (problem.train(e, 40) for e in (eager_diloco(period=4, delay=0), diloco(period=4)))
    assert torch.equal(eager.stacked, plain.stacked)


@pytest.mark.parametrize("compressor", ["identity", "qsgd:bits=1", "topk:ratio=0.2"])
def test_what_all_have_learnt_arrives_everywhere_a_period_late(compressor: str) -> None:
    """Once nobody learns any more, all anchors meet, where the workers' progress adds up to (less what error
    feedback still owes)."""
    averaging = eager_diloco(period=2, compressor=compressor, outer_lr=1.0, outer_momentum=0.0)
    workers = Workers(averaging, torch.zeros(60), 4)
    learnt = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    workers.stacked += learnt
    for _ in range(60):
        workers.step()
    coarse = compressor == "qsgd:bits=1"  # what it owes never falls to nothing
    assert workers.spread < (1e-3 if coarse else 1e-10)
    torch.testing.assert_close(workers.mean, learnt.mean(0), atol=0.3 if coarse else 1e-4, rtol=0)


def test_only_ones_own_share_is_used_at_once() -> None:
    workers = Workers(Eager(outer=Outer(), period=2), torch.zeros(10), 4)
    workers.stacked += torch.tensor([[4.0], [8.0], [0.0], [-4.0]])
    workers.step()
    workers.step()
    assert stacked(workers)[:, 0].tolist() == [1.0, 2.0, 0.0, -1.0]
    workers.step()
    assert stacked(workers)[:, 0].tolist() == [1.0, 2.0, 0.0, -1.0]
    workers.step()
    assert stacked(workers)[:, 0].tolist() == [2.0, 2.0, 2.0, 2.0]  # nothing new, and what the others had


def test_the_optimum_is_reached_as_with_diloco_and_for_as_many_bytes() -> None:
    problem = Quadratic(8, NUMEL)
    eager, plain = (
        problem.train(make(period=4, outer_momentum=0.3), 200, 0.05) for make in (eager_diloco, diloco)
    )
    assert problem.error(eager) < 1e-3
    assert eager.net.ledgers[0].total_bytes == plain.net.ledgers[0].total_bytes
    assert eager.net.ledgers[0].total_bytes == 50 * all_reduce_sent_bytes(4 * NUMEL, 8)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong, sentence in (
        (lambda: Eager(period=diloco(period="4 -> 8 @ 9").period), "must not change"),
        (lambda: eager_diloco(delay=2), "0 or 1 outer steps"),
        (lambda: Eager(on_failure="continue"), "stop when one dies"),
    ):
        with pytest.raises(DistcompError, match=sentence):
            wrong()
