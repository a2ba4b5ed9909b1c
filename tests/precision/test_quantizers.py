"""Every quantizer against its paper: forward, backward, laws, and awkward numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distcomp import precision
from distcomp.compressors import FixedPoint
from distcomp.errors import DistcompError
from distcomp.kernels.reference import round_at_random
from distcomp.precision import binary, entropy, few, ternary
from distcomp.precision.compact import Residual
from distcomp.precision.dorefa import (
    DorefaActivation,
    DorefaWeight,
    QuantizedBack,
    quantize_gradient,
)
from distcomp.precision.noise import Noise, sign, uniform_like
from distcomp.precision.shift import nearest_power_of_two
from distcomp.randomness import Key
from tests.precision import oracles

floats = st.floats(-20, 20, width=32)
uniforms = st.integers(0, 2**24 - 1).map(lambda k: k / 2**24)
formats = st.tuples(st.integers(1, 6), st.integers(1, 16))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dL/dx of L = sum(weight * module(x))."""
    x = x.clone().requires_grad_()
    (module(x) * weight).sum().backward()
    assert x.grad is not None
    return x.grad


# ---------------------------------------------------------------------------- rounding and fixed point


@given(floats, formats, uniforms)
def test_fixed_point_follows_the_paper(x, format, u) -> None:
    one = torch.tensor([x])
    q = FixedPoint(*format)
    assert q.round(one).item() == oracles.fixed(one.item(), *format)
    assert q.round(one, torch.tensor([u])).item() == oracles.fixed(one.item(), *format, u)


@given(st.integers(-(2**22), 2**22), uniforms)
def test_what_lies_on_the_grid_stays_there(k, u) -> None:
    """floor(y + u) in float32 would move large integers."""
    assert round_at_random(torch.tensor([float(k)]), torch.tensor([u])).item() == k


@given(floats, uniforms)
def test_rounding_at_random_takes_a_neighbour(x, u) -> None:
    got = round_at_random(torch.tensor([x]), torch.tensor([u])).item()
    assert got in (math.floor(x), math.ceil(x))


def test_rounding_at_random_is_right_in_the_mean() -> None:
    x, noise, q = drawn(400) * 0.1, Noise(Key.of(1)), FixedPoint(4, 4)
    mean = torch.stack([q.round(x, noise(x)) for _ in range(2000)]).double().mean(0)
    assert (mean - x).abs().max() < 5 * 0.5 * q.spacing / math.sqrt(2000)


def test_a_format_keeps_what_is_no_number() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e-45, -0.0, 1e30])
    got = FixedPoint.of("Q4.12").round(x).tolist()
    assert got[:2] == [math.inf, -math.inf]
    assert math.isnan(got[2])
    assert got[3:] == [0.0, 0.0, 8 - 2.0**-12]


@pytest.mark.parametrize("text", ["4.12", "Q4", "Q1.0", "Q20.20", "Qx.y", ""])
def test_a_format_that_is_none_is_refused(text) -> None:
    with pytest.raises(DistcompError, match=r"fixed-point"):
        FixedPoint.of(text)


def test_random_numbers_differ_by_draw_and_repeat_from_a_saved_count() -> None:
    x, noise = torch.zeros(5000), Noise(Key.of("a"))
    first, second = noise(x), noise(x)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06
    assert abs(first.mean() - 0.5) < 0.02
    again = Noise(Key.of("a"))
    again.load_state_dict({"draws": torch.tensor(1)})
    assert torch.equal(again(x), second)


def test_successive_draws_do_not_overlap() -> None:
    noise, x = Noise(Key.of("b")), torch.zeros(2000)
    values = torch.stack([noise(x) for _ in range(8)]).flatten()
    assert values.unique().numel() > 0.998 * values.numel()


# ------------------------------------------------------------------------------------------ DoReFa-Net


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_dorefa_weights_follow_the_paper(bits) -> None:
    w = drawn(7, 9)
    got = DorefaWeight(bits)(w)
    np.testing.assert_allclose(got, oracles.dorefa_weight(w.double().numpy(), bits), rtol=1e-5, atol=1e-6)


