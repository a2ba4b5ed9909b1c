"""Floats of 4 and 8 bits: the reference against tables and torch's casts, C against the reference, on every
instruction set, wherever a tensor begins and however many threads share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import dispatch, minifloat
from distcomp.kernels.minifloat import E2M1, E4M3, E5M2, Minifloat, Spans
from distcomp.kernels.reference import uniform
from distcomp.kernels.scales import GivenScales
from tests.kernels import minifloats
from tests.kernels.draws import same_bits

KINDS = (E4M3, E5M2, E2M1)
CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
AWKWARD = [
    float("nan"),
    -float("nan"),
    float("inf"),
    -float("inf"),
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    3.4e38,
    449.0,
    6.5,
]


def a_million(kind: Minifloat) -> Tensor:
    """Every number of the format, all that lies halfway between two, their neighbours in float32, any bits
    there are, and ordinary values: 1,000,000 in all."""
    table = torch.tensor(minifloats.numbers(kind.name), dtype=torch.float32)
    halfway = (table[1:] + table[:-1]) / 2
    exact = torch.cat([table, halfway])
    up, down = torch.tensor(1e30), torch.tensor(-1.0)
    exact = torch.cat([exact, -exact, exact.nextafter(up), exact.nextafter(down)])
    generator = torch.Generator().manual_seed(11)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32)
    tiny = torch.randn(100_000, generator=generator) * kind.smallest
    some = torch.cat([exact, bits.view(torch.float32), tiny, torch.tensor(AWKWARD)])
    rest = 1_000_000 - len(some)
    scales = torch.exp2(torch.randint(-20, 20, (rest,), generator=generator).float())
    return torch.cat([some, torch.randn(rest, generator=generator) * scales])


def coded(x: Tensor, kind: Minifloat, key: int | None = None) -> Tensor:
    """The reference's codes of what is not scaled; two to a byte come apart again."""
    codes = torch.empty(kind.code_bytes(x.numel()), dtype=torch.uint8)
    ones = torch.ones(1)
    minifloat.reference_encode(x, ones, codes, x.numel(), kind, key, 0)
    if kind.width == 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).view(-1)[: x.numel()]
    return codes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_million_values_are_rounded_to_the_nearest_number_of_the_table(kind: Minifloat) -> None:
    x = a_million(kind)
    finite = x.isfinite()
    magnitude = x[finite].abs().double().numpy()
    wanted = minifloats.nearest(kind.name, magnitude) + (np.signbit(x[finite].numpy()) << (kind.width - 1))
    assert np.array_equal(coded(x, kind)[finite].numpy(), wanted)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=lambda kind: kind.name)
def test_a_million_values_have_the_bits_of_torchs_cast_there_and_back(kind: Minifloat) -> None:
    """Beyond the largest number casts differ, between versions of torch as well: there ours clamps what is
    finite, and an infinity is one, or a NaN where the format has none."""
    x = a_million(kind)
    ours, theirs = coded(x, kind), x.to(CASTS[kind.name]).view(torch.uint8)
    within = x.abs() <= kind.largest
    assert torch.equal(ours[within], theirs[within])
    assert torch.equal(ours[x.isnan()] & 0x7F, theirs[x.isnan()] & 0x7F)
    beyond = x.isfinite() & ~within
    assert ours[beyond].view(CASTS[kind.name]).float().abs().eq(kind.largest).all()
    infinite = ours[x.isinf()].view(CASTS[kind.name]).float()
    assert infinite.isinf().all() if kind is E5M2 else infinite.isnan().all()
    every_code = torch.arange(256).to(torch.uint8)
    back = torch.empty(256)
    minifloat.reference_decode(every_code, torch.ones(1), back, 256, kind, 0)
    assert same_bits(back, every_code.view(CASTS[kind.name]).float())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_at_random_a_value_becomes_one_of_its_neighbours_as_its_random_number_says(kind: Minifloat) -> None:
    x = a_million(kind)[::7].contiguous()
    u = uniform(x.numel(), 77, 0, x.device).double().numpy()
    finite = x.isfinite().numpy()
    magnitude = x[finite].abs().double().numpy()
    codes = coded(x, kind, 77)[finite].numpy() & ((1 << (kind.width - 1)) - 1)
    low, high = minifloats.neighbours(kind.name, magnitude)
    assert bool(((codes == low) | (codes == high)).all())
    # What lies below 24 bits behind the point is cut off: at the very edge the table may say otherwise.
    wanted = minifloats.at_random(kind.name, magnitude, u[finite])
    assert (codes != wanted).mean() < 1e-5


