"""Whole exchanges against NumPy: gather, scatter-reduce, and error feedback over both, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcomp.compressors import Quantize
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, Method, StepContext, from_compressor
from distcomp.methods.base import State
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.lockstep import Lockstep

from .numpy_qsgd import Quantizer, gather, scatter_reduce, with_feedback

PARAMS = [("w", 700), ("b", 30), ("e", 0), ("v", 257), ("s", 1)]
LAYOUT = Layout.of([("w", (7, 100)), ("b", (30,)), ("e", (0, 3)), ("v", (257,)), ("s", ())])
PATTERNS = {"all_gather": gather, "reduce_scatter": scatter_reduce}

patterns = pytest.mark.parametrize("pattern", PATTERNS)
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])
quantizers = pytest.mark.parametrize(
    ("bits", "rounding"),
    [(1, "nearest"), (2, "stochastic"), (4, "stochastic"), (3, "nearest"), (8, "stochastic")],
)


def buffers(size: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * size + step)
    return [torch.randn(LAYOUT.numel, generator=generator) for _ in range(size)]


def converse(method: Method, xs: list[torch.Tensor], states: list[State], shared: Key) -> list[Aggregation]:
    size = len(xs)
    aggregations = [
        Aggregation(method, x, state, StepContext(rank, size, LAYOUT, 0, shared))
        for rank, (x, state) in enumerate(zip(xs, states, strict=True))
    ]
    Lockstep(size).run(aggregations)
    return aggregations


@quantizers
@sizes
@patterns
def test_one_step_equals_numpy_bit_for_bit(pattern: str, size: int, bits: int, rounding: str) -> None:
    method = from_compressor(Quantize(bits, 64, rounding=rounding), pattern)
    oracle = Quantizer(bits, 64, stochastic=rounding == "stochastic")
    xs, shared = buffers(size, 0), Key.of(5, 0)
    aggregations = converse(method, xs, [{}] * size, shared)
    estimate, given = PATTERNS[pattern](oracle, PARAMS, [x.numpy() for x in xs], shared)
    for rank, aggregation in enumerate(aggregations):
        np.testing.assert_array_equal(aggregation.result.estimate.numpy(), estimate)
        np.testing.assert_allclose(
            aggregation.result.contribution().numpy(), given[rank], rtol=1e-5, atol=1e-6
        )


@quantizers
@patterns
def test_error_feedback_over_steps_equals_numpy(pattern: str, bits: int, rounding: str) -> None:
    size, steps = 3, 5
    method = ErrorFeedback(from_compressor(Quantize(bits, 64, rounding=rounding), pattern))
    oracle = Quantizer(bits, 64, stochastic=rounding == "stochastic")
    given = [buffers(size, step) for step in range(steps)]
    keys = [Key.of(5, step) for step in range(steps)]
    wanted, residuals = with_feedback(
        PATTERNS[pattern], oracle, PARAMS, [[x.numpy() for x in xs] for xs in given], keys
    )
    states: list[State] = [method.init(LAYOUT) for _ in range(size)]
    for xs, key, estimate in zip(given, keys, wanted, strict=True):
        aggregations = converse(method, xs, states, key)
        # Not to the bit: what is deducted in two parts may be deducted in either order.
        np.testing.assert_allclose(aggregations[0].result.estimate.numpy(), estimate, rtol=1e-5, atol=1e-6)
        states = [aggregation.result.state for aggregation in aggregations]
    for state, residual in zip(states, residuals, strict=True):
        np.testing.assert_allclose(state["residual"].data.numpy(), residual, rtol=1e-5, atol=1e-5)


@sizes
def test_auto_takes_the_pattern_of_fewer_bytes(size: int) -> None:
    """n-1 payloads against 2 (n-1)/n of one: gathering wins up to two ranks."""
    xs, shared = buffers(size, 0), Key.of(5, 0)
    found = converse(from_compressor(Quantize(4, 64)), xs, [{}] * size, shared)[0].result.estimate
    forced = converse(
        from_compressor(Quantize(4, 64), "all_gather" if size <= 2 else "reduce_scatter"),
        xs,
        [{}] * size,
        shared,
    )
    assert torch.equal(found, forced[0].result.estimate)


def test_float32_and_half_widths_ride_a_sum() -> None:
    """The mean of float32 multiplied by 1/n before it is added; of bfloat16, rounded after each addition."""
    from distcomp.methods import parse

    xs = buffers(3, 0)
    found = converse(parse("identity"), xs, [{}] * 3, Key.of(0))[0].result.estimate.numpy()
    third = np.float32(1 / 3)
    a, b, c = (x.numpy() * third for x in xs)
    np.testing.assert_array_equal(found, (a + b) + c)

    found = converse(parse("bf16"), xs, [{}] * 3, Key.of(0))[0].result.estimate
    half = torch.bfloat16
    a, b, c = ((x * float(third)).to(half) for x in xs)
    np.testing.assert_array_equal(found.numpy(), ((a + b) + c).float().numpy())