def test_dorefa_weights_pass_the_gradient_of_tanh() -> None:
    """Without the rounding, which is passed straight through, it is a smooth function."""
    w = drawn(4, 5).double().requires_grad_()

    def smooth(w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(w) / torch.tanh(w).abs().max()

    weight = drawn(4, 5, seed=1).double()
    torch.autograd.gradcheck(smooth, w)
    (expected,) = torch.autograd.grad((smooth(w) * weight).sum(), w)
    torch.testing.assert_close(gradient(DorefaWeight(3), w.detach(), weight), expected)


@given(st.floats(-1, 2, width=32), st.integers(1, 8))
def test_dorefa_activations_follow_the_paper(x, bits) -> None:
    one = torch.tensor([x])
    got = DorefaActivation(bits)(one)
    assert got.item() == pytest.approx(oracles.unit(min(max(one.item(), 0), 1), bits), abs=1e-6)
    assert gradient(DorefaActivation(bits), one, torch.ones(1)).item() == (1.0 if 0 <= x <= 1 else 0.0)


@pytest.mark.parametrize("bits", [1, 2, 6])
def test_dorefa_gradients_follow_the_paper(bits) -> None:
    dy = drawn(5, 3, 4)
    dy[2] = 0
    key = torch.tensor(77)
    u = uniform_like(dy, key)
    got = quantize_gradient(dy, bits, u)
    expected = oracles.dorefa_gradient(dy.double().numpy(), bits, u.double().numpy())
    assert (np.abs(got.numpy() - expected) > 1e-5).sum() <= 1  # a tie may fall otherwise in float32
    assert not got[2].any()
    y = drawn(5, 3, 4, seed=9).requires_grad_()
    QuantizedBack.apply(y, bits, key).backward(dy)
    assert torch.equal(y.grad, got)


def test_dorefa_gradients_are_right_in_the_mean_but_at_the_edge() -> None:
    dy, noise = drawn(1, 300), Noise(Key.of(3))
    mean = torch.stack([quantize_gradient(dy, 4, noise(dy)) for _ in range(2000)]).mean(0)
    m = dy.abs().max()
    inside = dy.abs() < m * (1 - 1 / 15)
    assert ((mean - dy)[inside].abs() < 5 * (2 * m / 15) / 2 / math.sqrt(2000)).all()


# ----------------------------------------------------------------------------------------- binary ones


def test_the_sign_of_zero_is_positive_and_nan_stays() -> None:
    assert sign(torch.tensor([0.0, -0.0, 1e-45, -1e-45])).tolist() == [1, 1, 1, -1]
    assert sign(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("h", [1.0, 0.3])
def test_binary_connect_is_a_sign_or_a_fair_coin(h) -> None:
    w = torch.linspace(-1.2 * h, 1.2 * h, 49)
    module = binary.BinaryWeight(h, Noise(Key.of(5)))
    drawn_ones = torch.stack([module(w) for _ in range(3000)])
    assert drawn_ones.abs().sub(h).abs().max() < 1e-6
    chance = ((w / h + 1) / 2).clamp(0, 1)
    assert ((drawn_ones > 0).float().mean(0) - chance).abs().max() < 5 * 0.5 / math.sqrt(3000)
    assert (drawn_ones[:, w <= -h] < 0).all()
    assert (drawn_ones[:, w >= h] > 0).all()
    module.eval()
    assert torch.equal(module(w), w)
    assert torch.equal(binary.BinaryWeight(h, None)(w), h * torch.where(w < 0, -1.0, 1.0))
    assert torch.equal(gradient(binary.BinaryWeight(h, None), w, w), w)


def test_signs_pass_the_gradient_within_one() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 0.3, 1.0, 1.01])
    assert gradient(binary.Sign(), x, torch.full((6,), 2.0)).tolist() == [0, 2, 2, 2, 2, 0]


