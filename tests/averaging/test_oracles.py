"""Every algorithm against NumPy in float64, written from its paper."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from distcomp.averaging.base import Averaging
from distcomp.averaging.extrapolation import ECD
from distcomp.averaging.gossip import DCD, DPSGD, Choco, DeepSqueeze
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.topology import ring
from distcomp.compressors import TopK
from distcomp.methods import from_compressor
from tests.averaging import oracles
from tests.averaging.oracles import Matrix
from tests.averaging.problems import Quadratic, stacked

WORKERS, NUMEL, STEPS, RATE = 5, 40, 40, 0.1
HALF = TopK(0.5)  # without ties a largest half is the same in float32 and float64
W = ring(WORKERS).matrices[0]
PROBLEM = Quadratic(WORKERS, NUMEL)
C = oracles.top(NUMEL // 2)


def step(x: Matrix) -> Matrix:
    return RATE * PROBLEM.curvature.double().numpy() * (x - PROBLEM.optima.double().numpy())


START = np.zeros((WORKERS, NUMEL))


@pytest.mark.parametrize(
    ("averaging", "oracle"),
    [
        (DPSGD(), lambda: oracles.dpsgd(START, W, step, STEPS)),
        (DPSGD(order="adapt_then_combine"), lambda: oracles.dpsgd(START, W, step, STEPS, adapt_first=True)),
        (DCD(HALF), lambda: oracles.dcd(START, W, step, C, STEPS)),
        (ECD(HALF, allow_relative=True), lambda: oracles.ecd(START, W, step, C, STEPS)),
        (Choco(HALF, gamma=0.4), lambda: oracles.choco(START, W, step, C, 0.4, STEPS)),
        (DeepSqueeze(HALF, eta=0.2), lambda: oracles.deepsqueeze(START, W, step, C, 0.2, STEPS)),
        (Periodic(period=4), lambda: oracles.periodic(START, step, lambda z: z, 4, STEPS)),
        (
            Periodic(from_compressor(HALF, "all_gather"), period=4),
            lambda: oracles.periodic(START, step, C, 4, STEPS),
        ),
        (
            Periodic(from_compressor(HALF, "all_gather"), Outer(0.7, 0.9, nesterov=True), period=5),
            lambda: oracles.periodic(START, step, C, 5, STEPS, 0.7, 0.9),
        ),
    ],
    ids=["dpsgd", "dpsgd-atc", "dcd", "ecd", "choco", "deepsqueeze", "local-sgd", "compressed", "diloco"],
)
def test_it_is_what_the_paper_says(averaging: Averaging, oracle: Callable[[], Matrix]) -> None:
    workers = PROBLEM.train(averaging, STEPS, RATE)
    np.testing.assert_allclose(stacked(workers).numpy(), oracle(), atol=2e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_outer_optimizer_is_torch_sgd(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    outer = Outer(0.3, 0.8, nesterov)
    anchor = torch.randn(7, generator=generator)
    reference = torch.nn.Parameter(anchor.clone())
    optimizer = torch.optim.SGD([reference], lr=0.3, momentum=0.8, nesterov=nesterov)
    from distcomp.layout import Layout

    state = outer.init(Layout.of([("x", (7,))]))
    for _ in range(6):
        reference.grad = torch.randn(7, generator=generator)
        anchor, state = outer.step(anchor, reference.grad, state)
        optimizer.step()
    torch.testing.assert_close(anchor, reference.data)
