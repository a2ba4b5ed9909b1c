"""Two means, packed integers, grids and the largest of rows: C equals torch, on each instruction set."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors.sparse import Rows, RowSet
from distcomp.kernels import dct, dispatch, integers, packed_bytes, rotation, rows, two_means
from distcomp.kernels.dct import Grid, Grids
from distcomp.kernels.rows import RowTable
from distcomp.kernels.two_means import SIGNS, Units
from tests.compressors import oracles
from tests.kernels.draws import AWKWARD, same_bits
from tests.kernels.test_cpu import bit_patterns, instruction_set
from tests.kernels.test_many import monkeypatch_context

__all__ = ["instruction_set", "monkeypatch_context"]  # fixtures


def awkward(numel: int, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    """Gaussian values, and some that are not finite, zero or denormal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * magnitude
    for place in torch.randint(0, max(1, numel), (seed % 5,), generator=generator).tolist():
        x[place : place + 1] = AWKWARD[(seed + place) % len(AWKWARD)]
    return x


# ---------------------------------------------------------------------------------------------- two means

PIECES = st.lists(
    st.tuples(
        st.integers(0, 700) | st.sampled_from([4095, 4096, 9000]), st.integers(0, 50), st.integers(1, 5000)
    ),
    min_size=1,
    max_size=4,
)


def units_of(pieces: list[tuple[int, int, int]]) -> Units:
    """From (numel, first, length) of pieces that follow one another."""
    places, at = [], 0
    for numel, first, length in pieces:
        places.append((at, numel, first, length))
        at += numel
    return Units.of(places, at)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 99), sign=st.sampled_from([0, 1, -1]))
def test_two_means(instruction_set, monkeypatch_context, pieces, seed, sign) -> None:
    units = units_of(pieces)
    x = awkward(units.numel, seed)
    ours, theirs = torch.full((units.scale_count,), 7.0), torch.full((units.scale_count,), 7.0)
    two_means.means(x, units, ours)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        two_means.means(x, units, theirs)
    assert same_bits(ours, theirs)
    codes = torch.randint(0, 256, (packed_bytes(units.numel, SIGNS, 1),), dtype=torch.uint8)
    put, plain = x.clone(), x.clone()
    two_means.put(codes, units, ours, put, sign)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        two_means.put(codes, units, ours, plain, sign)
    assert same_bits(put, plain)


# ---------------------------------------------------------------------------------------------- rotations


def test_a_rotation_is_a_product_with_the_matrix_of_hadamard() -> None:
    """Sylvester's: ``H_2n = [[H, H], [H, -H]]``; the signs come off where the same is rotated back."""
    matrix = np.ones((1, 1))
    while len(matrix) < rotation.SIDE:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x, keys = awkward(3 * rotation.SIDE, 0), torch.tensor([5])
    places = [(0, x.numel(), 0, 0)]
    turned = rotation.reference_rotate(x, places, keys, back=False)
    signed = turned.view(3, -1).double().numpy() @ matrix / np.sqrt(rotation.SIDE)
    np.testing.assert_allclose(np.abs(signed), x.view(3, -1).abs().numpy(), atol=1e-5)
    signs = np.sign(signed * x.view(3, -1).numpy())
    assert 150 < (signs > 0).sum() < 234
    again = rotation.reference_rotate(turned, places, keys, back=True)
    torch.testing.assert_close(again, x, atol=1e-5, rtol=0)


def test_the_two_means_are_means() -> None:
    x = awkward(3 * 5000, 0)
    units = units_of([(15_000, 0, 5000)])
    scales = torch.empty(6)
    two_means.means(x, units, scales)
    for row, high, low in zip(x.view(3, 5000).double(), scales[:3], scales[3:], strict=True):
        assert float(high) == pytest.approx(float(row[row >= 0].mean()), rel=1e-6)
        assert float(low) == pytest.approx(float(row[row < 0].mean()), rel=1e-6)


# ------------------------------------------------------------------------------------------- integers, grids