def test_xnor_weights_have_the_gradient_of_the_paper() -> None:
    w = drawn(3, 4, 2, 2) * 1.2
    g = drawn(3, 4, 2, 2, seed=1)
    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(binary.ScaledBinary()(w), alpha * torch.where(w < 0, -1.0, 1.0))
    expected = g * (1 / 16 + alpha * (w.abs() <= 1))
    torch.testing.assert_close(gradient(binary.ScaledBinary(), w, g), expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_an_xnor_convolution_follows_the_paper(padding) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=padding)
    x, w, b = drawn(2, 3, 5, 6), layer.weight.detach().clone(), layer.bias.detach().clone()
    precision.xnor_net(layer, skip=())
    expected = oracles.xnor_conv(x.double().numpy(), w.double().numpy(), b.double().numpy(), padding)
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_an_xnor_linear_layer_follows_the_paper() -> None:
    layer = nn.Linear(6, 4)
    x, w, b = drawn(5, 6), layer.weight.detach().clone(), layer.bias.detach().clone()
    precision.xnor_net(layer, skip=())
    expected = (torch.sign(x) @ torch.sign(w).T) * w.abs().mean(1) * x.abs().mean(1, keepdim=True) + b
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_residual_expansion_comes_nearer_with_each_sign(count) -> None:
    x = drawn(4, 50)
    residual, total = x.double().numpy(), 0.0
    for _ in range(count):
        term = np.abs(residual).mean(1, keepdims=True) * np.where(residual >= 0, 1.0, -1.0)
        total, residual = total + term, residual - term
    np.testing.assert_allclose(Residual(count)(x), total, rtol=1e-5, atol=1e-6)
    if count > 1:
        assert (x - Residual(count)(x)).norm() < (x - Residual(count - 1)(x)).norm()


# ------------------------------------------------------------------------- ternary, shifts, clustering


def test_trained_ternary_follows_the_paper() -> None:
    w, g = drawn(6, 7), drawn(6, 7, seed=2)
    module = ternary.TrainedTernary(w, 0.3, 1.0)
    module.positive.data.fill_(0.7)
    module.negative.data.fill_(0.4)
    t = 0.3 * w.abs().max()
    above, below = w > t, w < -t
    assert torch.equal(module(w), torch.where(above, 0.7, torch.where(below, -0.4, 0.0)))
    torch.testing.assert_close(
        gradient(module, w, g), g * torch.where(above, 0.7, torch.where(below, 0.4, 1.0))
    )
    torch.testing.assert_close(module.positive.grad, g[above].sum().view(1))
    torch.testing.assert_close(module.negative.grad, -g[below].sum().view(1))


