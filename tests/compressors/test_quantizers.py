"""Every compressor against the papers, and the bounds that they declare."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors import (
    Chain,
    Compressor,
    DctTopK,
    Natural,
    NonUniform,
    OneBit,
    Quantize,
    RandomK,
    ScaledSign,
    TopK,
)
from distcomp.errors import DistcompError
from distcomp.randomness import Key
from tests.buffers import KINDS, buffer, kinds, layout_of, layouts, seeds
from tests.compressors import oracles

COMPRESSORS: list[Compressor] = [
    Natural(),
    NonUniform(4, 512, "l2"),
    NonUniform(3, 7, "max"),
    NonUniform(8, 64, "max"),
    NonUniform(2, 512, "max"),
    ScaledSign(),
    OneBit(),
    TopK(0.01),
    TopK(0.1, chunk=64),
    TopK(0.6, chunk=100),
    TopK(1.0),
    RandomK(0.1),
    RandomK(0.1, scaled=False),
    Chain(TopK(0.1), Quantize(8, rounding="nearest")),
    Chain(TopK(0.2), Quantize(2, rounding="nearest")),
    Chain(TopK(0.1, chunk=50), Quantize(1)),
    Chain(RandomK(0.3), Quantize(8)),
    DctTopK(4, 8),
]
every = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
UNBIASED = [compressor for compressor in COMPRESSORS if compressor.unbiased]
CONTRACTIVE = [compressor for compressor in COMPRESSORS if compressor.delta(512) is not None]


def recoded(compressor: Compressor, x: torch.Tensor, layout, key: Key) -> torch.Tensor:
    return compressor.decode(compressor.encode(x, layout, key), layout)


@every
@settings(max_examples=15)
@given(layouts, seeds, kinds)
def test_a_payload_weighs_what_the_layout_says_and_decodes_to_finite_numbers(
    compressor, layout, seed, kind
) -> None:
    x = buffer(layout, seed, kind)
    before = x.clone()
    payload = compressor.encode(x, layout, Key.of(seed))
    assert payload.wire.numel() == compressor.wire_bytes(layout)
    assert payload.parts == compressor.parts(layout)
    decoded = compressor.decode(payload, layout)
    assert decoded.shape == x.shape
    assert decoded.isfinite().all()
    assert torch.equal(x, before)
    out = torch.full_like(x, 2.0) if kind != "wide" else torch.zeros_like(x)
    expected = out + decoded
    compressor.decode_into(out, payload, layout, add=True)
    assert torch.equal(out, expected)


@every
@settings(max_examples=8)
@given(layouts)
def test_zeros_decode_to_zeros_and_a_nan_breaks_nothing(compressor, layout) -> None:
    assert not recoded(compressor, torch.zeros(layout.numel), layout, Key.of(0)).any()
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.full((layout.numel,), value)
        assert recoded(compressor, x, layout, Key.of(0)).shape == x.shape


@pytest.mark.parametrize("compressor", UNBIASED, ids=repr)
@pytest.mark.parametrize("kind", ["normal", "sparse", "ties"])
def test_unbiased_compressors_are_right_in_the_mean_within_their_declared_variance(compressor, kind) -> None:
    """The mean of T draws errs by a T-th of the variance; declared omegas bound the variance."""
    layout, draws = layout_of((300,)), 200
    x = buffer(layout, 5, kind)
    decoded = torch.stack([recoded(compressor, x, layout, Key.of(draw)) for draw in range(draws)]).double()
    energy = float(x.double().square().sum())
    variance = float((decoded - x).square().sum(1).mean())
    omega = compressor.omega(300)
    assert omega is not None
    assert variance <= omega * energy * 1.1
    missed = float((decoded.mean(0) - x).square().sum())
    assert missed <= 4 * variance / draws + 1e-12 * energy


@pytest.mark.parametrize("compressor", CONTRACTIVE, ids=repr)
@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("shape", [(1,), (37,), (40, 37), (512,)])
def test_what_is_called_a_contraction_is_one(compressor, kind, shape) -> None:
    layout = layout_of(shape)
    delta = compressor.delta(layout.numel)
    if delta is None:
        return
    assert 0 < delta <= 1
    x = buffer(layout, 11, kind)
    draws = 60 if compressor.unbiased or isinstance(compressor, RandomK) else 1
    errors = [
        float((recoded(compressor, x, layout, Key.of(i)) - x).double().square().sum()) for i in range(draws)
    ]
    energy = float(x.double().square().sum())
    slack = 1.3 if draws > 1 and delta < 1 else 1.0 + 1e-6
    assert np.mean(errors) <= (1 - delta) * energy * slack + 1e-9 * energy


def test_the_worst_case_of_a_sign_is_what_it_declares() -> None:
    """One value among zeros: all but 1/d of its energy is lost, and not more."""
    layout = layout_of((100,))
    x = torch.zeros(100)
    x[3] = 5.0
    lost = float((recoded(ScaledSign(), x, layout, Key.of(0)) - x).square().sum()) / 25
    assert lost == pytest.approx(1 - ScaledSign().delta(100), rel=1e-5)


@given(seeds, kinds)
def test_natural_compression_follows_the_paper(seed, kind) -> None:
    layout = layout_of((40, 7), (), (33,))
    x, key = buffer(layout, seed, kind), Key.of(seed)
    expected = oracles.natural(x.numpy(), oracles.noise(layout, key))
    found = recoded(Natural(), x, layout, key).double().numpy()
    # Noise has 23 bits here: where it falls on the edge to within 2^-23, either neighbour is right.
    wrong = found != expected
    assert wrong.mean() < 0.01 if len(wrong) > 100 else not wrong.sum() > 1
    assert np.all(np.abs(np.log2(np.abs(found[found != 0]))) % 1 == 0)


@pytest.mark.parametrize("value", [2.0**-130, 1e-40, 3e-45, 1.5 * 2.0**-126, 1.7e38, 2.0**126 * 1.3])
def test_natural_compression_is_right_in_the_mean_at_both_ends_of_the_range(value) -> None:
    layout = layout_of((20000,))
    x = torch.full((20000,), value)
    u = recoded(Natural(), x, layout, Key.of(1)).double().numpy()
    high = max(2.0**-126, 2.0 ** np.ceil(np.log2(value)))
    spread = high * 20000**-0.5
    assert abs(u.mean() - float(x[0])) <= 3 * spread


def test_natural_compression_does_not_round_to_an_infinity() -> None:
    x = torch.tensor([3.4e38, -3.4e38, 2.0**127])
    assert recoded(Natural(), x, layout_of((3,)), Key.of(0)).tolist() == [2.0**127, -(2.0**127), 2.0**127]


@given(seeds, kinds, st.sampled_from([2, 3, 4, 6]), st.sampled_from(["max", "l2"]), st.sampled_from([5, 64]))
def test_non_uniform_levels_follow_the_paper(seed, kind, bits, norm, block) -> None:
    layout = layout_of((90,), (1,), (17,))
    x, key = buffer(layout, seed, kind), Key.of(seed)
    u = oracles.noise(layout, key)
    expected, at = [], 0
    for param in layout.slices:
        for start in range(0, param.numel, block):
            part = slice(at + start, at + min(start + block, param.numel))
            largest = np.abs(x.numpy()[part]).max()
            tiny = (
                largest < 2.0**-120 if norm == "max" else np.linalg.norm(x.double().numpy()[part]) < 2.0**-120
            )
            block_values = (
                np.zeros(part.stop - part.start)
                if tiny
                else oracles.nonuniform(x.numpy()[part], u[part], bits, norm)
            )
            expected.append(block_values)
        at += param.numel
    found = recoded(NonUniform(bits, block, norm), x, layout, key).double().numpy()
    close = np.isclose(found, np.concatenate(expected), rtol=1e-5, atol=0)
    assert (~close).sum() <= 1  # an edge of the noise, as above


@given(seeds, kinds)
def test_scaled_sign_and_one_bit_follow_their_papers(seed, kind) -> None:
    shapes = [(12, 5), (), (9,), (4, 3, 2), (0,)]
    layout = layout_of(*shapes)
    x = buffer(layout, seed, kind)
    pieces = [piece.numpy() for _, piece in layout.pieces(x)]
    signs = np.concatenate([oracles.scaled_sign(piece) for piece in pieces])
    np.testing.assert_allclose(recoded(ScaledSign(), x, layout, Key.of(0)), signs, rtol=1e-5, atol=1e-44)
    bits = np.concatenate(
        [
            oracles.one_bit(piece, shape) if piece.size else piece
            for piece, shape in zip(pieces, shapes, strict=True)
        ]
    )
    np.testing.assert_allclose(recoded(OneBit(), x, layout, Key.of(0)), bits, rtol=1e-5, atol=1e-44)


def test_one_bit_finds_the_units_of_a_piece_of_a_parameter() -> None:
    """A piece that begins and ends within a unit takes the means of what it holds of each unit."""
    from distcomp.layout import Layout, ParamSlice

    layout = Layout((ParamSlice("w", (4, 5), 3, 11),))
    x = buffer(layout, 2)
    v = x.double().numpy()
    expected = np.concatenate([oracles.one_bit(v[a:b], (b - a,)) for a, b in ((0, 2), (2, 7), (7, 11))])
    np.testing.assert_allclose(recoded(OneBit(), x, layout, Key.of(0)), expected, rtol=1e-5)
    assert OneBit().parts(layout)[0].numel == 6


def test_sign_of_zero_is_plus_on_both_sides() -> None:
    x = torch.tensor([0.0, -0.0, -2.0])
    decoded = recoded(ScaledSign(), x, layout_of((3,)), Key.of(0))
    assert decoded.tolist() == pytest.approx([2 / 3, 2 / 3, -2 / 3])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NonUniform(9), "2 to 8 bits"),
        (lambda: NonUniform(1), "2 to 8 bits"),
        (lambda: NonUniform(4, 0), "at least one"),
        (lambda: NonUniform(4, 512, "l1"), "max and l2"),
        (lambda: TopK(0), "density"),
        (lambda: TopK(1.1), "density"),
        (lambda: TopK(0.1, chunk=-1), "chunk"),
        (lambda: RandomK(-0.1), "density"),
        (lambda: DctTopK(0), "side"),
    ],
)
def test_bad_settings_are_refused_in_words(make, said) -> None:
    with pytest.raises(DistcompError, match=said):
        make()
