"""The C extension equals the reference bit for bit, on each instruction set, however the work is shared."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp import kernels
from distcomp.errors import DistcompError
from distcomp.kernels import reference
from distcomp.kernels.packing import Coding
from tests.kernels.draws import Case, cases, same_bits

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")
from distcomp.kernels import cpu  # noqa: E402  (only where the extension is)


def instruction_sets() -> list[str]:
    """Those that this machine can run."""
    usual, found = _cpu.instruction_set(), []
    for name in ("generic", "avx2", "avx512"):
        try:
            _cpu.use(name)
            found.append(name)
        except ValueError:
            pass
    _cpu.use(usual)
    return found


@pytest.fixture(params=instruction_sets(), scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each in turn; afterwards the usual one again."""
    usual = _cpu.instruction_set()
    _cpu.use(request.param)
    yield request.param
    _cpu.use(usual)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """Three threads, and tensors that are never too small to share."""
    usual, alone = torch.get_num_threads(), cpu.ALONE_BYTES
    torch.set_num_threads(3)
    cpu.ALONE_BYTES = 0
    yield
    torch.set_num_threads(usual)
    cpu.ALONE_BYTES = alone


@settings(max_examples=300)
@given(case=cases(), sign=st.sampled_from([0, 1, -1]), times=st.sampled_from([1.0, 1 / 3]))
def test_equals_the_reference(instruction_set: str, case: Case, sign: int, times: float) -> None:
    codes, scales = case.encode(reference)
    our_codes, our_scales = case.encode(cpu)
    assert torch.equal(our_codes, codes)
    assert same_bits(our_scales, scales)
    decoded = case.decode(reference, codes, scales, sign, times)
    assert same_bits(case.decode(cpu, codes, scales, sign, times), decoded)


@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_the_reference_on_a_large_tensor(instruction_set: str, threads: None, bits: int) -> None:
    case = Case(torch.randn(100_003), 512, bits, key=2**63 + 5)
    codes, scales = case.encode(reference)
    our_codes, our_scales = case.encode(cpu)
    assert torch.equal(our_codes, codes)
    assert same_bits(our_scales, scales)
    assert same_bits(case.decode(cpu, codes, scales), case.decode(reference, codes, scales))


@settings(max_examples=100)
@given(case=cases())
def test_threads_change_nothing(threads: None, case: Case) -> None:
    codes, scales = case.encode(reference)
    our_codes, our_scales = case.encode(cpu)
    assert torch.equal(our_codes, codes)
    assert same_bits(our_scales, scales)
    assert same_bits(case.decode(cpu, codes, scales, 1), case.decode(reference, codes, scales, 1))
    assert cpu.all_finite(case.x) == reference.all_finite(case.x)
    assert cpu.checksum(codes) == reference.checksum(codes)


