"""EF21 against its lines in NumPy, and what sets it apart from error feedback."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp.compressors import Cast, Quantize, RandomK, TopK
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import EF21, AllGatherMean, Method, ef21, parse, topk
from tests.buffers import draw
from tests.lockstep import converse

NET = Layout.of([("w", (12, 10)), ("v", (7, 3))])


def top(v: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(v), kind="stable")[:k]
    out = np.zeros_like(v)
    out[kept] = v[kept]
    return out


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_it_is_the_papers_algorithm(eta: float) -> None:
    method, size, layout = EF21(TopK(0.1), "all_gather", eta), 3, NET.select(lambda s: s.name == "w")
    states = [method.init(layout)] * size
    v, g = np.zeros((size, 120)), np.zeros((size, 120))
    for step in range(6):
        xs = draw(size, layout, seed=step)
        round_ = converse(method, xs, states, layout, step)
        states = round_.states
        v = (1 - eta) * v + eta * np.stack([x.double().numpy() for x in xs])
        g = g + np.stack([top(one, 12) for one in v - g])
        np.testing.assert_allclose(round_.estimate.numpy(), g.mean(0), atol=1e-5)
        for found, own in zip(round_.contributions(), g, strict=True):
            np.testing.assert_allclose(found.numpy(), own, atol=1e-5)


SMALL = Layout.of([("w", (6, 4))])


def descend(method: Method, steps: int, noise: float = 0.0, rate: float = 0.1) -> float:
    """Constant steps towards three workers' different targets: how far from their mean the last ones are."""
    targets, w = torch.stack(draw(3, SMALL)), torch.zeros(SMALL.numel)
    states = [method.init(SMALL)] * 3
    generator = torch.Generator().manual_seed(0)
    tail = []
    for step in range(steps):
        xs = [w - target + noise * torch.randn(SMALL.numel, generator=generator) for target in targets]
        round_ = converse(method, xs, states, SMALL, step)
        states, w = round_.states, w - rate * round_.estimate
        tail.append(float((w - targets.mean(0)).norm()))
    return sum(tail[-30:]) / 30


def test_without_noise_it_converges_at_a_constant_rate_where_top_k_alone_stalls() -> None:
    assert descend(EF21(TopK(0.25)), 150) < 1e-3
    assert descend(topk(0.25, error_feedback=False), 150) > 0.1


def test_momentum_is_what_it_needs_against_noise() -> None:
    noisy = EF21(TopK(0.1)), EF21(TopK(0.1), eta=0.1)
    without, with_momentum = (descend(method, 150, noise=3.0) for method in noisy)
    assert with_momentum < 0.8 * without


def test_what_is_unbiased_but_does_not_contract_is_damped() -> None:
    """Undamped, rounding to one level of a block's norm feeds on itself."""
    coarse = Quantize(2, 512, norm="l2")
    assert coarse.omega(24) > 4
    assert EF21(coarse)._damping(24) == 1 / (1 + coarse.omega(24))
    assert EF21(TopK(0.1))._damping(24) == 1.0
    assert EF21(RandomK(0.25))._damping(24) == pytest.approx(0.25)
    assert descend(EF21(coarse), 150, rate=0.05) < 0.5


def test_two_bits_are_damped_by_what_they_do_and_not_by_a_loose_bound() -> None:
    """Three workers with targets of their own. Damped by a bound of 128, it is 0.65 away after 100 steps."""
    layout = Layout.of([("w", (32, 32))])
    targets, w = torch.stack(draw(3, layout)), torch.zeros(layout.numel)
    method = EF21(Quantize(2))
    states = [method.init(layout)] * 3
    for step in range(100):
        round_ = converse(method, [w - target for target in targets], states, layout, step)
        states, w = round_.states, w - 0.1 * round_.estimate
    mean = targets.mean(0)
    assert float((w - mean).norm() / mean.norm()) < 0.05


def test_its_text_says_all_of_it() -> None:
    method = parse("ef21:compressor=(quantize:bits=1,block=64),pattern=all_gather,eta=0.5")
    assert method == ef21(Quantize(1, 64), "all_gather", 0.5)
    assert method.usual == EF21(Quantize(1, 64), "all_gather", 0.5)


def test_what_it_cannot_do_is_refused() -> None:
    class Nothing(Cast):
        def delta(self, numel: int) -> None:  # type: ignore[override]
            return None

    for refused in (
        lambda: EF21(TopK(0.1), eta=0.0),
        lambda: EF21(TopK(0.1), eta=1.5),
        lambda: EF21(Nothing("bf16")),
        lambda: EF21(TopK(0.1), "all_reduce"),
        lambda: ef21("Nonsense"),
        lambda: ef21("topk:bits=3"),
        lambda: ef21("Compressor"),
        lambda: ef21(AllGatherMean(TopK(0.1))),  # type: ignore[arg-type]
    ):
        with pytest.raises(DistcompError):
            refused()