def test_the_tables_of_four_bits_are_the_standards() -> None:
    assert minifloats.numbers("e2m1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [minifloats.numbers(name)[-1] for name in ("e4m3", "e5m2")] == [448.0, 57344.0]
    assert [kind.largest for kind in (E4M3, E5M2, E2M1)] == [448.0, 57344.0, 6.0]
    assert [kind.smallest for kind in (E4M3, E5M2, E2M1)] == [2.0**-9, 2.0**-16, 0.5]
    assert [kind.largest_exponent for kind in (E4M3, E5M2, E2M1)] == [8, 15, 2]


# ---------------------------------------------------------------------------------------- C against reference

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")
from distcomp.kernels import cpu  # noqa: E402  (only where the extension is)


@pytest.fixture(params=("generic", "avx2", "avx512"), scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this machine can run; afterwards the usual one again."""
    usual = _cpu.instruction_set()
    try:
        _cpu.use(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _cpu.use(usual)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Spans, Minifloat, list[int]]:
    """Values, factors, where they lie, a format and keys (none: to the nearest)."""
    kind = draw(st.sampled_from(KINDS))
    block = draw(st.sampled_from([2, 16, 32, 128] if kind.width == 4 else [1, 3, 16, 32, 128, 513]))
    sizes = draw(st.lists(st.sampled_from([0, 1, 31, 32, 33, 500, 1025, 2050]), max_size=3))
    firsts = draw(st.lists(st.integers(0, 2**20), min_size=len(sizes), max_size=len(sizes)))
    gap = draw(st.integers(0, 3))
    places, at = [], gap
    for size, first in zip(sizes, firsts, strict=True):
        places.append((at, size, first * block))
        at += size + gap
    spans = Spans.of(places, block, kind.width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(at, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e3, 1e-42, 1e38]))
    for value in draw(st.lists(st.sampled_from(AWKWARD), max_size=4)) if at else []:
        x[draw(st.integers(0, at - 1))] = value
    factors = torch.exp2(torch.randint(-6, 7, (spans.rows,), generator=generator).float())
    factors *= draw(st.sampled_from([1.0, 0.7, 0.0]))
    keys = [draw(st.integers(0, 2**64 - 1)) for _ in sizes] if draw(st.booleans()) else []
    return x, factors, spans, kind, keys


def both(patched: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What C makes, then the reference."""
    ours = run()
    with patched.context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        theirs = run()
    return ours, theirs


def there_and_back(
    x: Tensor, factors: Tensor, spans: Spans, kind: Minifloat, keys: list[int]
) -> list[Tensor]:
    """Codes, and what is decoded, added and subtracted: from outputs that held rubbish."""
    codes = torch.full((spans.code_bytes,), 0xA5, dtype=torch.uint8)
    minifloat.encode(x, codes, spans, kind, GivenScales(factors), keys)
    decoded = []
    for sign in (0, 1, -1):
        out = x.flip(0).contiguous()
        minifloat.decode(codes, out, spans, kind, GivenScales(factors), sign)
        decoded.append(out)
    return [codes.float(), *decoded]


@settings(max_examples=60)
@given(problem=problems())
def test_c_equals_the_reference(
    instruction_set: str, problem: tuple[Tensor, Tensor, Spans, Minifloat, list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        ours, theirs = both(patched, lambda: there_and_back(*problem))
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_c_equals_the_reference_on_a_million_values(
    instruction_set: str, kind: Minifloat, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = a_million(kind)
    spans = Spans.of([(0, 500_001, 0), (500_001, 499_999, 64)], 32, kind.width)
    for keys in ([], [5, 2**63 + 1]):
        problem = x, torch.ones(spans.rows), spans, kind, keys
        ours, theirs = both(monkeypatch, lambda problem=problem: there_and_back(*problem))
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_neither_threads_nor_where_a_tensor_begins_changes_a_byte(
    kind: Minifloat, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(300_007)
    spans = Spans.of([(0, x.numel(), 0)], 32, kind.width)
    factors = torch.ones(spans.rows)
    alone = there_and_back(x, factors, spans, kind, [9])
    monkeypatch.setattr(cpu, "ALONE_BYTES", 0)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = there_and_back(x, factors, spans, kind, [9])
    finally:
        torch.set_num_threads(usual)
    assert all(same_bits(a, b) for a, b in zip(alone, shared, strict=True))
    for offset in (1, 2, 3):
        raw = torch.zeros(4 * (x.numel() + 4), dtype=torch.uint8)
        moved = raw[4 * offset : 4 * (offset + x.numel())].view(torch.float32)
        moved.copy_(x)
        elsewhere = there_and_back(moved, factors, spans, kind, [9])
        assert all(same_bits(a, b) for a, b in zip(alone, elsewhere, strict=True))


def test_nothing_beside_the_outputs_is_touched() -> None:
    for kind in KINDS:
        x = torch.randn(101)
        spans = Spans.of([(0, 101, 0)], 16, kind.width)
        codes = torch.full((spans.code_bytes + 64,), 0xA5, dtype=torch.uint8)
        out = torch.full((101 + 16,), 7.0)
        ones = GivenScales(torch.ones(spans.rows))
        minifloat.encode(x, codes[32:-32], spans, kind, ones)
        minifloat.decode(codes[32:-32], out[8:-8], spans, kind, ones)
        assert codes[:32].eq(0xA5).all()
        assert codes[-32:].eq(0xA5).all()
        assert out[:8].eq(7).all()
        assert out[-8:].eq(7).all()


def test_what_reaches_outside_its_buffers_is_refused() -> None:
    x, factors = torch.zeros(64), GivenScales(torch.ones(2))
    spans = Spans.of([(0, 64, 0)], 32, 8)
    with pytest.raises(DistcompError, match="elements"):
        minifloat.encode(x[:63], torch.empty(64, dtype=torch.uint8), spans, E4M3, factors)
    with pytest.raises(DistcompError, match="elements"):
        minifloat.encode(x, torch.empty(63, dtype=torch.uint8), spans, E4M3, factors)
    with pytest.raises(DistcompError, match="elements"):
        minifloat.decode(torch.empty(64, dtype=torch.uint8), x, spans, E4M3, GivenScales(torch.ones(1)))
    with pytest.raises(DistcompError, match="multiple of block"):
        Spans.of([(0, 64, 5)], 32, 8)
    with pytest.raises(DistcompError, match="even block"):
        Spans.of([(0, 64, 0)], 31, 4)


FACTORS, TWO_LEVELS = (0, 1, 0.0, False), (3, 2, 0.0, False)
ROOM = [torch.zeros(64) for _ in range(4)]
FITS = (64, 64, 2, 1)


def call(
    sizes: tuple[int, int, int, int] = FITS,
    line: tuple[int, ...] = (0, 64, 0, 0, 0, 0, 0),
    block: int = 32,
    kind: tuple[int, int, int, float, int, int, int] = E4M3.for_c,
    rule: tuple[int, int, float, bool] = TWO_LEVELS,
    known: tuple[int, int] = (1, 1),
    decode: bool = False,
) -> None:
    """C, called past Python's checks: with buffers said to be so long, one line of a table, so many keys."""
    first, second, third, fourth = (one.data_ptr() for one in ROOM)
    at, table = (first, second, third, fourth), torch.tensor([line], dtype=torch.int64)
    keys, signs = ((torch.zeros(4, dtype=torch.int64).data_ptr(), count) for count in known)
    if decode:
        _cpu.minifloat_decode(at, sizes, table.data_ptr(), 1, block, kind, rule, signs, 0)
    else:
        _cpu.minifloat_encode(at, sizes, table.data_ptr(), 1, block, kind, rule, keys, signs)


@pytest.mark.parametrize("decode", [False, True])
def test_c_refuses_a_table_that_reaches_outside(decode: bool) -> None:
    call(decode=decode)
    for sizes in ((63, 64, 2, 1), (64, 63, 2, 1), (64, 64, 1, 1), (64, 64, 2, 0)):
        with pytest.raises(ValueError, match="outside its buffers"):
            call(sizes, decode=decode)
    call((64, 64, 2, 0), rule=FACTORS, decode=decode)  # which knows no groups
    for column in range(5):
        for place in (1, -1, 2**62, -(2**62)):
            line = [0, 64, 0, 0, 0, 0, 0]
            line[column] += place
            if column == 1 and place == -1:
                continue  # a value fewer
            with pytest.raises(ValueError, match="outside its buffers"):
                call(line=tuple(line), decode=decode)
    for owner in (1, -1, 2**62):
        for known in ((0, 1),) if decode else ((0, 1), (1, 0), (1, 1)):
            with pytest.raises(ValueError, match="outside its buffers"):
                call(line=(0, 64, 0, 0, 0, 0, owner), known=known, decode=decode)
        call(line=(0, 64, 0, 0, 0, 0, owner), known=(0, 0), decode=decode)  # neither noise nor signs


@pytest.mark.parametrize("decode", [False, True])
def test_c_refuses_what_no_format_block_or_rule_is(decode: bool) -> None:
    for run in (
        lambda: call(block=31, kind=E2M1.for_c, decode=decode),
        lambda: call(block=0, decode=decode),
        lambda: call(block=-32, decode=decode),
        lambda: call(kind=(8, 8, 7, 1.0, 0, 0, 0), decode=decode),
        lambda: call(kind=(16, 3, 7, 1.0, 0, 0, 0), decode=decode),
        lambda: call(rule=(4, 1, 0.0, False), decode=decode),
        lambda: call(rule=(-1, 1, 0.0, False), decode=decode),
        lambda: call(rule=(3, 0, 0.0, False), decode=decode),
        lambda: call(rule=(3, 2**62, 0.0, False), decode=decode),
    ):
        with pytest.raises(ValueError, match="cannot be"):
            run()


# ----------------------------------------------------------------------------------------------------- Triton


def test_triton_equals_the_reference_in_its_interpreter() -> None:
    """In a process of its own: the interpreter must be asked for before anything imports Triton."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton): no GPU kernels")
    script = Path(__file__).parent / "minifloat_equality.py"
    environment = {**environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
