"""Scales of two levels: C and torch say the same bits, and every element that they name lies within."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.errors import DistcompError
from distcomp.kernels import two_level
from distcomp.kernels.two_level import BlockGroups

cpu = pytest.importorskip("distcomp.kernels._cpu", reason="no C extension could be built here")

LEAST = 2.0**-100
magnitudes = st.one_of(
    st.sampled_from([0.0, math.inf, math.nan, 2.0**-126, 2.0**-149, 2.0**-100, 3e38, 448 * 6, 6.0]),
    st.floats(2.0**-130, 2.0**127, width=32),
    st.integers(8, 0x7E).map(lambda code: 6 * (8 + code % 8) * 2.0 ** (code // 8 - 10)),  # scales themselves
    st.integers(8, 0x7D).map(lambda code: 6 * (8.5 + code % 8) * 2.0 ** (code // 8 - 10)),  # and ties
)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 100), max_size=4),
    st.integers(1, 8) | st.integers(15, 70),
    st.booleans(),
    st.lists(magnitudes, min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_c_and_torch_write_the_same_bits(
    instruction_sets: list[str], blocks: list[int], per: int, up: bool, drawn: list[float], seed: int
) -> None:
    groups = BlockGroups(tuple(blocks), per)
    which = torch.randint(len(drawn), (groups.rows,), generator=torch.Generator().manual_seed(seed))
    maxima = torch.tensor(drawn, dtype=torch.float32)[which]
    found = []
    for name in (*instruction_sets, "torch"):
        write = two_level.reference_write_scales if name == "torch" else two_level.write_scales
        if name != "torch":
            cpu.use(name)
        scales = torch.full((groups.count,), 7.0)
        codes = torch.full((groups.rows,), 7, dtype=torch.uint8)
        inverses = write(maxima, scales, codes, groups, LEAST, up)
        found.append((bits(scales), codes, bits(inverses)))
        values = two_level.units(scales, codes, groups), two_level.reference_units(scales, codes, groups)
        assert torch.equal(values[0].isnan(), values[1].isnan())
        assert torch.equal(values[0].nan_to_num(7.0), values[1].nan_to_num(7.0))
    *of_c, of_torch = found
    assert all(torch.equal(a, b) for one in of_c for a, b in zip(one, of_torch, strict=True))


def test_every_code_has_its_value() -> None:
    codes = torch.arange(256).to(torch.uint8)
    groups = BlockGroups((256,), 256)
    values = two_level.units(torch.ones(1), codes, groups)
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(bits(values), bits(wanted))


def test_rounded_up_a_scale_is_never_below() -> None:
    """And to the nearest it is off by a sixteenth at most."""
    groups = BlockGroups((4096,), 4096)
    maxima = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 2.0**-9
    for up in (True, False):
        scales, codes = torch.empty(1), torch.empty(4096, dtype=torch.uint8)
        two_level.write_scales(maxima, scales, codes, groups, LEAST, up)
        ratio = two_level.units(scales, codes, groups) * 6 / maxima
        assert ratio.max() <= (1.126 if up else 1.0626)
        assert ratio.min() >= (1 - 1e-6 if up else 1 / 1.0668)


def test_what_reaches_outside_is_refused() -> None:
    x, codes = torch.zeros(4), torch.zeros(4, dtype=torch.uint8)
    at = [one.data_ptr() for one in (x, x, codes, x)]
    constants = (2688.0, 6.0, LEAST)
    for blocks, per, sizes in (((5,), 2, (4, 4)), ((4,), 2, (4, 1)), ((-1,), 2, (4, 4)), ((4,), 0, (4, 4))):
        table = torch.tensor(blocks, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"outside|cannot be"):
            cpu.two_level_scales(*at, sizes, table.data_ptr(), len(blocks), per, constants, True)
        with pytest.raises(ValueError, match=r"outside|cannot be"):
            cpu.two_level_units(at[0], at[2], at[3], sizes, table.data_ptr(), len(blocks), per)
    with pytest.raises(DistcompError, match="the codes have 3 elements"):
        two_level.units(torch.zeros(1), torch.zeros(3, dtype=torch.uint8), BlockGroups((4,), 4))
