"""Momentum before compression."""

from __future__ import annotations

import pytest
import torch

from distcomp.compressors import TopK
from distcomp.errors import DistcompError
from distcomp.methods import (
    AllGatherMean,
    ErrorFeedback,
    Method,
    MomentumCorrection,
    identity,
    momentum_correction,
    parse,
)
from tests.buffers import ORDINARY, draw
from tests.lockstep import converse


def estimates(method: Method, steps: int) -> list[torch.Tensor]:
    states, found = [method.init(ORDINARY)] * 3, []
    for step in range(steps):
        round_ = converse(method, draw(3, seed=step), states, step=step)
        states = round_.states
        found.append(round_.estimate)
    return found


@pytest.mark.parametrize("nesterov", [False, True])
def test_around_an_exact_method_it_is_the_optimizers_momentum(nesterov: bool) -> None:
    w = torch.nn.Parameter(torch.zeros(ORDINARY.numel))
    sgd = torch.optim.SGD([w], lr=1.0, momentum=0.9, nesterov=nesterov)
    ours = torch.zeros(ORDINARY.numel)
    for step, estimate in enumerate(estimates(MomentumCorrection(identity(), 0.9, nesterov), 6)):
        w.grad = torch.stack(draw(3, seed=step)).mean(0)
        sgd.step()
        ours -= estimate
        torch.testing.assert_close(ours, w.detach(), atol=1e-4, rtol=1e-4)


def test_masking_changes_what_is_sent() -> None:
    inner = ErrorFeedback(AllGatherMean(TopK(0.05)))
    masked = estimates(MomentumCorrection(inner, 0.9, masking=True), 8)
    unmasked = estimates(MomentumCorrection(inner, 0.9), 8)
    assert not torch.allclose(masked[-1], unmasked[-1])


def test_biases_and_norms_keep_their_momentum() -> None:
    found = estimates(momentum_correction("topk:ratio=0.01"), 5)
    dense = estimates(MomentumCorrection(identity()), 5)
    bias = slice(40 * 37, 40 * 37 + 37)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one[bias], other[bias])


def test_momentum_is_not_applied_twice() -> None:
    w = [torch.nn.Parameter(torch.zeros(3))]
    momentum_correction().check(torch.optim.SGD(w, lr=0.1))
    momentum_correction().check(None)
    with pytest.raises(DistcompError, match="twice"):
        momentum_correction().check(torch.optim.SGD(w, lr=0.1, momentum=0.9))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(DistcompError, match="momentum"):
        momentum_correction(momentum=1.0)
    assert parse("momentum_correction:inner=(topk:ratio=0.1),masking=false") == momentum_correction(
        "topk:ratio=0.1", masking=False
    )
