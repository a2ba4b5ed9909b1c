"""Scales of blocks: what each rule says of a block, and that C, in one pass with a rotation and the codes,
says the same bits as the reference in many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import dispatch, minifloat
from distcomp.kernels.minifloat import E2M1, E4M3, E5M2, Minifloat, Scales, Spans
from distcomp.kernels.scales import FloatScales, GivenScales, PowerScales, TwoLevelScales
from tests.kernels.draws import same_bits

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="no C extension could be built here")
from distcomp.kernels import cpu  # noqa: E402  (only where the extension is)

LEAST = 2.0**-100
magnitudes = st.one_of(
    st.sampled_from([0.0, math.inf, math.nan, 2.0**-126, 2.0**-149, 2.0**-100, 3e38, 448 * 6, 6.0, 1.75]),
    st.floats(2.0**-130, 2.0**127, width=32),
    st.integers(8, 0x7E).map(lambda code: 6 * (8 + code % 8) * 2.0 ** (code // 8 - 10)),  # scales themselves
    st.integers(8, 0x7D).map(lambda code: 6 * (8.5 + code % 8) * 2.0 ** (code // 8 - 10)),  # and ties
)

RULES: dict[str, Callable[[Spans, bool], Scales]] = {
    "given": lambda spans, up: GivenScales(torch.linspace(0.0, 3.0, max(1, spans.rows))),
    "powers": lambda spans, up: PowerScales(torch.full((spans.rows,), 7, dtype=torch.uint8), up),
    "floats": lambda spans, up: FloatScales(torch.full((spans.rows,), 7.0), LEAST),
    "two levels": lambda spans, up: TwoLevelScales(
        torch.full((spans.rows,), 7, dtype=torch.uint8), torch.full((spans.groups,), 7.0), LEAST, up
    ),
}


@contextmanager
def served_by(name: str) -> Iterator[None]:
    """An instruction set, or "reference"."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.setattr(dispatch, "forced", lambda: "reference")
        else:
            _cpu.use(name)
        yield


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Spans, Minifloat, str, list[int], Tensor | None]:
    """Values, where they lie, a format, a rule, keys of the noise (none: to the nearest) and of the signs."""
    kind, rule = draw(st.sampled_from([E4M3, E5M2, E2M1])), draw(st.sampled_from(sorted(RULES)))
    block = draw(st.sampled_from([16, 32, 128, 2, 20, 6000] + ([] if kind.width == 4 else [1, 25])))
    per = draw(st.sampled_from([1, 2, 8, 64, 1 << 40])) if rule == "two levels" else 1
    rotated = draw(st.booleans())
    sizes = draw(st.lists(st.sampled_from([0, 1, 127, 128, 300, 4096, 9001]), max_size=3))
    places, at = [], 0
    for size in sizes:
        gap = draw(st.integers(0, 3))
        places.append((at + gap, size, block * draw(st.integers(0, 2**20))))
        at += gap + size
    spans = Spans.of(places, block, kind.width, per, rotated)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    drawn = torch.tensor(draw(st.lists(magnitudes, min_size=1, max_size=12)), dtype=torch.float32)
    if rotated:  # the sign of a NaN is not promised, and butterflies make them
        drawn = drawn.nan_to_num(0.0, 1.0, 1.0).clamp(max=1e30)
    which = torch.randint(len(drawn), (at // block + 1,), generator=generator)
    x = (torch.rand(at, generator=generator) * 2 - 1) * drawn[which].repeat_interleave(block)[:at]
    x[torch.rand(at, generator=generator) < 0.05] = 0.0
    keys = [draw(st.integers(0, 2**64 - 1)) for _ in sizes] if draw(st.booleans()) else []
    signs = torch.randint(-(2**63), 2**63 - 1, (len(sizes),), generator=generator) if rotated else None
    return x, spans, kind, rule, keys, signs


def there_and_back(
    x: Tensor, spans: Spans, kind: Minifloat, rule: str, keys: list[int], signs: Tensor | None
) -> list[Tensor]:
    """What is sent, and what is decoded, added and subtracted: from outputs that held rubbish."""
    scales = RULES[rule](spans, bool(keys))
    codes = torch.full((spans.code_bytes,), 0xA5, dtype=torch.uint8)
    minifloat.encode(x, codes, spans, kind, scales, keys, signs)
    found = [codes.float(), scales.blocks.float()]
    if scales.groups is not None:
        found.append(scales.groups)
    for sign in (0, 1, -1):
        out = torch.linspace(-1.0, 1.0, x.numel())
        minifloat.decode(codes, out, spans, kind, scales, sign, signs)
        found.append(out)
    return found


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_one_pass_of_c_has_the_bits_of_the_references_many(
    instruction_sets: list[str], problem: tuple[Tensor, Spans, Minifloat, str, list[int], Tensor | None]
) -> None:
    with served_by("reference"):
        wanted = there_and_back(*problem)
    for name in instruction_sets:
        with served_by(name):
            found = there_and_back(*problem)
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True)), name