@settings(max_examples=80, deadline=None)
@given(numel=st.integers(0, 40) | st.integers(1020, 3100), bits=st.integers(1, 31), seed=st.integers(0, 99))
def test_packed_integers(instruction_set, monkeypatch_context, numel, bits, seed) -> None:
    codes = torch.randint(0, 2**bits, (numel,), generator=torch.Generator().manual_seed(seed))
    packed = integers.pack_integers(codes, bits)
    assert torch.equal(integers.unpack_integers(packed, numel, bits), codes)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        assert torch.equal(packed, integers.pack_integers(codes, bits))


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    bits=st.integers(2, 23),
    spacing=st.sampled_from([1 / 64, 0.1, 3.0, 1e-7]),
    seed=st.integers(0, 99),
    sign=st.sampled_from([0, 1, -1]),
)
def test_grids(instruction_set, monkeypatch_context, sizes, bits, spacing, seed, sign) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    lines = integers.grid_lines(
        [(at, size, 7 * i) for i, (at, size) in enumerate(zip(starts, sizes, strict=True))]
    )
    keys = array("Q", [seed + 2**40 * i for i in range(len(sizes))])
    x = awkward(sum(sizes), seed, spacing * 2.0 ** (bits / 2))
    codes, plain = (
        torch.full((integers.integer_bytes(len(x), bits),), 0xA5, dtype=torch.uint8) for _ in range(2)
    )
    out, plain_out = x.clone(), x.clone()
    integers.grid_encode(x, codes, lines, keys, spacing, bits)
    integers.grid_decode(codes, out, spacing, bits, sign)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        integers.grid_encode(x, plain, lines, keys, spacing, bits)
        integers.grid_decode(plain, plain_out, spacing, bits, sign)
    assert torch.equal(codes, plain)
    assert same_bits(out, plain_out)


# --------------------------------------------------------------------------------------- the largest of rows


def largest(x: torch.Tensor, count: int) -> list[int]:
    """The oracle: sorted by magnitude, of equal ones the lower place first."""
    magnitudes = (x.view(torch.int32).to(torch.int64) & 0x7FFFFFFF).tolist()
    return sorted(sorted(range(len(magnitudes)), key=lambda j: (-magnitudes[j], j))[:count])


