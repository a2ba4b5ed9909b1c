"""The reference is what it says: against NumPy, and the laws every quantizer owes its users."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomp import kernels
from distcomp.kernels import packing, reference
from tests.kernels import oracle
from tests.kernels.draws import Case, cases, same_bits


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**33))
def test_randomness_is_keyed_lowbias32(key: int, first: int) -> None:
    ours = reference.uniform(5, key, first, torch.device("cpu"))
    assert ours.tolist() == [oracle.uniform(key, (first + j) % 2**32) for j in range(5)]


def test_randomness_is_even_and_its_streams_are_unrelated() -> None:
    n = 1 << 18
    a, b, c = (reference.uniform(n, key, 0, torch.device("cpu")) for key in (1, 2, 1 << 32))
    counts = torch.histc(a, 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 120  # chi-square, 63 degrees: P < 1e-5
    for one, other in ((a, b), (a, c), (a[1:], a[:-1])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / n**0.5


@given(st.integers(1, 8), st.integers(0, 70), st.data())
def test_packing_is_planar_and_reversible(bits: int, m: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=m, max_size=m))
    packed = reference.pack_codes(torch.tensor([codes], dtype=torch.int64), bits)
    assert bytes(packed.flatten().tolist()) == oracle.pack_block(codes, bits)
    assert packed.numel() == packing.block_bytes(m, bits)
    assert reference.unpack_codes(packed, m, bits).flatten().tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_cost_what_they_say(bits: int) -> None:
    assert kernels.packed_bytes(512 * 30, 512, bits) == 512 * 30 * bits // 8
    assert kernels.packed_bytes(0, 512, bits) == 0
    assert kernels.packed_bytes(1, 512, bits) == len(packing.parts(bits))
    assert [kernels.scale_count(n, 512) for n in (0, 1, 512, 513)] == [0, 1, 1, 2]


@given(cases(finite=True, largest=200))
def test_equals_the_numpy_oracle(case: Case) -> None:
    codes, scales = case.encode(reference)
    x = case.x.numpy()
    their_codes, their_scales = oracle.encode(x, case.block, case.bits, case.key, case.first, case.stochastic)
    assert bytes(codes.tolist()) == their_codes
    assert scales.numpy().tobytes() == their_scales.tobytes()
    decoded = case.decode(reference, codes, scales).numpy()
    for row, start in enumerate(range(0, len(x), case.block)):
        block = x[start : start + case.block]
        theirs, scale = oracle.encode_block(block, case.bits, case.key, case.first + start, case.stochastic)
        for j, code in enumerate(theirs):
            assert decoded[start + j] == oracle.decode_value(code, scale, case.bits), (row, j)


@given(st.binary(max_size=40))
def test_checksum_equals_the_oracle(data: bytes) -> None:
    assert reference.checksum(torch.tensor(list(data), dtype=torch.uint8)) == oracle.checksum(data)


def test_checksum_of_large_words_does_not_overflow() -> None:
    data = b"\xff" * 40_003
    assert reference.checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) == oracle.checksum(data)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    x, draws, keys = torch.linspace(-1, 1, 64), 1000, (1, 2**40, 2**64 - 1)
    mean = torch.zeros_like(x)
    for key in keys:
        case = Case(x.repeat(draws), 64, bits, key=key)
        mean += case.decode(reference, *case.encode(reference)).view(draws, 64).mean(0) / len(keys)
    sigma = 0.5 / kernels.levels(bits) / (draws * len(keys)) ** 0.5  # of a value half-way between two levels
    assert ((mean - x).abs() <= 5 * sigma + 1e-6).all()


@given(cases(finite=True))
def test_no_value_is_off_by_more_than_a_level(case: Case) -> None:
    codes, scales = case.encode(reference)
    error = (case.decode(reference, codes, scales) - case.x).abs()
    bound = scales.repeat_interleave(case.block)[: case.x.numel()] / kernels.levels(case.bits)
    if case.bits > 1:
        assert (error <= bound * (1 if case.stochastic else 0.5) * (1 + 1e-5)).all()


@given(cases(finite=True), st.sampled_from([1.0, 0.25]))
def test_decoded_values_are_added_or_subtracted_and_then_scaled(case: Case, times: float) -> None:
    codes, scales = case.encode(reference)
    decoded, before = case.decode(reference, codes, scales), case.x.flip(0)
    assert same_bits(case.decode(reference, codes, scales, 0, times), decoded * times)
    assert same_bits(case.decode(reference, codes, scales, 1, times), (before + decoded) * times)
    assert same_bits(case.decode(reference, codes, scales, -1, times), (before - decoded) * times)


@given(cases(finite=True))
def test_subtracting_what_was_sent_leaves_the_residual(case: Case) -> None:
    codes, scales = case.encode(reference)
    decoded, residual = case.decode(reference, codes, scales), case.x.clone()
    kernels.dequantize(codes, scales, residual, block=case.block, bits=case.bits, subtract=True)
    assert same_bits(residual, case.x - decoded)


def test_a_nan_takes_the_top_code() -> None:
    x = torch.tensor([float("nan"), 0.0])
    codes, _ = Case(x, 2, 4, given=torch.ones(1), stochastic=False).encode(reference)
    assert codes.item() == 14 | 7 << 4


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_spoils_its_block_and_no_other(bits: int, bad: float) -> None:
    x = torch.randn(48)
    x[20] = bad
    case = Case(x, 16, bits, key=3)
    decoded = case.decode(reference, *case.encode(reference))
    assert not decoded[16:32].isfinite().any()
    assert decoded[:16].isfinite().all()
    assert decoded[32:].isfinite().all()


@pytest.mark.parametrize("stochastic", [True, False])
def test_tiny_blocks_become_zeros_and_sign_of_zero_is_plus(stochastic: bool) -> None:
    tiny = torch.tensor([1e-38, -1e-40, 0.0, -0.0])
    for bits in range(2, 9):
        case = Case(tiny, 4, bits, key=9, stochastic=stochastic)
        codes, scales = case.encode(reference)
        assert scales.item() == 0.0
        assert not case.decode(reference, codes, scales).any()
    codes, _ = Case(tiny, 4, 1).encode(reference)
    assert codes.item() == 0b1101


def test_given_scales_are_used_and_kept() -> None:
    x, scale = torch.tensor([0.5, -2.0, 0.0, 1.0]), torch.tensor([1.0])
    case = Case(x, 4, 2, stochastic=False, given=scale)
    codes, scales = case.encode(reference)
    assert scales.equal(scale)
    assert case.decode(reference, codes, scales).tolist() == [0.0, -1.0, 0.0, 1.0]  # -2 is clamped


def test_ternary_is_minus_one_zero_one_times_the_scale() -> None:
    x = torch.randn(512) * 0.1
    case = Case(x, 512, 2, key=1, given=torch.tensor([0.25]))
    assert set(case.decode(reference, *case.encode(reference)).tolist()) == {-0.25, 0.0, 0.25}


def test_rounding_to_nearest_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.0])  # s = 7, scale 7: one level is 1
    case = Case(x, 6, 4, stochastic=False)
    assert case.decode(reference, *case.encode(reference)).tolist() == [0, 2, 2, 0, -2, 7]
    assert np.rint(x.numpy()).tolist() == [0, 2, 2, 0, -2, 7]