@pytest.mark.parametrize("rule", sorted(RULES))
def test_threads_change_no_byte_of_scales_and_rotated_codes(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, per = torch.randn(300_007), 64 if rule == "two levels" else 1
    spans = Spans.of([(0, 200_001, 0), (200_001, 100_006, 0)], 16, 4, per, rotated=True)
    problem = x, spans, E2M1, rule, [9, 10], torch.tensor([5, -6])
    alone = there_and_back(*problem)
    with served_by("reference"):
        wanted = there_and_back(*problem)
    monkeypatch.setattr(cpu, "ALONE_BYTES", 0)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = there_and_back(*problem)
    finally:
        torch.set_num_threads(usual)
    assert all(same_bits(a, b) for a, b in zip(alone, wanted, strict=True))
    assert all(same_bits(a, b) for a, b in zip(alone, shared, strict=True))


def test_neither_groups_nor_rotated_rows_are_cut() -> None:
    """However long: of a span all but a parameter's last hold whole ones, and a group has one number."""
    spans = Spans.of([(0, 1_000_000, 0), (1_000_000, 50, 0)], 20, 8, 3, rotated=True)
    first, *_, last, alone = spans.each
    assert first.numel % math.lcm(60, 128) == 0
    assert all(one.numel == first.numel for one in spans.each[:-2])
    assert (last.at + last.numel, alone.at, alone.numel) == (1_000_000, 1_000_000, 50)
    assert [one.group for one in spans.each[:2]] == [0, first.numel // 60]
    assert (alone.group, spans.groups) == (-(-1_000_000 // 60), -(-1_000_000 // 60) + 1)
    numbers = spans.groups_of_blocks(torch.device("cpu"))
    assert len(numbers) == spans.rows == 50_003
    assert numbers[:50_000].tolist() == [row // 3 for row in range(50_000)]
    assert numbers[50_000:].tolist() == [spans.groups - 1] * 3
    assert len(Spans.of([(0, 1_000_000, 0)], 16, 4, 1 << 26).each) == 1


# ------------------------------------------------------------------------------------ what is said of a block


def written(maxima: Tensor, kind: Minifloat, rule: str, up: bool, per: int = 1) -> Scales:
    """From blocks of two, one of which has this magnitude and the other has none."""
    x = torch.stack([torch.zeros_like(maxima), -maxima], 1).view(-1)
    spans = Spans.of([(0, x.numel(), 0)], 2, kind.width, per)
    scales = RULES[rule](spans, up)
    minifloat.encode(x, torch.empty(spans.code_bytes, dtype=torch.uint8), spans, kind, scales)
    return scales


def of_powers(drawn: list[float]) -> Tensor:
    return torch.tensor([abs(one) for one in drawn], dtype=torch.float32)


@settings(deadline=None)
@given(st.lists(magnitudes, max_size=40), st.sampled_from([E2M1, E4M3, E5M2]), st.booleans())
def test_powers_of_two_as_scales(drawn: list[float], kind: Minifloat, up: bool) -> None:
    """Rounded up, a scale clamps nothing; else the largest magnitude is in the largest number's binade."""
    maxima = of_powers(drawn)
    codes = written(maxima, kind, "powers", up).blocks
    usable = codes < 255
    assert torch.equal(usable, maxima.isfinite())
    assert codes.ge(1).all()
    scaled = maxima[usable].double() / torch.exp2(codes[usable].double() - 127)
    assert (scaled <= (kind.largest if up else 2.0 ** (kind.largest_exponent + 1))).all()
    assert (scaled[codes[usable] > 1] >= 2.0**kind.largest_exponent / (2 if up else 1)).all()


def test_every_e4m3_is_a_unit() -> None:
    """Subnormal ones too, and NaN: a group's scale of 1 times each, seen through numbers of 1."""
    blocks = torch.arange(256).to(torch.uint8)
    spans, out = Spans.of([(0, 512, 0)], 2, 4, 256), torch.empty(512)
    scales = TwoLevelScales(blocks, torch.ones(1), LEAST, True)
    minifloat.decode(torch.full((256,), 0x22, dtype=torch.uint8), out, spans, E2M1, scales)
    assert same_bits(out[::2], blocks.view(torch.float8_e4m3fn).float())
    assert same_bits(out[1::2], out[::2].contiguous())


def test_rounded_up_a_scale_of_two_levels_is_never_below() -> None:
    """And to the nearest it is off by a sixteenth at most."""
    maxima = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 2.0**-9
    for up in (True, False):
        scales = written(maxima, E2M1, "two levels", up, 4096)
        inner = scales.blocks.view(torch.float8_e4m3fn).float()
        assert scales.groups is not None
        ratio = scales.groups * inner * 6 / maxima
        assert ratio.max() <= (1.126 if up else 1.0626)
        assert ratio.min() >= (1 - 1e-6 if up else 1 / 1.0668)


def test_tensors_that_are_too_short_are_refused() -> None:
    spans = Spans.of([(0, 64, 0)], 16, 4, 2)
    x, codes, bytes_ = torch.zeros(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    for scales in (
        GivenScales(torch.ones(3)),
        PowerScales(bytes_[:3], True),
        FloatScales(torch.ones(3), LEAST),
        FloatScales(bytes_, LEAST),
        TwoLevelScales(bytes_[:3], torch.ones(2), LEAST, True),
        TwoLevelScales(bytes_, torch.ones(1), LEAST, True),
    ):
        with pytest.raises(DistcompError, match="elements"):
            minifloat.encode(x, codes, spans, E2M1, scales)
        with pytest.raises(DistcompError, match="elements"):
            minifloat.decode(codes, x, spans, E2M1, scales)
    with pytest.raises(DistcompError, match="keys of signs"):
        minifloat.encode(x, codes, spans, E2M1, PowerScales(bytes_, True), signs=torch.zeros(1))