def test_trained_ternary_has_the_gradients_that_finite_differences_have() -> None:
    """Of its two magnitudes, in which it is linear."""
    w, g = drawn(6, 7).double(), drawn(6, 7, seed=2).double()
    t = torch.tensor(0.3).double()

    def weight(p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return (ternary.Ternarize.apply(w, p, n, t) * g).sum()

    torch.autograd.gradcheck(
        weight, (torch.tensor(0.7).double().requires_grad_(), torch.tensor(0.4).double().requires_grad_())
    )


def test_ternary_connect_is_right_in_the_mean() -> None:
    w = torch.linspace(-0.5, 0.5, 41)
    module = few.TernaryWeight(0.5, Noise(Key.of(4)))
    many = torch.stack([module(w) for _ in range(3000)])
    assert set(many.unique().tolist()) == {-0.5, 0.0, 0.5}
    assert (many.mean(0) - w).abs().max() < 5 * 0.25 / math.sqrt(3000)


@given(st.floats(-100, 100, width=32), uniforms)
def test_a_shift_is_a_power_of_two_beside_the_value(x, u) -> None:
    got = few.power_of_two(torch.tensor([x]), torch.tensor([u]), None).item()
    x = torch.tensor(x).item()
    if x == 0 or abs(abs(x) / 2.0 ** math.floor(math.log2(abs(x))) - 1 - (1 - u)) > 1e-6:
        assert got == oracles.power_of_two(x, u)


@pytest.mark.parametrize("exponents", [None, 2, 16])
def test_shifts_are_right_in_the_mean(exponents) -> None:
    x = torch.cat([torch.zeros(3), drawn(200).abs() * torch.logspace(-3, 0, 200)])
    noise = Noise(Key.of(8))
    many = torch.stack([few.power_of_two(x, noise(x), exponents) for _ in range(3000)])
    top = 2 * 2.0 ** math.floor(math.log2(x.max()))
    room = (
        x / 2 if exponents is None else torch.maximum(x, torch.tensor(top * 2.0 ** (1 - exponents)))
    ) + 1e-9
    assert ((many.mean(0) - x).abs() <= 5 * room / math.sqrt(3000)).all()
    values = many.unique()
    assert torch.equal(nearest_power_of_two(values), values)
    if exponents is not None:
        assert values[values > 0].numel() <= exponents


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_few_multiplications_have_gradients_of_shifted_inputs(shape) -> None:
    layer = nn.Linear(6, 4) if shape == "linear" else nn.Conv2d(3, 4, 3, padding=1, stride=2)
    x = (drawn(5, 6) if shape == "linear" else drawn(2, 3, 6, 6)).requires_grad_()
    precision.few_multiplications(layer, skip=(), shift_bits=None)
    key = Noise(Key.of("precision", 0, "", 0).fold("shift")).next_key()
    y = layer(x)
    weight = layer.parametrizations.weight.original
    dy = drawn(*y.shape, seed=3)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    p = few.power_of_two(x.detach(), uniform_like(x, key), None)
    noise = Noise(Key.of("precision", 0, "", 0))
    noise.draws += 1  # torch tries a parametrization once when it is registered
    used = few.TernaryWeight(few.glorot_scale(layer), noise)(weight).detach().requires_grad_()

    def plain(x: torch.Tensor) -> torch.Tensor:
        if shape == "linear":
            return nn.functional.linear(x, used, layer.bias)
        return nn.functional.conv2d(x, used, layer.bias, 2, 1)

    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(dx, torch.autograd.grad(plain(x), x, dy)[0])
    torch.testing.assert_close(dw, torch.autograd.grad(plain(p), used, dy)[0], rtol=1e-4, atol=1e-5)


@given(st.integers(0, 500), st.integers(1, 60), st.sampled_from([2, 4]))
def test_weighted_entropy_boundaries_follow_the_paper(seed, count, clusters) -> None:
    magnitudes = drawn(count, seed=seed).abs().sort().values
    cut = entropy.boundaries(magnitudes, clusters).tolist()
    values = magnitudes.double().numpy()
    assert oracles.entropy(values, cut) == pytest.approx(
        oracles.entropy(values, oracles.park_boundaries(values, clusters)), rel=1e-9
    )


def test_a_clustered_weight_is_the_root_mean_square_of_its_cluster() -> None:
    w = drawn(30, 20)
    q = entropy.clustered(w, 3)
    assert torch.equal(torch.sign(q), torch.sign(w))
    for value in q.unique():
        members = w[q == value]
        assert members.square().mean().sqrt() == pytest.approx(abs(value.item()), rel=1e-5)
        assert q[(w >= members.min()) & (w <= members.max())].unique().numel() == 1
    assert q.unique().numel() <= 8
    assert not entropy.clustered(torch.zeros(4), 3).any()


def test_log_activations_take_the_best_of_what_is_tried() -> None:
    x = drawn(300).relu()
    module = entropy.LogActivation(3, 1)
    y = module(x)
    positive = y[y > 0].log2()
    offset, step = module.chosen.tolist()
    assert torch.allclose((positive - offset) / step, ((positive - offset) / step).round(), atol=1e-5)
    assert not y[x == 0].any()
    best = entropy.weighted_entropy_of(x, entropy.log_levels(x, offset, step, 3), 8)
    for other in ((offset + step, step), (offset - step, step)):
        if (2 ** other[0]) <= x.max() <= 2 ** (other[0] + 6 * step):
            assert entropy.weighted_entropy_of(x, entropy.log_levels(x, *other, 3), 8) <= best + 1e-12


# ------------------------------------------------------------------------------------- awkward numbers

QUANTIZERS = {
    "dorefa1": DorefaWeight(1), "dorefa3": DorefaWeight(3), "activation": DorefaActivation(2),
    "sign": binary.Sign(), "binary": binary.BinaryWeight(1.0, None), "xnor": binary.ScaledBinary(),
    "residual": Residual(2), "cluster": entropy.ClusteredWeight(3, 1), "log": entropy.LogActivation(3, 1),
    "ternary": ternary.TrainedTernary(torch.ones(2, 2), 0.05, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-40, 1e30])
def test_constants_give_finite_numbers_and_gradients(name, value) -> None:
    x = torch.full((4, 5), value)
    assert QUANTIZERS[name](x).isfinite().all()
    assert gradient(QUANTIZERS[name], x, torch.ones(4, 5)).isfinite().all()


@pytest.mark.parametrize("name", ["dorefa1", "dorefa3", "activation", "sign", "binary", "xnor", "residual"])
def test_a_nan_is_not_made_a_number(name) -> None:
    x = torch.ones(4, 5)
    x[1, 2] = math.nan
    assert QUANTIZERS[name](x).isnan().any()


@pytest.mark.parametrize("name", ["activation", "sign", "binary"])
def test_what_is_quantized_already_stays(name) -> None:
    once = QUANTIZERS[name](drawn(6, 7))
    assert torch.equal(QUANTIZERS[name](once), once)
