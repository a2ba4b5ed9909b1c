"""With error feedback every biased method learns a task on which it stalls or diverges without: by test loss.

Linear regression, four workers whose inputs have different strengths and whose targets have noise, so that
at the optimum no worker's gradient is zero although their mean is. What is measured is the loss on inputs
that no worker has, above that of the least squares solution of all workers' data, as a part of what it was.

Random-k is not among them: without scaling it only takes shorter steps, which stalls nothing.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from distcomp.compressors import Chain, DctTopK, Identity, OneBit, Quantize, ScaledSign, TopK
from distcomp.layout import Layout
from distcomp.methods import (
    CyclicTopK,
    ErrorFeedback,
    Method,
    PowerSGD,
    from_compressor,
)
from distcomp.methods.allocate import LADDER, Allocate
from distcomp.methods.gradiveq import GradiVeQ
from distcomp.methods.slices import Cycle, Slicing, Subspace
from tests.lockstep import World

OUT, IN, ROWS, WORKERS = 8, 9, 60, 4


@cache
def data() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Every worker's inputs and targets, and a test set."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(IN, OUT, generator=generator)
    xs, ys = [], []
    for worker in range(WORKERS):
        strength = torch.where(torch.arange(IN) % WORKERS == worker, 2.0, 0.4)
        xs.append(torch.randn(ROWS, IN, generator=generator) * strength)
        own = truth + 0.8 * torch.randn(IN, OUT, generator=generator)  # each worker's own truth
        ys.append(xs[-1] @ own + 0.3 * torch.randn(ROWS, OUT, generator=generator))
    test = torch.randn(500, IN, generator=generator)
    return xs, ys, test, truth


def optimum() -> Tensor:
    xs, ys, _, _ = data()
    return torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution


def overhead(w: Tensor) -> float:
    """Test loss above the least squares solution's predictions."""
    _, _, test, _ = data()
    return float(((test @ (w - optimum())) ** 2).mean())


def left(method: Method, steps: int = 200) -> float:
    """What is left of the excess test loss. The gradient of ``[IN, OUT]`` is sent as a convolution's."""
    xs, ys, _, _ = data()
    layout = Layout.of([("w", (OUT, IN, 1, 1))])
    world = World(method, WORKERS, layout)
    w = torch.zeros(IN, OUT)
    start = overhead(w)
    for step in range(steps):
        gradients = [(x.T @ (x @ w - y) / ROWS).T.reshape(-1) for x, y in zip(xs, ys, strict=True)]
        estimate = world.aggregate(gradients)[0].estimate
        w = w - 0.25 / (1 + step / 40) * estimate.view(OUT, IN).T
        if not w.isfinite().all() or overhead(w) > 1e3 * start:
            return float("inf")
    return overhead(w) / start


EXACT = from_compressor(Identity())
BIASED: dict[str, Method] = {
    "nearest of 2 bits": from_compressor(Quantize(2, rounding="nearest")),
    "1 bit": from_compressor(Quantize(1)),
    "scaled sign": from_compressor(ScaledSign()),
    "one bit per column": from_compressor(OneBit()),
    "top-k": from_compressor(TopK(0.05), "all_gather"),
    "top-k in 8 bits": from_compressor(Chain(TopK(0.05)), "all_gather"),
    "DCT top-k": from_compressor(DctTopK(4, 8), "all_gather"),
    "cyclic top-k": CyclicTopK(TopK(0.05), EXACT),
    "PowerSGD": PowerSGD(1, min_compression=0.0),
    "a byte budget": Allocate(1 / 16, LADDER, period=20),
    "GradiVeQ": GradiVeQ(Slicing(aim=72), Subspace(8.0, 0.01, centred=False), Cycle(10, 30, 0)),
}


def test_without_compression_nothing_is_left() -> None:
    assert left(EXACT) < 1e-4


@pytest.mark.parametrize("method", BIASED.values(), ids=BIASED)
def test_error_feedback_separates(method: Method) -> None:
    residual, forgotten = left(ErrorFeedback(method)), left(method)
    assert residual < 2e-3
    assert forgotten > 10 * residual
