"""The quantizer against NumPy: every width, norm and rounding, from the bytes on the wire."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp.compressors import Quantize
from distcomp.layout import Layout
from distcomp.payload import Payload
from distcomp.randomness import Key
from tests.methods.numpy_qsgd import Quantizer, levels, unpack

KEY = Key.of("oracle", 3)
LAYOUT = Layout.of([("w", (23, 50)), ("s", ()), ("e", (0,)), ("b", (511,)), ("c", (2, 7, 3))])

widths = pytest.mark.parametrize("bits", range(1, 9))
norms = pytest.mark.parametrize("norm", ["max", "l2"])
roundings = pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
blocks = pytest.mark.parametrize("block", [512, 64, 7, 1])


def buffer(layout: Layout = LAYOUT, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)) * 0.03


def read(payload: Payload, layout: Layout, bits: int, block: int):
    """(segment, scales, signed integers) of each parameter, by walking over the bytes."""
    body = payload.wire.numpy().tobytes()[32:]
    count = sum(-(-param.numel // block) for param in layout.slices)
    scales = np.frombuffer(body[: 4 * count], "<f4")
    at, number = 4 * count, 0
    for param in layout.slices:
        integers = []
        first = number
        for start in range(0, param.numel, block):
            m = min(block, param.numel - start)
            nbytes = sum(-(-m * width // 8) for width in (8, 4, 2, 1) if bits & width)
            codes = unpack(body[at : at + nbytes], m, bits)
            integers.append(2 * codes - 1 if bits == 1 else codes - levels(bits))
            at, number = at + nbytes, number + 1
        yield param, scales[first:number], np.concatenate([np.zeros(0, np.int64), *integers])
    assert body[at:] == body[at : at + 7][: len(body) - at], "more than padding is left"


@blocks
@roundings
@norms
@widths
def test_the_bytes_hold_what_the_equations_say(bits: int, norm: str, rounding: str, block: int) -> None:
    c = Quantize(bits, block, norm, rounding)
    oracle = Quantizer(bits, block, norm, rounding == "stochastic")
    x = buffer()
    payload = c.encode(x, LAYOUT, KEY)
    decoded = c.decode(payload, LAYOUT).numpy()
    at = 0
    for param, scales, integers in read(payload, LAYOUT, bits, block):
        v = x[at : at + param.numel].numpy()
        key = KEY.fold(param.name).bits
        wanted, _ = oracle.encode(v, key, 0)
        np.testing.assert_allclose(scales, wanted, rtol=1e-6 if norm == "l2" and bits > 1 else 0)
        _, expected = oracle.encode(v, key, 0, scales)
        np.testing.assert_array_equal(integers, expected)
        np.testing.assert_array_equal(decoded[at : at + param.numel], oracle.decode(scales, integers))
        at += param.numel


@norms
@widths
def test_a_value_goes_to_one_of_the_two_levels_around_it(bits: int, norm: str) -> None:
    """C(v)_k = |v|/s sign(v_k) xi_k with xi_k in {l, l+1} and l = floor(s |v_k| / |v|)."""
    layout = Layout.of([("w", (400,))])
    x = buffer(layout)
    decoded = (
        Quantize(bits, 400, norm).decode(Quantize(bits, 400, norm).encode(x, layout, KEY), layout).double()
    )
    v = x.double()
    if bits == 1:
        assert torch.allclose(decoded, torch.sign(v) * v.abs().mean(), rtol=1e-6)
        return
    size, s = (v.abs().max() if norm == "max" else v.norm()), levels(bits)
    xi = decoded.abs() * s / size
    low = torch.floor(s * v.abs() / size)
    assert torch.allclose(xi, xi.round(), atol=1e-3)
    assert bool(((xi.round() == low) | (xi.round() == low + 1)).all())
    assert bool(((decoded == 0) | (torch.sign(decoded) == torch.sign(v))).all())


@norms
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_to_nearest_errs_by_half_a_level_at_most(bits: int, norm: str) -> None:
    layout = Layout.of([("w", (400,))])
    x, c = buffer(layout), Quantize(bits, 400, norm, "nearest")
    size = x.abs().max() if norm == "max" else x.norm()
    error = (c.decode(c.encode(x, layout, KEY), layout) - x).abs().max()
    assert float(error) <= float(size) / levels(bits) / 2 * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_upper_level_is_taken_as_often_as_the_mean_demands(bits: int) -> None:
    """P(l + 1) = s |v_k| / |v| - l: 2000 equal values of 0.3 levels above a level."""
    s = levels(bits)
    v = (max(0, s - 2) + 0.3) / s
    x = torch.full((2001,), v)
    x[-1] = 1.0
    layout = Layout.of([("w", (2001,))])
    c = Quantize(bits, 2001)
    upper = (c.decode(c.encode(x, layout, KEY), layout)[:-1] > v).double().mean()
    assert abs(float(upper) - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


@widths
def test_the_width_on_the_wire_is_the_width_asked_for(bits: int) -> None:
    layout = Layout.of([("w", (10, 512))])
    assert Quantize(bits).wire_bytes(layout) == 32 + 10 * 4 + 10 * 512 * bits // 8


def test_parameters_and_ranks_and_steps_do_not_share_noise() -> None:
    layout = Layout.of([("a", (1000,)), ("b", (1000,))])
    c, x = Quantize(2, 1000), torch.linspace(-1, 1, 1000).repeat(2)
    drawn = [
        c.decode(c.encode(x, layout, Key.of(0, step).fold("rank", rank)), layout)
        for step, rank in [(0, 0), (0, 1), (1, 0)]
    ]
    errors = torch.stack([d - x for d in drawn]).view(6, 1000)
    correlation = torch.corrcoef(errors)
    assert float((correlation - torch.eye(6)).abs().max()) < 5 / 1000**0.5


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 9)
)
def test_any_values_decode_as_the_oracle_says(values: list[float], bits: int, block: int) -> None:
    layout = Layout.of([("w", (len(values),))])
    x, c = torch.tensor(values), Quantize(bits, block)
    found = c.decode(c.encode(x, layout, KEY), layout).numpy()
    np.testing.assert_array_equal(found, Quantizer(bits, block).through(x.numpy(), KEY, "w"))
