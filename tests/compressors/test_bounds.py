"""Declared bounds against an adversary: values are searched that a quantizer rounds worst."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distcomp.compressors import NonUniform, Quantize
from distcomp.compressors.base import Compressor
from distcomp.layout import Layout
from distcomp.randomness import Key

BLOCK = 512
DRAWS = 100


def variance_of_levels(x: Tensor, levels: Tensor) -> float:
    """``E|C(x) - x|^2 / |x|^2`` of unbiased rounding to two neighbours among ``levels`` times max|x|, in
    float64."""
    share = x.abs() / x.abs().max()
    above = torch.searchsorted(levels, share).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return float(((share - low) * (high - share)).clamp(min=0).sum() / share.square().sum())


def worst_of(levels: Tensor, block: int) -> tuple[float, Tensor]:
    """One value at the largest magnitude and the others where the ratio is greatest: a grid of values, then
    perturbations that are kept where they make it worse."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(1e-3, float(levels[1]), 4000, dtype=torch.float64)
    tried = [torch.cat([torch.ones(1, dtype=torch.float64), v.expand(block - 1)]) for v in grid]
    worst = max(tried, key=lambda x: variance_of_levels(x, levels))
    found = variance_of_levels(worst, levels)
    for _ in range(300):
        moved = (worst * (1 + 0.05 * torch.randn(block, generator=generator, dtype=torch.float64))).abs()
        ratio = variance_of_levels(moved, levels)
        if ratio > found:
            found, worst = ratio, moved
    return found, worst


def sampled(c: Compressor, x: Tensor) -> float:
    layout = Layout.of([("w", (x.numel(),))])
    keys = [Key.of("adversary", draw) for draw in range(DRAWS)]
    errors = [(c.decode(c.encode(x, layout, key), layout) - x).double().square().sum() for key in keys]
    return float(torch.stack(errors).mean() / x.double().square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_largest_variance_that_can_be_found_for_the_max_norm_is_the_declared_one(bits: int) -> None:
    """Not exceeded, and nearly reached: a bound that is ten times too loose damps EF21 ten times too much."""
    c = Quantize(bits, BLOCK)
    levels = torch.linspace(0, 1, c.levels + 1, dtype=torch.float64)
    found, worst = worst_of(levels, BLOCK)
    omega = c.omega(BLOCK)
    assert omega is not None
    assert found <= omega * (1 + 1e-9)
    assert omega <= 1.02 * found
    assert sampled(c, worst.float()) == pytest.approx(found, rel=0.05)
    assert omega <= math.sqrt(BLOCK) / c.levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_same_for_levels_that_are_powers_of_two(bits: int) -> None:
    c = NonUniform(bits, BLOCK, "max")
    exponents = torch.arange(1 - c.levels, 1, dtype=torch.float64)
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp2(exponents)])
    found, worst = worst_of(levels, BLOCK)
    omega = c.omega(BLOCK)
    assert found <= omega * (1 + 1e-9)
    assert omega <= max(1.02 * found, 1 / 8)
    assert sampled(c, worst.float()) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_to_nearest_contracts_as_declared_and_hardly_better(bits: int) -> None:
    """The worst: one value at the largest magnitude, all others just below half a level."""
    c = Quantize(bits, BLOCK, rounding="nearest")
    x = torch.full((BLOCK,), 0.4999 / c.levels)
    x[0] = 1.0
    delta = c.delta(BLOCK)
    assert delta is not None
    missed = sampled(c, x)
    assert missed <= 1 - delta
    assert 1 - delta <= missed * 1.01
