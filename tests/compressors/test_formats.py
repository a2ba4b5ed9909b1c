"""fp8, MXFP8, MXFP4 and NVFP4: against torch's casts, against torchao, against tables, and what is
declared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.compressors import MXFP4, MXFP8, NVFP4, Compressor, Float8, parse_compressor
from distcomp.compressors.grid import keys_of_signs
from distcomp.errors import DistcompError
from distcomp.kernels.rotation import SIDE, reference_rotate
from distcomp.layout import Layout
from distcomp.payload import Payload
from distcomp.randomness import Key
from tests.kernels import minifloats

KEY = Key.of("formats")
CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
STOCHASTIC = [Float8(), Float8(format="e5m2"), MXFP8(), MXFP8(format="e5m2"), MXFP4(), NVFP4()]
NEAREST = [
    Float8(rounding="nearest"),
    MXFP8(rounding="nearest"),
    MXFP4(rounding="nearest"),
    NVFP4(rounding="nearest"),
]
MILLION = 1 << 20


def flat(numel: int) -> Layout:
    return Layout.of([("w", (numel,))])


def encoded(c: Compressor, x: Tensor, key: Key = KEY) -> Payload:
    return c.encode(x, flat(x.numel()), key)


def through(c: Compressor, x: Tensor, key: Key = KEY) -> Tensor:
    return c.decode(encoded(c, x, key), flat(x.numel()))


def a_million(nan: bool = True) -> Tensor:
    """Ordinary values of all magnitudes, block by block; among them ties, subnormals, zeros and (a few)
    NaN."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(MILLION // 32, 32, generator=generator)
    rows *= torch.exp2(torch.randint(-100, 100, (len(rows), 1), generator=generator).float())
    rows[:1000] = torch.randint(-48, 49, (1000, 32), generator=generator) / 8  # many ties of four bits
    rows[1000:2000] = torch.randint(-480, 481, (1000, 32), generator=generator) / 16
    rows[2000:2100] *= 2.0**-149 / rows[2000:2100].abs().amax(1, keepdim=True)  # rounded to subnormals
    rows[2100:2200] = torch.randn(100, 32, generator=generator) * 1e-40
    rows[2200:2300] = 0.0
    rows[2300:2400, 5] = -0.0
    rows[2400:2500, 7] = 3.4e38
    if nan:
        rows[2500:2600, 9] = float("nan")
    return rows.view(-1)


# ----------------------------------------------------------------------------------------------- others' bits


@pytest.mark.parametrize("format", CASTS)
def test_fp8_without_scales_is_torchs_cast(format: str) -> None:
    x = a_million().clamp(-448, 448)
    codes = encoded(Float8("nearest", format=format, block=0), x)["codes"]
    assert torch.equal(codes & 0x7F, x.to(CASTS[format]).view(torch.uint8) & 0x7F)
    number = ~x.isnan()
    assert torch.equal(codes[number], x.to(CASTS[format]).view(torch.uint8)[number])


@pytest.mark.parametrize("format", CASTS)
def test_fp8_is_torchs_cast_of_values_in_units_of_their_blocks_scale(format: str) -> None:
    x = a_million(nan=False).clamp(-1e30, 1e30)
    x = torch.where(x.view(-1, 128).abs().amax(1, keepdim=True) < 2.0**-100, 1e-3, x.view(-1, 128)).view(-1)
    payload = encoded(Float8("nearest", format=format, block=128), x)
    rows, largest = x.view(-1, 128), torch.finfo(CASTS[format]).max
    scale = rows.abs().amax(1) / largest
    assert torch.equal(payload["scales"], scale)
    wanted = (rows * (1 / scale)[:, None]).clamp(-largest, largest).to(CASTS[format]).view(torch.uint8)
    assert torch.equal(payload["codes"].view(-1, 128), wanted)
    back = wanted.view(CASTS[format]).float() * scale[:, None]
    assert torch.equal(through(Float8("nearest", format=format), x).view(-1, 128), back)


