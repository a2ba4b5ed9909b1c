"""What every compressor promises: sizes, its omega or delta, a grid it may be cut at, purity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.compressors import Compressor
from distcomp.layout import Layout, chunk_views
from distcomp.payload import HEADER, Payload, body_bytes
from distcomp.randomness import Key
from tests.buffers import ODD, ORDINARY, draw
from tests.conformance.subjects import Subject, every_compressor

KEY = Key.of("conformance")
DRAWS = 200

subjects = pytest.mark.parametrize("subject", every_compressor(), ids=str)
LAYOUTS = {"ordinary": ORDINARY, **ODD}


def through(c: Compressor, x: Tensor, layout: Layout, key: Key = KEY) -> Tensor:
    return c.decode(c.encode(x, layout, key), layout)


@subjects
def test_sizes_are_known_from_the_layout_alone(subject: Subject) -> None:
    c = subject.build()
    for layout in LAYOUTS.values():
        parts, declared = c.parts(layout), c.wire_bytes(layout)
        assert 0 <= declared - HEADER.size - body_bytes(parts) < 8
        for x in (draw(1, layout)[0], torch.zeros(layout.numel), draw(1, layout, scale=1e-40)[0]):
            payload = c.encode(x, layout, KEY)
            assert payload.parts == parts
            assert payload.wire.numel() == declared
            for part in parts:
                assert (payload[part.kind].dtype, payload[part.kind].numel()) == (part.dtype, part.numel)


@subjects
def test_encoding_is_a_pure_function_of_slab_and_key(subject: Subject) -> None:
    c = subject.build()
    at = torch.get_rng_state()
    for layout in LAYOUTS.values():
        x = draw(1, layout)[0]
        kept = x.clone()
        one, other = c.encode(x, layout, KEY), subject.build().encode(x, layout, KEY)
        assert torch.equal(one.body, other.body)
        assert torch.equal(x, kept)
        body = one.body.clone()
        out = c.decode(one, layout)
        assert (out.shape, out.dtype) == ((layout.numel,), torch.float32)
        assert torch.equal(one.body, body), "decoding changed the payload"
    assert torch.equal(torch.get_rng_state(), at)


@subjects
def test_adding_while_decoding_is_decoding_and_adding(subject: Subject) -> None:
    c = subject.build()
    for layout in LAYOUTS.values():
        x, there = draw(2, layout)
        payload = c.encode(x, layout, KEY)
        added, written = there.clone(), torch.full_like(there, math.nan)
        c.decode_into(added, payload, layout, add=True)
        c.decode_into(written, payload, layout)
        assert torch.equal(written, c.decode(payload, layout))
        assert torch.equal(added, there + written)


@subjects
def test_subtracting_is_subtracting_what_is_decoded(subject: Subject) -> None:
    c = subject.build()
    for layout in LAYOUTS.values():
        x, owed = draw(2, layout)
        payload = c.encode(x, layout, KEY)
        left = owed.clone()
        c.subtract_from(left, payload, layout)
        assert torch.equal(left, owed - c.decode(payload, layout))


@pytest.mark.parametrize("cuts", [2, 3, 7])
@subjects
def test_cut_at_its_grain_a_slab_comes_back_the_same(subject: Subject, cuts: int) -> None:
    c = subject.build()
    for shape, layout in LAYOUTS.items():
        x = draw(1, layout)[0]
        whole = through(c, x, layout)
        chunks = layout.split(cuts, c.alignment)
        views = zip(chunk_views(x, chunks), chunks, strict=True)
        assert torch.equal(torch.cat([through(c, view, chunk) for view, chunk in views]), whole), shape


@subjects
def test_each_parameter_comes_back_the_same_in_any_company(subject: Subject) -> None:
    c, x = subject.build(), draw(1)[0]
    whole = through(c, x, ORDINARY)
    for index, (param, piece) in enumerate(ORDINARY.pieces(x)):
        alone = Layout((param,))
        assert torch.equal(
            through(c, piece.clone(), alone), dict(enumerate(ORDINARY.pieces(whole)))[index][1]
        )


@subjects
def test_zeros_come_back_as_zeros(subject: Subject) -> None:
    assert not through(subject.build(), torch.zeros(ORDINARY.numel), ORDINARY).any()


@subjects
def test_payloads_that_may_be_added_decode_to_the_sum(subject: Subject) -> None:
    c = subject.build()
    if not c.summable:
        assert len(c.parts(ORDINARY)) >= 1
        return
    payloads = [c.encode(x, ORDINARY, KEY) for x in draw(3)]
    (part,) = payloads[0].parts
    total = Payload.empty(payloads[0].parts)
    total[part.kind].copy_(sum(payload[part.kind] for payload in payloads))
    decoded = [c.decode(payload, ORDINARY).double() for payload in payloads]
    rounding = torch.finfo(part.dtype).eps if part.dtype.is_floating_point else 0.0
    gap = (c.decode(total, ORDINARY).double() - sum(decoded)).abs()
    assert bool((gap <= 2 * rounding * sum(d.abs() for d in decoded) + 1e-12).all())


@subjects
def test_what_is_unbiased_and_not_exact_depends_on_the_key(subject: Subject) -> None:
    c, x = subject.build(), draw(1)[0]
    one = through(c, x, ORDINARY)
    if c.unbiased and not torch.allclose(one, x, rtol=1e-5):
        assert not torch.equal(one, through(c, x, ORDINARY, Key.of("another")))


def hard_cases(numel: int) -> dict[str, Tensor]:
    """Inputs that reach for the worst case: flat, one spike, half a level, heavy tails."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(numel, generator=generator)
    spike = torch.full((numel,), 0.01)
    spike[:: max(1, numel // 3)] = 1.0
    signs = torch.sign(x)
    return {
        "normal": x,
        "flat": signs,
        "spikes": spike * signs,
        "ramp": torch.linspace(-1, 1, numel),
        "heavy": x / (0.05 + torch.rand(numel, generator=generator)),
    }


def relative_errors(c: Compressor, x: Tensor, layout: Layout, draws: int) -> Tensor:
    errors = [(through(c, x, layout, KEY.fold(i)) - x).double().square().sum() for i in range(draws)]
    return torch.stack(errors) / x.double().square().sum()


def draws_nothing(c: Compressor) -> bool:
    x = draw(1)[0]
    return torch.equal(through(c, x, ORDINARY), through(c, x, ORDINARY, Key.of("another")))


def assert_mean_within(errors: Tensor, bound: float) -> None:
    """The sample mean, four of its standard errors (and float32's rounding) allowed."""
    spread = float(errors.std()) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
    assert float(errors.mean()) <= bound * (1 + 1e-5) + 4 * spread + 1e-12


@pytest.mark.parametrize("case", hard_cases(1))
@subjects
def test_the_declared_omega_or_delta_holds(subject: Subject, case: str) -> None:
    c = subject.build()
    for numel in (5, 700):
        layout = Layout.of([("w", (numel,))])
        omega, delta = c.omega(numel), c.delta(numel)
        assert (omega is not None) == c.unbiased
        assert delta is None or 0 < delta <= 1
        if omega is None and delta is None:
            continue
        errors = relative_errors(c, hard_cases(numel)[case], layout, 1 if draws_nothing(c) else DRAWS // 4)
        if omega is not None:
            assert_mean_within(errors, omega)
        if delta is not None:
            assert_mean_within(errors, 1 - delta)


@subjects
def test_a_declared_contraction_covers_several_parameters(subject: Subject) -> None:
    """Asked for the largest parameter, it must hold for the flat buffer."""
    c, x = subject.build(), draw(1)[0]
    delta = c.delta(max(param.numel for param in ORDINARY.slices))
    if delta is not None:
        assert_mean_within(relative_errors(c, x, ORDINARY, 20), 1 - delta)


normal = st.floats(2**-10, 2**10, width=32).flatmap(lambda v: st.sampled_from([v, -v, 0.0]))


@subjects
@settings(max_examples=10)
@given(values=st.lists(normal, min_size=1, max_size=20))
def test_a_contraction_that_draws_nothing_holds_for_every_slab(subject: Subject, values: list[float]) -> None:
    c, x = subject.build(), torch.tensor(values)
    layout = Layout.of([("w", (len(values),))])
    delta = c.delta(len(values))
    if delta is None or not x.any() or not draws_nothing(c):
        return
    (error,) = relative_errors(c, x, layout, 1)
    assert float(error) <= (1 - delta) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("case", hard_cases(1))
@subjects
def test_the_mean_of_many_draws_of_an_unbiased_one_is_the_slab(subject: Subject, case: str) -> None:
    """As for methods: the mean of T draws misses by a T-th of the scatter, three times it is a bias."""
    c = subject.build()
    if not c.unbiased:
        assert c.omega(10) is None
        return
    x = hard_cases(700)[case]
    layout = Layout.of([("w", (700,))])
    error = torch.stack([through(c, x, layout, KEY.fold(i)) for i in range(DRAWS)]).double() - x
    scatter, missed = float(error.square().sum(1).mean()), float(error.mean(0).square().sum())
    assert missed <= 3 * scatter / DRAWS + 1e-12 * float(x.double().square().sum())


def test_settings_make_different_compressors() -> None:
    """Ranks compare reprs when they are attached: other settings must read otherwise, and be unequal."""
    built = [subject.build() for subject in every_compressor()]
    assert len({repr(c) for c in built}) == len(built)
    assert len(set(built)) == len(built)
    for subject, c in zip(every_compressor(), built, strict=True):
        assert c == subject.build()
        assert hash(c) == hash(subject.build())


@subjects
def test_the_docstring_says_what_it_computes_and_weighs_and_refuses(subject: Subject) -> None:
    kind = type(subject.build())
    text = kind.__doc__ or ""
    assert "C(" in text, "no equation C(x) = ..."
    assert "byte" in text, "nothing about bytes on the wire"
    if "__post_init__" in vars(kind):
        assert "Raises" in text, "it refuses settings and does not say which"