@given(case=cases(), cut=st.integers(0, 10))
def test_splitting_between_blocks_changes_no_byte(case: Case, cut: int) -> None:
    codes, scales = case.encode(cpu)
    at = min(cut * case.block, case.x.numel() // case.block * case.block)
    row = at // case.block
    pieces = [
        replace(case, x=x, first=first, given=given)
        for x, first, given in (
            (case.x[:at], case.first, None if case.given is None else case.given[:row]),
            (case.x[at:], case.first + at, None if case.given is None else case.given[row:]),
        )
    ]
    left, right = (piece.encode(cpu) for piece in pieces)
    assert torch.equal(torch.cat([left[0], right[0]]), codes)
    assert same_bits(torch.cat([left[1], right[1]]), scales)


def test_nothing_beside_the_outputs_is_touched() -> None:
    n, block = 100, 48
    for bits in range(1, 9):
        size, rows = kernels.packed_bytes(n, block, bits), kernels.scale_count(n, block)
        codes = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
        scales, out = torch.full((rows + 16,), 7.0), torch.full((n + 16,), 7.0)
        kernels.quantize(torch.randn(n), codes[32:-32], scales[8:-8], block=block, bits=bits, key=1)
        kernels.dequantize(codes[32:-32], scales[8:-8], out[8:-8], block=block, bits=bits)
        assert codes[:32].eq(0xA5).all()
        assert codes[-32:].eq(0xA5).all()
        for padded in (scales, out):
            assert padded[:8].eq(7).all()
            assert padded[-8:].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_wherever_it_is(instruction_set: str, dtype: torch.dtype, bad: float) -> None:
    x = torch.full((9001,), torch.finfo(dtype).max, dtype=dtype)
    assert cpu.all_finite(x)
    assert cpu.all_finite(-x)
    for at in (0, 4095, 4096, 9000):
        spoiled = x.clone()
        spoiled[at] = bad
        assert not cpu.all_finite(spoiled)


@given(st.binary(max_size=300))
def test_checksum_equals_the_reference(instruction_set: str, data: bytes) -> None:
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    for alone_bytes in (0, 1 << 20):  # shared between threads, and by one alone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "ALONE_BYTES", alone_bytes)
            assert cpu.checksum(tensor) == reference.checksum(tensor)


def test_checksum_tells_a_changed_and_an_exchanged_word() -> None:
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    changed, exchanged = data.clone(), data.clone()
    changed[1234] ^= 16
    exchanged[:4], exchanged[400:404] = data[400:404], data[:4]
    assert len({cpu.checksum(data), cpu.checksum(changed), cpu.checksum(exchanged)}) == 3


def test_a_forked_child_has_threads_of_its_own(threads: None) -> None:
    x = torch.randn(5000)
    assert cpu.all_finite(x)  # the parent's threads are awake
    child = multiprocessing.get_context("fork").Process(target=cpu.all_finite, args=(x,))
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def bit_patterns(numel: int, seed: int) -> torch.Tensor:
    """Any float32 there is: denormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)


@given(data=st.data(), numel=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_the_same_places_are_drawn_and_none_twice(
    instruction_set: str, data: st.DataObject, numel: int, seed: int
) -> None:
    count = data.draw(st.integers(0, numel))
    keys = tuple((seed + 1) * (2 * number + 1) * 0x9E3779B97F4A7C15 % 2**64 for number in range(6))
    places = cpu.permuted(count, numel, keys)
    assert torch.equal(places, reference.permuted(count, numel, keys))
    assert len(set(places.tolist())) == count
    assert all(0 <= place < numel for place in places.tolist())


@given(
    numel=st.integers(0, 300),
    seed=st.integers(0, 99),
    key=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**33),
)
def test_the_same_powers_of_two(instruction_set: str, numel: int, seed: int, key: int, first: int) -> None:
    x = bit_patterns(numel, seed)
    ours, theirs = (torch.empty(numel, dtype=torch.uint8) for _ in range(2))
    cpu.exponents(x, ours, key=key, first=first)
    reference.exponents(x, theirs, key=key, first=first)
    assert torch.equal(ours, theirs)
    signs = torch.where(x.view(torch.int32) < 0, -1.0, 1.0)
    our_values, their_values = signs.clone(), signs.clone()
    cpu.scale_by_exponents(ours, our_values)
    reference.scale_by_exponents(theirs, their_values)
    assert same_bits(our_values, their_values)


def test_sharing_between_threads_changes_no_power_of_two(threads: None) -> None:
    x = torch.randn(100_003)
    ours, theirs = (torch.empty(x.numel(), dtype=torch.uint8) for _ in range(2))
    cpu.exponents(x, ours, key=2**40 + 1, first=7)
    reference.exponents(x, theirs, key=2**40 + 1, first=7)
    assert torch.equal(ours, theirs)


def test_a_wrong_number_of_keys_or_places_is_refused() -> None:
    with pytest.raises(DistcompError, match="six keys"):
        kernels.permuted(3, 10, (1, 2))
    with pytest.raises(DistcompError, match="count <= numel"):
        kernels.permuted(11, 10, (1,) * 6)


def test_what_lies_on_the_grid_stays_there_whatever_the_noise(instruction_set: str) -> None:
    """Added in float32, one of 2^17 would be rounded up: 100 + u is 101 where u is near 1."""
    levels = torch.arange(-127, 128, dtype=torch.float32).repeat(2**14)
    codes, scales = torch.empty(levels.numel(), dtype=torch.uint8), torch.empty(2**14)
    cpu.quantize(levels, codes, scales, block=255, bits=8, key=7, first=0, coding=Coding(True, "max", False))
    assert torch.equal(codes.float() - 127, levels)
