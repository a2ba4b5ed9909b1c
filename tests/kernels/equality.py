"""The Triton kernels equal the reference bit for bit: on a GPU, or in Triton's interpreter.

Not collected by its name: test_triton.py runs it where it can run.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distcomp.kernels import reference
from distcomp.kernels import triton as kernel
from tests.kernels.draws import Case, cases, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = settings(max_examples=300 if DEVICE == "cuda" else 12)
LARGEST = 2100 if DEVICE == "cuda" else 200


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # the interpreter is NumPy
@FEW
@given(case=cases(largest=LARGEST), sign=st.sampled_from([0, 1, -1]), times=st.sampled_from([1.0, 1 / 3]))
def test_equals_the_reference(case: Case, sign: int, times: float) -> None:
    compare(case, sign, times)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("block", [8, 104, 512, 516])
def test_every_width_equals_the_reference_on_both_paths(bits: int, block: int) -> None:
    compare(Case(torch.randn(2 * block + 77), block, bits, key=2**63 + 5, first=3 * block))
    compare(Case(torch.randn(block), block, bits, stochastic=False))


@pytest.mark.parametrize("block", [kernel.LARGEST_TILE, kernel.LARGEST_TILE + 8])
def test_a_large_block_equals_the_reference(block: int) -> None:
    compare(Case(torch.randn(block + 1), block, 4))


def compare(case: Case, sign: int = 0, times: float = 1.0) -> None:
    """Codes, scales and decoded values of both."""
    codes, scales = case.encode(reference)
    our_codes, our_scales = case.on(DEVICE).encode(kernel)
    assert torch.equal(our_codes.cpu(), codes)
    assert same_bits(our_scales, scales)
    decoded = case.decode(reference, codes, scales, sign, times)
    assert same_bits(case.on(DEVICE).decode(kernel, our_codes, our_scales, sign, times), decoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    x = torch.full((5000,), -torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    assert kernel.all_finite(x)
    for at in (0, 2048, 4999):
        spoiled = x.clone()
        spoiled[at] = bad
        assert not kernel.all_finite(spoiled)
    assert kernel.all_finite(x[:0])


@FEW
@given(st.binary(max_size=300))
@example(b"")
@example(b"\xff" * 20_001)
def test_checksum_equals_the_reference(data: bytes) -> None:
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    assert kernel.checksum(tensor.to(DEVICE)) == reference.checksum(tensor)
