"""PULSELoCo: what a bfloat16 weight would see is sent, and the rest is owed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.averaging.outer import Outer
from distcomp.averaging.pulseloco import COUNT, PulseLoCo, pulseloco, sparse_bytes
from distcomp.averaging.recipes import diloco
from distcomp.averaging.workers import Workers
from distcomp.errors import DistcompError
from distcomp.payload import wire_bytes
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, stacked

NUMEL = 40
PLAIN = PulseLoCo(outer=Outer(), period=1)


@given(st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=1))
def test_the_oracle_rounds_as_bfloat16_does(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    np.testing.assert_array_equal(oracles.bfloat16(x.double().numpy()), x.bfloat16().double().numpy())


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize("rate", [0.1, 0.002])
def test_it_is_what_the_paper_says(workers: int, rate: float) -> None:
    problem = Quadratic(workers, NUMEL)
    curvature, optima = problem.curvature.double().numpy(), problem.optima.double().numpy()

    def step(x: Matrix) -> Matrix:
        return rate * curvature * (x - optima)

    start = torch.randn(NUMEL, generator=torch.Generator().manual_seed(2))
    found = Workers(pulseloco(period=2), start, workers)
    for _ in range(20):
        problem.descend(found, rate)
        found.step()
    expected, sent = oracles.pulseloco(
        np.repeat(start.double().numpy()[None], workers, axis=0), step, 2, 20, 0.7, 0.9
    )
    np.testing.assert_allclose(stacked(found).numpy(), expected, atol=1e-4)
    counted = [f[0].averaging.report(f[0].state)["values_sent"] for f in found.fragments]
    np.testing.assert_allclose(counted, sent, atol=2)  # a value at the edge of a half


def test_from_zero_weights_everything_is_seen_and_it_is_diloco() -> None:
    problem = Quadratic(4, NUMEL)
    pulse, plain = (problem.train(each, 6) for each in (pulseloco(period=6), diloco(period=6)))
    torch.testing.assert_close(pulse.stacked, plain.stacked)
    assert pulse.fragments[0][0].state["sent"]["x"] == NUMEL


def test_what_no_weight_sees_is_owed_until_it_is_seen() -> None:
    """Weights of 1 and steps of 1/1024: a bfloat16 near 1 has steps of 1/128 below and sees from 1/512 on."""
    workers = Workers(PLAIN, torch.ones(NUMEL), 3)
    sent = []
    for _ in range(9):
        workers.stacked -= 1 / 1024
        workers.step()
        sent.append(int(workers.fragments[0][0].state["sent"]["x"]) // NUMEL)
    assert sent[0] == 0
    assert 1 <= sent[-1] < 9
    owed = workers.fragments[0][0].state["residual"].data
    torch.testing.assert_close(workers.models[0] - owed, torch.full((NUMEL,), 1 - 9 / 1024))


def test_nothing_is_lost_on_workers_of_different_minds() -> None:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(200, generator=generator)
    workers, learnt = Workers(PLAIN, start, 4), torch.zeros(4, 200)
    for _ in range(12):
        progress = 1e-3 * torch.randn(4, 200, generator=generator)
        learnt += progress
        workers.stacked += progress
        workers.step()
        assert all(torch.equal(model, workers.models[0]) for model in workers.models)
    owed = torch.stack([fragments[0].state["residual"].data for fragments in workers.fragments]).mean(0)
    torch.testing.assert_close(workers.models[0] - owed, start + learnt.mean(0), atol=1e-5, rtol=0)


@given(st.floats(1e-6, 1.0), st.integers(2, 5))
def test_bytes_are_those_of_what_is_seen(scale: float, size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    workers = Workers(PLAIN, torch.randn(300, generator=generator), size)
    workers.stacked += scale * torch.randn(size, 300, generator=generator)
    workers.step()
    for fragments, ledger in zip(workers.fragments, workers.net.ledgers, strict=True):
        count = int(fragments[0].state["sent"]["x"])
        assert ledger.total_bytes == (size - 1) * (wire_bytes(COUNT) + sparse_bytes(count, 300))
        most = PLAIN.conditions(workers.layout, size)["bytes_per_exchange_at_most"]
        assert ledger.total_bytes <= most


def test_a_dead_worker_stops_it() -> None:
    with pytest.raises(DistcompError, match="stops when one dies"):
        PulseLoCo(on_failure="continue")
