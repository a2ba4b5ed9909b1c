"""Two means, packed integers, grids and the largest of rows: C equals torch, on each instruction set."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.compressors.sparse import Rows, RowSet
from distcomp.errors import DistcompError
from distcomp.kernels import dct, dispatch, integers, packed_bytes, rotation, rows, two_means
from distcomp.kernels.dct import Grid, Grids
from distcomp.kernels.rows import RowTable
from distcomp.kernels.two_means import SIGNS, Units
from tests.compressors import oracles
from tests.kernels.draws import AWKWARD, same_bits
from tests.kernels.test_cpu import bit_patterns, instruction_set, threads
from tests.kernels.test_many import monkeypatch_context

__all__ = ["instruction_set", "monkeypatch_context", "threads"]  # fixtures

_cpu = pytest.importorskip("distcomp.kernels._cpu", reason="the C extension was not built (no C compiler?)")


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
    codes, plain_codes = torch.full((2, packed_bytes(units.numel, SIGNS, 1)), 0xA5, dtype=torch.uint8)
    two_means.encode(x, units, codes, ours)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        two_means.encode(x, units, plain_codes, theirs)
    assert torch.equal(codes, plain_codes)
    assert same_bits(ours, theirs)
    codes = torch.randint(0, 256, (packed_bytes(units.numel, SIGNS, 1),), dtype=torch.uint8)
    put, plain = x.clone(), x.clone()
    two_means.put(codes, units, ours, put, sign)
    with monkeypatch_context() as patch:
        patch.setattr(dispatch, "forced", lambda: "reference")
        two_means.put(codes, units, ours, plain, sign)
    assert same_bits(put, plain)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 99))
def test_threads_that_share_two_means_change_nothing(threads, monkeypatch_context, pieces, seed) -> None:
    """Each takes the units that begin among its blocks of signs, whose ends are others."""
    units = units_of(pieces)
    x = awkward(units.numel, seed)
    found = []
    for how in ("shared", "reference"):
        codes = torch.full((packed_bytes(units.numel, SIGNS, 1),), 0xA5, dtype=torch.uint8)
        scales = torch.full((units.scale_count,), 7.0)
        with monkeypatch_context() as patch:
            if how == "reference":
                patch.setattr(dispatch, "forced", lambda: "reference")
            two_means.encode(x, units, codes, scales)
        found.append((codes, scales))
    assert torch.equal(found[0][0], found[1][0])
    assert same_bits(found[0][1], found[1][1])


def test_values_are_added_in_the_lanes_of_their_places_in_the_unit(instruction_set) -> None:
    """A unit that lacks its first eight: what is too small beside ``2^60`` shares a lane with it and is lost;
    in another lane it would add up, and the mean would no longer be half-way between two floats."""
    x = torch.full((56,), -1.0)
    x[2:9] = x[20:32] = x[36:44] = 0.0
    x[0], x[1], x[16], x[32], x[48] = 2.0**60, 2.0**36, 2.0**7, 2.0**7, 2.0**7
    units = units_of([(56, 8, 64)])
    codes, scales = torch.empty(7, dtype=torch.uint8), torch.empty(2)
    two_means.encode(x, units, codes, scales)
    assert int((x >= 0).sum()) == 32
    assert scales.tolist() == [2.0**55, -1.0]


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 8, 9, 15, 4095, 4096, 4097, 8191, 8205])
def test_a_sign_is_a_bit_of_its_plane_and_nothing_else_is_touched(instruction_set, numel: int) -> None:
    """The oracle: bit p of byte j of a block of m is its element ``j + p * ceil(m / 8)``."""
    x = awkward(numel, 4)
    units = units_of([(numel, 3, 1000)])
    count, scale_count = packed_bytes(numel, SIGNS, 1), units.scale_count
    codes, scales = torch.full((count + 64,), 0xA5, dtype=torch.uint8), torch.full((scale_count + 16,), 7.0)
    two_means.encode(x, units, codes[32 : 32 + count], scales[8 : 8 + scale_count])
    wanted = bytearray(count)
    for k, value in enumerate(x.tolist()):
        block, place = divmod(k, SIGNS)
        height = -(-min(SIGNS, numel - block * SIGNS) // 8)
        wanted[block * SIGNS // 8 + place % height] |= (value >= 0) << place // height
    assert bytes(codes[32 : 32 + count].tolist()) == bytes(wanted)
    assert codes[:32].eq(0xA5).all()
    assert codes[32 + count :].eq(0xA5).all()
    assert scales[:8].eq(7).all()
    assert scales[8 + scale_count :].eq(7).all()


def test_a_run_of_two_means_writes_what_begins_in_it_and_nothing_else(instruction_set) -> None:
    x, table = torch.ones(5000), units_of([(5000, 0, 500)]).table
    runs = (((0, 4096), slice(0, 9), slice(0, 512)), ((4096, 904), slice(9, 10), slice(512, 625)))
    for run, units, signs in runs:
        codes, scales = torch.zeros(625, dtype=torch.uint8), torch.full((20,), 7.0)
        at = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
        _cpu.encode_two_means(*at, (5000, 625, 20), table.data_ptr(), 1, *run)
        wanted = torch.zeros(625, dtype=torch.uint8)
        wanted[signs] = 0xFF
        assert torch.equal(codes, wanted)
        means = torch.full((2, 10), 7.0)
        means[:, units] = torch.tensor([[1.0], [0.0]])
        assert torch.equal(scales.view(2, 10), means)


def test_two_means_that_reach_outside_their_buffers_are_refused() -> None:
    """5000 values are 4096 and 904: 512 and 113 bytes of signs; two units of 2500, four means."""
    x, codes, scales = torch.zeros(5000), torch.zeros(625, dtype=torch.uint8), torch.zeros(4)
    units, fits = units_of([(5000, 0, 2500)]), (5000, 625, 4)

    def call(sizes=fits, line=(0, 5000, 0, 2500, 0, 2), run=(0, 5000)) -> None:
        table = torch.tensor([line], dtype=torch.int64)
        at = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
        _cpu.encode_two_means(*at, sizes, table.data_ptr(), 1, *run)

    for run in ((0, 5000), (0, 4096), (4096, 904), (4096, 0)):
        call(run=run)
    for sizes, what in (
        ((4999, 625, 4), "outside its buffers"), ((5000, 624, 4), "more values than signs"),
        ((5000, 625, 3), "outside its buffers"), ((-1, 625, 4), "outside its buffers"),
        ((2**63 - 1, 625, 4), "more values than signs"), ((5000, -1, 4), "more values than signs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            call(sizes)
    for column in range(6):
        for place in (1, -1, 2**62, -(2**62)):
            line = [0, 5000, 0, 2500, 0, 2]
            line[column] += place
            if (column, place) in ((1, -1), (3, 1)):
                continue  # a value fewer, or units that are longer by one
            with pytest.raises(ValueError, match="outside its buffers"):
                call(line=tuple(line))
    for run in ((1, 4999), (-4096, 4096), (0, 4095), (4096, 905), (8192, 0), (0, -1), (0, 2**63 - 1)):
        with pytest.raises(ValueError, match="cuts a block of signs"):
            call(run=run)
    for wrong in ((x[:4999], codes, scales), (x, codes[:624], scales), (x, codes, scales[:3])):
        with pytest.raises(DistcompError, match="are needed"):
            two_means.encode(wrong[0], units, *wrong[1:])


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
    codes, scales = torch.empty(packed_bytes(15_000, SIGNS, 1), dtype=torch.uint8), torch.empty(6)
    two_means.encode(x, units, codes, scales)
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