def torchao_to_mx(x: Tensor, elements: torch.dtype, mode: str) -> tuple[Tensor, Tensor]:
    """Scales and codes, as bytes."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    scale, codes = mx.to_mx(x, elements, 32, getattr(config.ScaleCalculationMode, mode))
    return scale.view(torch.uint8), codes.view(torch.uint8)


@pytest.mark.parametrize(
    ("c", "elements"),
    [
        (MXFP8("nearest"), torch.float8_e4m3fn),
        (MXFP8("nearest", format="e5m2"), torch.float8_e5m2),
        (MXFP4("nearest"), torch.float4_e2m1fn_x2),
    ],
    ids=str,
)
def test_a_million_values_have_the_bits_of_torchaos_reference(c: Compressor, elements: torch.dtype) -> None:
    """A scale of 2^-127 it writes, and divides by 2^-126; what it writes so is 2^-126 with us."""
    x = a_million()
    scales, codes = torchao_to_mx(x, elements, "FLOOR")
    payload = encoded(c, x)
    assert torch.equal(payload["scales"], torch.where(scales == 0, 1, scales))
    # NaN of either sign: what else lies in such a block differs in the sign of a zero at most.
    nan = x.view(-1, 32).isnan().any(1)
    ours, theirs = payload["codes"].view(len(nan), -1), codes.view(len(nan), -1)
    assert torch.equal(ours[~nan], theirs[~nan])
    assert 0 < int(nan.sum()) < 200
    decoded = through(c, x).view(-1, 32)
    assert decoded[nan].isnan().all()
    assert decoded[~nan].isfinite().all()


@pytest.mark.parametrize(
    ("c", "elements"),
    [
        (MXFP8(), torch.float8_e4m3fn),
        (MXFP8(format="e5m2"), torch.float8_e5m2),
        (MXFP4(), torch.float4_e2m1fn_x2),
    ],
    ids=str,
)
def test_at_random_scales_are_those_that_clamp_nothing(c: Compressor, elements: torch.dtype) -> None:
    """torchao's mode that rounds up; its logarithm may round a hair above a power of two down."""
    x = a_million(nan=False)
    scales, _ = torchao_to_mx(x, elements, "RCEIL")
    ours = encoded(c, x)["scales"]
    usual = scales > 1
    assert (ours[usual] != scales[usual]).float().mean() < 1e-4
    largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}.get(elements, 6.0)
    reach = torch.exp2(ours.double() - 127) * largest
    maxima = x.view(-1, 32).abs().amax(1).double()
    assert bool((maxima <= reach).all())
    assert bool((maxima[usual] > reach[usual] / 2).all())


