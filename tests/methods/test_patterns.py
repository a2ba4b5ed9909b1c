"""Whole exchanges against NumPy: gather, scatter-reduce, and error feedback over both, step by step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from distcomp.collectives import AllReduce
from distcomp.compressors import Compressor, Quantize
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, Method, from_compressor, parse
from distcomp.methods.base import State, StepContext, map_state
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep
from tests.lockstep import World, converse
from tests.methods.numpy_qsgd import Quantizer, gather, scatter_reduce, with_feedback

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


@quantizers
@sizes
@patterns
def test_one_step_equals_numpy_bit_for_bit(pattern: str, size: int, bits: int, rounding: str) -> None:
    method = from_compressor(Quantize(bits, 64, rounding=rounding), pattern)
    oracle = Quantizer(bits, 64, stochastic=rounding == "stochastic")
    xs, shared = buffers(size, 0), Key.of(5, 0)
    round_ = converse(method, xs, [{}] * size, LAYOUT, shared=shared)
    estimate, given = PATTERNS[pattern](oracle, PARAMS, [x.numpy() for x in xs], shared)
    for rank, result in enumerate(round_.results):
        np.testing.assert_array_equal(result.estimate.numpy(), estimate)
        np.testing.assert_allclose(result.contribution().numpy(), given[rank], rtol=1e-5, atol=1e-6)


@quantizers
@patterns
def test_error_feedback_over_steps_equals_numpy(pattern: str, bits: int, rounding: str) -> None:
    size, steps = 3, 5
    method = ErrorFeedback(from_compressor(Quantize(bits, 64, rounding=rounding), pattern))
    oracle = Quantizer(bits, 64, stochastic=rounding == "stochastic")
    given = [buffers(size, step) for step in range(steps)]
    keys = [Key.of(5, step) for step in range(steps)]
    patterned = gather if pattern == "all_gather" else partial(scatter_reduce, own_exact=True)
    wanted, residuals = with_feedback(
        patterned, oracle, PARAMS, [[x.numpy() for x in xs] for xs in given], keys
    )
    states: list[State] = [method.init(LAYOUT) for _ in range(size)]
    for xs, key, estimate in zip(given, keys, wanted, strict=True):
        round_ = converse(method, xs, states, LAYOUT, shared=key)
        # Not to the bit: what is deducted in two parts may be deducted in either order.
        np.testing.assert_allclose(round_.estimate.numpy(), estimate, rtol=1e-5, atol=1e-6)
        states = round_.states
    for state, residual in zip(states, residuals, strict=True):
        np.testing.assert_allclose(state["residual"].data.numpy(), residual, rtol=1e-5, atol=1e-5)


@sizes
def test_auto_gathers_up_to_two_ranks_and_sends_the_mean_finer_from_three_on(size: int) -> None:
    """n-1 payloads against (n-1)/n of two; 4 bits twice would err four times as much as gathering."""
    xs, shared = buffers(size, 0), Key.of(5, 0)
    found = converse(from_compressor(Quantize(4, 64)), xs, [{}] * size, LAYOUT, shared=shared).estimate
    arrays, oracle = [x.numpy() for x in xs], Quantizer(4, 64)
    if size <= 2:
        wanted, _ = gather(oracle, PARAMS, arrays, shared)
    else:
        wanted, _ = scatter_reduce(oracle, PARAMS, arrays, shared, second=Quantizer(5, 64))
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("text", ["qsgd:bits=2", "qsgd:bits=4", "qsgd:bits=6", "nuqsgd:bits=4", "natural"])
@pytest.mark.parametrize("size", [3, 8, 16])
def test_auto_errs_at_most_twice_as_much_as_gathering_where_ranks_share_a_signal(
    text: str, size: int
) -> None:
    """Or by less than a hundredth of the signal over n; and sends less than gathering does."""
    auto, layout = parse(text), Layout.of([("w", (64, 512))])
    compressor = _compressor_of(auto)
    signal = torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))

    def variance(method: Method) -> float:
        errors = []
        for draw in range(3):
            round_ = converse(method, [signal] * size, [{}] * size, layout, shared=Key.of("auto", draw))
            errors.append((round_.estimate - signal).square().sum() / signal.square().sum())
        return float(torch.stack(errors).mean())

    gathering = from_compressor(compressor, "all_gather")
    assert variance(from_compressor(compressor)) <= max(2.1 * variance(gathering), 0.021 / size)
    assert from_compressor(compressor).payload_bytes(layout, size, 0) < gathering.payload_bytes(
        layout, size, 0
    )


def _compressor_of(method: Method) -> Compressor:
    while not hasattr(method, "compressor"):
        method = method.usual
    return method.compressor


def test_float32_and_half_widths_ride_a_sum() -> None:
    """The mean of float32 multiplied by 1/n before it is added; of bfloat16, rounded after each addition."""
    xs = buffers(3, 0)
    found = converse(parse("identity"), xs, [{}] * 3, LAYOUT).estimate.numpy()
    third = np.float32(1 / 3)
    a, b, c = (x.numpy() * third for x in xs)
    np.testing.assert_array_equal(found, (a + b) + c)

    found = converse(parse("bf16"), xs, [{}] * 3, LAYOUT).estimate
    half = torch.bfloat16
    a, b, c = ((x * float(third)).to(half) for x in xs)
    np.testing.assert_array_equal(found.numpy(), ((a + b) + c).float().numpy())


class Unaware(Method):
    """Keeps from a method that somebody owes for it: the owner's residual then goes through the first
    encoder."""

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    def aggregate(self, x, state, context):
        return (yield from self.inner.aggregate(x, state, replace(context, error_feedback=False)))

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)


@pytest.mark.parametrize("size", [4, 8])
def test_what_the_owner_owes_is_added_just_before_the_second_encoding(size: int) -> None:
    """SGD on a noisy quadratic. One stage's residual through the other stage's encoder costs accuracy."""
    layout = Layout.of([("w", (16, 64))])
    target = torch.randn(layout.numel, generator=torch.Generator().manual_seed(2))

    def away(method: Method) -> float:
        generator, w = torch.Generator().manual_seed(3), torch.zeros(layout.numel)
        world, missed = World(method, size, layout), []
        for _ in range(100):
            xs = [w - target + 0.5 * torch.randn(layout.numel, generator=generator) for _ in range(size)]
            w = w - 0.1 * world.aggregate(xs)[0].estimate
            missed.append(float((w - target).square().mean()))
        return sum(missed[-50:]) / 50

    two_stages = from_compressor(Quantize(2, 64, rounding="nearest"), "reduce_scatter")
    assert away(ErrorFeedback(two_stages)) < 0.8 * away(ErrorFeedback(Unaware(two_stages)))


@pytest.mark.parametrize("text", ["random_k:ratio=0.5", "cyclic_topk:ratio=0.5", "cyclic_topk:beta=0.5"])
@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_what_rounding_the_sum_of_narrow_values_takes_away_is_owed(text: str, values: str) -> None:
    """On the wire of a ring the sum of four bfloat16s loses 2.3e-3 of what came in."""
    method, size = parse(f"{text},values={values}"), 4
    xs = buffers(size, 0)
    round_ = converse(method, xs, [method.init(LAYOUT)] * size, LAYOUT, shared=Key.of(5, 0))
    given = torch.stack(round_.contributions()).double().sum(0)
    missed = (given - size * round_.estimate.double()).norm() / torch.stack(xs).double().norm()
    assert missed < 1e-6


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_caller_needs_no_more_is_summed_where_it_lies(overwrite: bool) -> None:
    """And what it needs is not touched."""
    x = buffers(1, 0)[0]
    before = x.clone()
    context = StepContext(0, 4, LAYOUT, 0, Key.of(1, 0), out=x if overwrite else None)
    request = next(parse("identity").aggregate(x, {}, context))
    assert isinstance(request, AllReduce)
    assert (request.x.data_ptr() == x.data_ptr()) is overwrite
    assert torch.equal(request.x, before * 0.25)
    assert overwrite or torch.equal(x, before)


def twice(
    method: Method, size: int, given: bool
) -> tuple[list[torch.Tensor], list[State], list[torch.Tensor]]:
    """Estimates, states and what is left in the buffers after two steps."""
    states: list[State] = [method.init(LAYOUT)] * size
    net, estimates = Lockstep(size), []
    for step in range(2):
        xs = buffers(size, step)
        contexts = [
            StepContext(rank, size, LAYOUT, step, Key.of(1, step), out=x if given else None)
            for rank, x in enumerate(xs)
        ]
        begun = zip(xs, states, contexts, strict=True)
        results = in_lock_step(net, [Aggregation(method, x, state, context) for x, state, context in begun])
        states = [result.state for result in results]
        estimates += [result.estimate.clone() for result in results]
    return estimates, states, xs


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "text",
    [
        "identity", "qsgd:bits=4", "qsgd:bits=1", "qsgd:bits=4,pattern=all_gather", "powersgd:rank=1",
        "powersgd:rank=1,one_round=True", "powersgd:rank=1,error_feedback=False",
    ],
)  # fmt: skip
def test_an_estimate_in_the_place_of_what_came_in_changes_no_number(text: str, size: int) -> None:
    """Nor what is owed."""
    method = parse(text)
    (plain, owed, kept), (placed, still_owed, left) = (twice(method, size, given) for given in (False, True))
    assert method.may_overwrite
    assert all(torch.equal(one, other) for one, other in zip(plain, placed, strict=True))
    for one, other in zip(owed, still_owed, strict=True):
        assert flat(one) == flat(other)
    assert all(torch.equal(x, before) for x, before in zip(kept, buffers(size, 1), strict=True))
    if text != "identity":  # its place is the transport's affair
        assert torch.equal(left[0], placed[-size])


def flat(state: State) -> list[tuple[str, list[float]]]:
    found: list[tuple[str, list[float]]] = []
    map_state(
        state,
        lambda path, leaf: found.append((path, leaf.data.reshape(-1).tolist())),
        lambda path, leaf: found.extend((f"{path}/{name}", one.tolist()) for name, one in leaf.items()),
    )
    return found


def test_a_method_around_others_is_not_given_what_they_would_overwrite() -> None:
    """They have buffers of another length, or keep what it still needs."""
    for text in ("ef21:compressor=identity", "topk:ratio=0.1", "gradiveq", "warmup:inner=identity,steps=2"):
        assert not parse(text).may_overwrite, text
