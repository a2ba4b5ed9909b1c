"""Floats of 4 and 8 bits in Triton equal the reference bit for bit: on a GPU, or in Triton's interpreter.

Not collected by its name: test_minifloat.py runs it.
"""

from __future__ import annotations

import pytest
import torch

from distcomp.kernels import minifloat
from distcomp.kernels import triton_minifloat as triton
from distcomp.kernels.minifloat import E2M1, E4M3, E5M2, Minifloat
from tests.kernels.draws import same_bits
from tests.kernels.minifloats import numbers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 1_000_003 if DEVICE == "cuda" else 3001


def values(kind: Minifloat) -> torch.Tensor:
    """Numbers, ties, awkward ones, any bits, ordinary ones."""
    table = torch.tensor(numbers(kind.name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (COUNT // 3,), generator=generator).to(torch.int32)
    awkward = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38])
    some = torch.cat([table, -(table[1:] + table[:-1]) / 2, awkward, bits.view(torch.float32)])
    return torch.cat([some, torch.randn(COUNT - len(some), generator=generator)])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # the interpreter is NumPy
@pytest.mark.parametrize("key", [None, 2**63 + 5])
@pytest.mark.parametrize("kind", [E4M3, E5M2, E2M1], ids=lambda kind: kind.name)
def test_codes_and_what_they_decode_to(kind: Minifloat, key: int | None) -> None:
    x, block = values(kind), 32
    factors = torch.exp2(torch.arange(-(-COUNT // block)).remainder(7).float() - 3)
    wanted = torch.empty(kind.code_bytes(COUNT), dtype=torch.uint8)
    minifloat.reference_encode(x, factors, wanted, block, kind, key, 96)
    codes = torch.empty_like(wanted, device=DEVICE)
    triton.encode(x.to(DEVICE), factors.to(DEVICE), codes, block, kind, key, 96)
    assert torch.equal(codes.cpu(), wanted)
    for sign in (0, 1, -1):
        before = x.flip(0).nan_to_num(0.0, 1.0, -1.0)
        theirs, ours = before.clone(), before.to(DEVICE)
        minifloat.reference_decode(wanted, factors, theirs, block, kind, sign)
        triton.decode(codes, factors.to(DEVICE), ours, block, kind, sign)
        assert same_bits(ours, theirs)