def test_nvfp4_has_the_bits_of_torchaos_reference_group_by_group() -> None:
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x, group = a_million(nan=False), 1024
    # Within a group as within a tensor: magnitudes apart, but not by a hundred binades.
    x = (x.view(-1, group) / x.view(-1, group).abs().amax(1, keepdim=True).clamp(min=1e-30)).reshape(-1)
    payload = encoded(NVFP4("nearest", group=group), x)
    for row in range(0, MILLION // group, 7):
        values = x[row * group : (row + 1) * group].view(1, -1)
        outer = values.abs().amax() / 2688.0
        if outer == 0:
            continue
        assert payload["scales"][row] == outer
        scales, codes = nv.nvfp4_quantize(values, 16, outer)
        assert torch.equal(
            payload["block_scales"].view(-1, group // 16)[row], scales.view(torch.uint8).view(-1)
        )
        assert torch.equal(payload["codes"].view(-1, group // 2)[row], codes.view(torch.uint8).view(-1))


# ------------------------------------------------------------------------------------------------- the tables


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    numel=st.sampled_from([1, 31, 32, 33, 100]),
    magnitude=st.sampled_from([1.0, 1e-6, 1e5]),
)
def test_mxfp4_decodes_to_what_the_standard_says(seed: int, numel: int, magnitude: float) -> None:
    """In NumPy, block by block: the scale from the exponent, the nearest of eight magnitudes."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * magnitude
    wanted = []
    for start in range(0, numel, 32):
        block = x[start : start + 32].double().numpy()
        scale = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 2)
        code = minifloats.nearest("e2m1", np.abs(block) / scale)
        wanted.append(np.sign(block) * minifloats.numbers("e2m1")[code] * scale)
    assert np.array_equal(through(MXFP4("nearest"), x).double().numpy(), np.concatenate(wanted))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), numel=st.sampled_from([1, 15, 16, 17, 2000]))
def test_nvfp4_decodes_to_what_its_two_scales_say(seed: int, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    f = np.float32
    wanted = np.zeros(numel, f)
    for start in range(0, numel, 1024):
        group = x[start : start + 1024].numpy()
        outer = f(np.abs(group).max()) / f(448 * 6)
        for at in range(0, len(group), 16):
            block = group[at : at + 16]
            ratio = f(np.abs(block).max()) / f(6) / outer
            code = minifloats.nearest("e4m3", np.array([min(max(float(ratio), 2.0**-6), 448.0)]))
            inner = f(minifloats.numbers("e4m3")[code[0]])
            scaled = np.minimum(np.abs(block) * (f(1) / outer / inner), f(6))
            code = minifloats.nearest("e2m1", scaled.astype(np.float64))
            values = f(minifloats.numbers("e2m1")[code]) * np.sign(block) * (outer * inner)
            wanted[start + at : start + at + len(block)] = values
    assert np.allclose(through(NVFP4("nearest"), x).numpy(), wanted, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("c", STOCHASTIC, ids=str)
def test_rounded_at_random_the_mean_is_the_value_and_the_variance_is_below_what_is_declared(
    c: Compressor, hadamard: bool
) -> None:
    c = type(c)(**{**vars(c), "hadamard": hadamard})
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2048, generator=generator) * torch.exp(2 * torch.randn(2048, generator=generator))
    draws = 300
    errors = torch.stack([through(c, x, KEY.fold(i)) - x for i in range(draws)]).double()
    scatter, missed = float(errors.square().sum(1).mean()), float(errors.mean(0).square().sum())
    # The mean of T draws misses by a T-th of the scatter; three times that would be a bias.
    assert missed < 3 * scatter / draws
    omega = c.omega(2048)
    assert omega is not None
    assert scatter / float(x.double().square().sum()) <= omega


@pytest.mark.parametrize("c", [c for c in STOCHASTIC if not isinstance(c, NVFP4)], ids=str)
def test_the_declared_variance_is_nearly_reached(c: Compressor) -> None:
    """One value at the largest magnitude that leaves the coarsest grid, all others where they err most: a
    bound that is ten times too loose would damp EF21 ten times too much."""
    kind, block = c.kind, c.span  # type: ignore[attr-defined]
    least = kind.largest if isinstance(c, Float8) else kind.largest / 2 * (1 + 1e-6)
    found = 0.0
    for share in torch.linspace(0.02, 0.98, 25):
        x = torch.full((block,), float(share) * kind.smallest)
        x[0] = least
        found = max(found, mean_error(c, x))
    for between in torch.linspace(1, 1 + 2.0**-kind.mantissa, 17)[1:-1]:
        x = torch.full((block,), float(between) * 2.0 ** (kind.largest_exponent - 1))
        x[0] = least
        found = max(found, mean_error(c, x))
    omega = c.omega(block)
    assert found <= omega * 1.02
    assert omega <= 1.35 * found


def mean_error(c: Compressor, x: Tensor) -> float:
    errors = [float((through(c, x, KEY.fold(i)) - x).double().square().sum()) for i in range(20)]
    return sum(errors) / len(errors) / float(x.double().square().sum())


@pytest.mark.parametrize("c", NEAREST, ids=str)
def test_to_the_nearest_what_is_declared_holds_where_values_err_most(c: Compressor) -> None:
    kind, block = c.kind, c.span  # type: ignore[attr-defined]
    delta = c.delta(block)
    assert delta is not None
    for first in (kind.largest, 2.0**kind.largest_exponent, 2.0 ** (kind.largest_exponent + 1) * (1 - 1e-6)):
        for share in (0.3, 0.499, 0.501, 0.7, 1.24, 1.26, 5.0):
            x = torch.full((block,), share * kind.smallest)
            x[0] = first
            error = float((through(c, x) - x).double().square().sum() / x.double().square().sum())
            assert error <= 1 - delta + 1e-9


# ----------------------------------------------------------------------------------------- rotation, refusals


def rotated(x: Tensor, layout: Layout, seed: Tensor, back: bool = False) -> Tensor:
    keys = keys_of_signs(layout, seed)
    return reference_rotate(x, MXFP4(hadamard=True).spans(layout).places, keys, back)


def test_a_rotation_is_taken_back_and_spreads_an_outlier() -> None:
    layout = Layout.of([("a", (3, 100)), ("b", (7,)), ("c", (256,))])
    x = torch.randn(layout.numel)
    seed = torch.tensor([12345])
    turned = rotated(x, layout, seed)
    assert torch.allclose(turned.norm(), x.norm())
    assert torch.equal(turned[256:307], x[256:307]), "what is shorter than a side stays"
    assert not torch.allclose(turned[:SIDE], x[:SIDE])
    assert torch.allclose(rotated(turned, layout, seed, back=True), x, atol=1e-5)
    assert not torch.equal(rotated(x, layout, seed + 1), turned)
    spike = torch.full((SIDE,), 1e-3)
    spike[5] = 1.0
    plain = float((through(MXFP4(), spike) - spike).norm())
    assert float((through(MXFP4(hadamard=True), spike) - spike).norm()) < plain * 3
    assert float(rotated(spike, flat(SIDE), seed).abs().max()) < 0.15


def test_the_seed_of_a_rotation_is_in_the_payload_and_new_with_every_key() -> None:
    x = torch.randn(512)
    c = MXFP4(hadamard=True)
    seeds = {int(encoded(c, x, KEY.fold(i))["seed"]) for i in range(20)}
    assert len(seeds) == 20
    payload = encoded(c, x)
    decoded = c.decode(payload, flat(512))
    payload["seed"].add_(1)
    assert not torch.allclose(c.decode(payload, flat(512)), decoded)


@pytest.mark.parametrize(
    "c", [*STOCHASTIC, *NEAREST, MXFP4(hadamard=True), Float8("nearest", block=0)], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_looks_like_a_number(c: Compressor, bad: float) -> None:
    x = torch.randn(300)
    x[17] = bad
    decoded = through(c, x)
    assert not decoded[17].isfinite()
    assert decoded[256:].isfinite().all() or isinstance(c, NVFP4)


@pytest.mark.parametrize(
    "c", [MXFP8(), MXFP8(rounding="nearest"), MXFP4(), MXFP4(rounding="nearest")], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_has_the_standards_scale_of_a_nan(c: Compressor, bad: float) -> None:
    x = torch.randn(300)
    x[17] = bad
    payload = encoded(c, x)
    assert payload["scales"].tolist().index(255) == 0
    assert (payload["scales"][1:] < 255).all()
    assert c.decode(payload, flat(300))[:32].isnan().all()


@pytest.mark.parametrize("c", [Float8(), Float8(rounding="nearest"), Float8(format="e5m2")], ids=str)
def test_a_block_of_tiny_values_is_zeros_and_the_next_larger_is_not(c: Compressor) -> None:
    x = torch.randn(128)
    largest = x.abs().max()
    for size, alive in ((2.0**-101, False), (2.0**-140, False), (2.0**-99, True)):
        decoded = through(c, x / largest * size)
        assert decoded.isfinite().all()
        assert bool(decoded.any()) == alive


def test_each_parameter_has_groups_of_its_own() -> None:
    """Of very different sizes: a group that two shared would round the smaller to nothing."""
    c, shapes = NVFP4(rounding="nearest"), [("a", (1500,)), ("b", (40,)), ("c", (3000,))]
    layout = Layout.of(shapes)
    pieces = [torch.randn(shape) * size for (_, shape), size in zip(shapes, (1e3, 1e-3, 1e-6), strict=True)]
    together = c.decode(c.encode(torch.cat(pieces), layout, KEY), layout)
    assert torch.equal(together, torch.cat([through(c, piece) for piece in pieces]))


def test_settings_that_cannot_be_are_refused_with_a_remedy() -> None:
    for make, words in (
        (lambda: Float8(rounding="up"), "stochastic or nearest"),
        (lambda: Float8(format="e3m4"), "e4m3 or e5m2"),
        (lambda: Float8(block=-1), "0 scales nothing"),
        (lambda: Float8(block=0), "rounding=nearest"),
        (lambda: Float8("nearest", True, block=0), "hadamard=false"),
        (lambda: MXFP8(format="e2m1"), "e4m3 or e5m2"),
        (lambda: NVFP4(group=100), "multiple of 128"),
        (lambda: parse_compressor("mxfp4:block=16"), "no setting"),
    ):
        with pytest.raises(DistcompError, match=words):
            make()


def test_texts_name_them() -> None:
    for text in ("fp8", "fp8:format=e5m2", "mxfp8", "mxfp4:hadamard=true", "nvfp4:group=256"):
        assert str(parse_compressor(text)) == text