def table_of(shapes: list[tuple[int, int]]) -> RowTable:
    lines, start, place = [], 0, 0
    for length, count in shapes:
        lines.append((start, length, count, place, 0, -2))
        start, place = start + length, place + count
    return RowTable(torch.tensor(lines, dtype=torch.int64).reshape(-1, 6), 0)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 300) | st.sampled_from([4096, 4097]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["any bits", "few values", "one value", "neighbours", "gaussian"]),
)
def test_the_largest_of_each_row(instruction_set, data, lengths, seed, kind) -> None:
    shapes = [(length, data.draw(st.integers(0, length) | st.just(length // 100))) for length in lengths]
    numel = sum(lengths)
    x = bit_patterns(numel, seed) if kind == "any bits" else awkward(numel, seed)
    if kind in ("few values", "one value"):
        x = torch.randint(0, 3 if kind == "few values" else 1, (numel,)).float() - 1
    if kind == "neighbours":  # no two alike, and nothing between the edge and the next
        x = (
            torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
            .to(torch.int32)
            .view(torch.float32)
        )
    table = table_of(shapes)
    places = torch.full((table.ends[1],), -1, dtype=torch.int64)
    rows.top(x, table, places)
    start, at = 0, 0
    for length, count in shapes:
        wanted = [start + j for j in largest(x[start : start + length], count)]
        assert places[at : at + count].tolist() == wanted
        start, at = start + length, at + count


@pytest.mark.parametrize("kind", ["gaussian", "rising", "falling", "ties", "sparse"])
@pytest.mark.parametrize("count", [1, 700, 60_000])
def test_the_largest_of_a_long_row(instruction_set, kind: str, count: int) -> None:
    """Longer than what is searched without a sample, and some whose sample misleads."""
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(count))
    if kind in ("rising", "falling"):
        x = x.abs().sort(descending=kind == "falling").values
    elif kind == "ties":
        x = x.round()
    elif kind == "sparse":
        x *= torch.arange(len(x)) % (16 * 61) >= 16  # the sample sees zeros alone
    places = torch.empty(count, dtype=torch.int64)
    rows.top(x, table_of([(len(x), count)]), places)
    assert places.tolist() == largest(x, count)


# ------------------------------------------------------------------------------------- cosine coefficients

SIDES = st.sampled_from([1, 2, 3, 7, 8, 10, 16, 17, 34, 48, 64, 96])


@st.composite
def grids(draw: st.DrawFn) -> Grids:
    """Some matrices, one after the other."""
    each, at = [], 0
    for _ in range(draw(st.integers(1, 3))):
        high, wide = draw(SIDES), draw(SIDES)
        count = draw(st.integers(1, min(40, high * wide)))
        each.append(Grid(at, draw(st.integers(0, 2)), high, draw(st.integers(1, 2)), wide, count))
        at += each[-1].numel
    return Grids(tuple(each))


@settings(max_examples=40, deadline=None)
@given(chunks=grids(), seed=st.integers(0, 99), sign=st.sampled_from([0, 1, -1]))
def test_cosine_coefficients(instruction_set, monkeypatch_context, chunks, seed, sign) -> None:
    x = torch.randn(chunks.numel, generator=torch.Generator().manual_seed(seed))
    y, back = dct.transform(x, chunks), dct.inverse(x, chunks)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        assert same_bits(y, dct.transform(x, chunks))
        assert same_bits(back, dct.inverse(x, chunks))
    values, places = torch.empty(chunks.count), torch.empty(chunks.count, dtype=torch.int64)
    dct.top(x, chunks, values, places)
    wanted = []
    for one in chunks.each:
        size = one.high * one.wide
        for start in range(one.at, one.at + one.numel, size):
            wanted += [start + j for j in largest(y[start : start + size].contiguous(), one.count)]
    assert places.tolist() == wanted
    assert same_bits(values, y[places])
    out, sparse = x.clone(), torch.zeros_like(x)
    sparse[places] = values
    dct.put(values, places, chunks, out, sign)
    decoded = dct.inverse(sparse, chunks)
    assert same_bits(out, x + decoded if sign > 0 else x - decoded if sign < 0 else decoded)


@pytest.mark.parametrize("side", [1, 7, 16, 34, 48, 61, 64, 128])
def test_cosine_coefficients_are_accurate(side: int) -> None:
    """A transform of float32 whose errors are a few roundings of the largest coefficient, and its inverse."""
    x = torch.randn(side * side, generator=torch.Generator().manual_seed(side))
    chunks = Grids((Grid(0, 1, side, 1, side, 1),))
    matrix = torch.from_numpy(oracles.dct_matrix(side))
    exact = (matrix @ x.double().view(side, side) @ matrix.T).T.reshape(-1)
    y = dct.transform(x, chunks)
    assert float((y - exact).abs().max() / exact.abs().max()) < 1e-6
    assert float((dct.inverse(y, chunks) - x).abs().max()) < 3e-6


@pytest.mark.parametrize("side", [8, 12, 64])
def test_a_chunk_leaves_nothing_to_the_next(instruction_set, monkeypatch_context, side: int) -> None:
    """Coefficients that are not finite, or given twice, or outside their chunk, stay where they are."""
    chunks = Grids((Grid(0, 2, side, 1, side, 4), Grid(2 * side * side, 1, side // 2, 1, side, 2)))
    size, numel = side * side, chunks.numel
    places = torch.tensor(
        [0, 5, side + 3, size - 1, size, size + 1, size + 2, size + 3, 2 * size, 2 * size + 7]
    )
    values = torch.arange(1.0, 11.0)
    values[1:4] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out, y = torch.empty(numel), torch.zeros(numel)
    dct.put(values, places, chunks, out, 0)
    y[places] = values
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        wanted = dct.inverse(y, chunks)
    assert not out[:size].isfinite().any()
    assert same_bits(out[size:], wanted[size:])
    places[0], places[1:4], places[6] = -1, 2**62, size + 1  # nowhere; and twice
    dct.put(values, places, chunks, out, 0)
    assert not out[:size].any()
    y = torch.zeros(numel)
    y[size], y[size + 1], y[size + 3], y[2 * size], y[2 * size + 7] = values[[4, 6, 7, 8, 9]]
    assert same_bits(out, dct.inverse(y, chunks))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 700) | st.just(5000), min_size=1, max_size=4),
    start=st.integers(0, 9),
)
def test_places_are_written_as_torch_writes_them(monkeypatch_context, data, lengths, start) -> None:
    """Of rows of any density: as a bitmap, in wide and in narrow parts, or not at all."""
    shapes = [(length, data.draw(st.integers(0, length) | st.just(length // 100))) for length in lengths]
    starts = [start + sum(lengths[:i]) for i in range(len(lengths))]
    rows_ = RowSet(
        tuple(Rows(at, 1, length, count) for at, (length, count) in zip(starts, shapes, strict=True))
    )
    generator = torch.Generator().manual_seed(sum(lengths))
    drawn = [
        at + torch.randperm(length, generator=generator)[:count].sort().values
        for at, (length, count) in zip(starts, shapes, strict=True)
    ]
    places = torch.cat(drawn)
    codes = rows_.encode(places)
    assert torch.equal(rows_.decode(codes), places)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        assert torch.equal(rows_.encode(places), codes)
        damaged = codes ^ 0x5A
        wanted = rows_.decode(damaged)
    assert torch.equal(rows_.decode(damaged), wanted)
