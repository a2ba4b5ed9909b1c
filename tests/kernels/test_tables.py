"""Tables that lie: a line that reaches outside its buffers is refused; others touch nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import lowrank, rows
from distcomp.kernels.packing import packed_bytes, scale_count
from distcomp.kernels.pieces import Moves, Pieces, dequantize, move, quantize
from distcomp.kernels.rows import BITMAP, NOTHING, RowTable
from distcomp.kernels.tables import lines_of

_cpu = pytest.importorskip("distcomp.kernels._cpu")

SIZE, GUARD, WIDEST = 40, 64, 15
"""Elements of every buffer; of what lies around it; the widest index within its chunk."""
NUMBER = st.one_of(
    st.integers(-2, SIZE + 2),
    st.sampled_from([2**62, 2**63 - 1, -(2**63), 2**31, 2**61, 2**63 - SIZE, 1 - 2**63]),
)
"""A number of a line: mostly one that may fit, sometimes one that overflows."""


def lines(width: int, likely: Sequence[st.SearchStrategy[int]]) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Tables of a few lines, each number of which is likely to fit, or any number."""
    line = st.tuples(*(st.one_of(one, one, one, NUMBER) for one in likely))
    assert len(likely) == width
    return st.lists(line, min_size=1, max_size=3)


class Guarded:
    """A buffer of :data:`SIZE` elements within a larger one, whose rest must stay as it is."""

    def __init__(self, dtype: torch.dtype, value: int) -> None:
        self.whole = torch.full((SIZE + 2 * GUARD,), value, dtype=dtype)
        self.inner = self.whole[GUARD : GUARD + SIZE]
        self.value = value

    @property
    def is_whole(self) -> bool:
        return bool((torch.cat([self.whole[:GUARD], self.whole[-GUARD:]]) == self.value).all())


def follow(call: Callable[[int, int], None], table: Tensor, fits: bool, buffers: Sequence[Guarded]) -> None:
    """Hand the table to C: it refuses it unless all of it fits, and never touches what lies around."""
    if fits:
        call(table.data_ptr(), len(table))
    else:
        with pytest.raises(ValueError, match="outside its buffers"):
            call(table.data_ptr(), len(table))
    assert all(one.is_whole for one in buffers)


def fit(at: int, count: int, size: int = SIZE) -> bool:
    return at >= 0 and count >= 0 and at + count <= size


SMALL, AT = st.integers(0, 12), st.integers(0, 30)


@settings(deadline=None, max_examples=100)
@given(
    table=lines(5, [AT, SMALL, AT, AT, st.just(0)]), bits=st.integers(1, 8), block=st.integers(1, 9) | NUMBER
)  # fmt: skip
@example(table=[(0, 40, 0, 0, 0)], bits=8, block=2**63 - 1)
@example(table=[(0, 2**63 - 1, 0, 0, 0)], bits=7, block=1)
def test_pieces(table, bits, block) -> None:
    x, codes = Guarded(torch.float32, 3), Guarded(torch.uint8, 3)
    scales = Guarded(torch.float32, 3)
    at = [one.inner.data_ptr() for one in (x, codes, scales)]
    lies = torch.tensor(table, dtype=torch.int64)
    keys = torch.zeros(len(table), dtype=torch.int64)
    fits = block > 0 and all(
        fit(first, numel)
        and fit(code, packed_bytes(numel, block, bits))
        and fit(scale, scale_count(numel, block))
        for first, numel, code, scale, _ in table
    )

    def encode(lines_at: int, count: int) -> None:
        given = (keys.data_ptr(), block, bits, True, 0, False, (0, 0))
        _cpu.quantize_pieces(*at, (SIZE, SIZE, SIZE), lines_at, count, *given)

    def decode(lines_at: int, count: int) -> None:
        _cpu.dequantize_pieces(*at, (SIZE, SIZE, SIZE), lines_at, count, block, bits, False, 1, 1.0, 0)

    for call in (encode, decode):
        if block > 0:
            follow(call, lies, fits, [x, codes, scales])
        else:
            with pytest.raises(ValueError, match="cannot be"):
                call(lies.data_ptr(), len(lies))


@settings(deadline=None, max_examples=100)
@given(table=lines(3, [AT, AT, SMALL]))
@example(table=[(2**63 - 1, 0, 2)])
def test_moves(table) -> None:
    source, target = Guarded(torch.float32, 3), Guarded(torch.float32, 4)
    fits = all(fit(begin, numel) and fit(to, numel) for begin, to, numel in table)
    at = source.inner.data_ptr(), target.inner.data_ptr()
    follow(
        lambda lines_at, count: _cpu.move(*at, (SIZE, SIZE), lines_at, count),
        torch.tensor(table, dtype=torch.int64), fits, [source, target],
    )  # fmt: skip


WIDTHS = st.sampled_from([BITMAP, NOTHING, 0, 1, 2, 5, WIDEST])


def row_fits(start: int, length: int, count: int, place: int) -> bool:
    return fit(start, length, 2**63 - 1) and count <= length and fit(place, count)


def coded_bytes(length: int, count: int, width: int) -> int | None:
    """The bytes that say which elements of a row are sent; None for a row that none can say it of."""
    if width == NOTHING:
        return 0
    if not NOTHING < width <= WIDEST or length == 0:
        return None
    if width == BITMAP:
        return packed_bytes(length, length, 1)
    high = count + (length - 1 >> width)
    low = 0 if width == 0 or count == 0 else packed_bytes(count, count, min(width, WIDEST))
    return low + -(-high // 8)


@settings(deadline=None, max_examples=100)
@given(
    table=lines(6, [AT, SMALL, st.integers(0, 4), AT, AT, WIDTHS]),
    inside=st.lists(st.integers(0, 11) | NUMBER, min_size=SIZE, max_size=SIZE),
)
@example(table=[(0, 0, 0, 0, 0, 0)], inside=[0] * SIZE)
@example(table=[(0, 2**63 - 1, 2, 0, 0, 0)], inside=[0] * SIZE)
@example(table=[(0, 12, 2, 0, 0, BITMAP)], inside=[13] * SIZE)
@example(table=[(2**63 - 1, 1, 1, 0, 0, NOTHING)], inside=[0] * SIZE)
def test_rows(table, inside) -> None:
    x, places, codes = Guarded(torch.float32, 3), Guarded(torch.int64, 3), Guarded(torch.uint8, 3)
    lies, buffers = torch.tensor(table, dtype=torch.int64), [x, places, codes]
    x_at, places_at, codes_at = (one.inner.data_ptr() for one in buffers)
    possible = all(row_fits(*line[:4]) for line in table)
    follow(
        lambda at, count: _cpu.top_rows(x_at, places_at, (SIZE, SIZE), at, count),
        lies, possible and all(fit(start, length) for start, length, *_ in table), buffers,
    )  # fmt: skip
    coded = [(code, coded_bytes(length, count, width)) for _, length, count, _, code, width in table]
    fits = possible and all(number is not None and fit(code, number) for code, number in coded)
    follow(
        lambda at, count: _cpu.read_rows(places_at, codes_at, (SIZE, SIZE), at, count), lies, fits, buffers
    )
    if fits:  # whatever the bytes were, they give places of their row
        for start, length, count, place, _, _ in table[-1:]:
            assert all(start <= at < start + length for at in places.inner[place : place + count].tolist())
    places.inner.copy_(torch.tensor(inside, dtype=torch.int64))
    legal = fits and all(
        start <= at < start + length
        for start, length, count, place, _, _ in table
        for at in inside[place : place + count]
    )
    follow(
        lambda at, count: _cpu.write_rows(places_at, codes_at, (SIZE, SIZE), at, count), lies, legal, buffers
    )


def reaches(number: int, columns: int, at: int) -> bool:
    return number >= 0 and columns >= 0 and fit(at, number * columns)


SIDE = st.integers(0, 6)


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(["rows", "columns", "outer"]),
    table=lines(7, [st.integers(0, 3), SIDE, SIDE, AT, AT, AT, AT]),
    subtract=st.booleans(),
)
@example(kind="outer", table=[(9, 1, 1, 0, 0, 0, 0)], subtract=False)
@example(kind="rows", table=[(2**32, 2**32, 2**32, 0, 0, 0, 0)], subtract=False)
def test_products(kind, table, subtract) -> None:
    buffers = [Guarded(torch.float32, 3) for _ in range(4)]
    at = [one.inner.data_ptr() for one in buffers]

    def line_fits(rank: int, a: int, b: int, p: int, q: int, m: int, out: int) -> bool:
        offsets = all(fit(one, 0) for one in (p, q, m, out)) and min(rank, a, b) >= 0
        read = {
            "rows": reaches(rank, b, q) and reaches(a, b, m) and reaches(rank, a, out),
            "columns": reaches(rank, a, p) and reaches(a, b, m) and reaches(rank, b, out),
            "outer": rank <= lowrank.FEW
            and reaches(rank, a, p)
            and reaches(rank, b, q)
            and reaches(a, b, out),
        }
        return offsets and read[kind]

    fits = all(line_fits(*line) for line in table)
    follow(
        lambda lines_at, count: _cpu.lowrank_pieces(kind, *at, lines_at, count, subtract, (SIZE,) * 4),
        torch.tensor(table, dtype=torch.int64), fits, buffers,
    )  # fmt: skip


def test_functions_around_c_pass_the_refusal_on() -> None:
    """Tables whose largest end fits, and whose lines do not."""
    x, codes, scales = torch.zeros(16), torch.zeros(64, dtype=torch.uint8), torch.zeros(16)
    hostile = Pieces.of([(0, 16, 0), (-8, 8, 0)], 8, 4)
    for call in (
        lambda: quantize(x, codes, scales, hostile, [1, 2]),
        lambda: dequantize(codes, scales, x, hostile),
        lambda: move(x, torch.zeros(16), Moves(((0, 0, 8), (-8, 8, 8)))),
        lambda: move(x, torch.zeros(16), Moves(((0, 0, 16), (12, -4, 4)))),
        lambda: lowrank.each_outer(
            torch.zeros(2), torch.zeros(4), x, lowrank.Products(((1, 2, 4, -8),))
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="outside its buffers"):
            call()


def test_a_table_that_is_none_is_not_read() -> None:
    x, places = torch.zeros(16), torch.zeros(16, dtype=torch.int64)
    for lines_, sentence in (
        (torch.zeros(2, 5, dtype=torch.int64), "6 columns"),
        (torch.zeros(2, 6, dtype=torch.int32), "of torch.int64 are needed"),
        (torch.zeros(6, 2, dtype=torch.int64).T, "contiguous"),
        (torch.tensor(3, dtype=torch.int64), "6 columns"),
    ):
        with pytest.raises(DistcompError, match=sentence):
            lines_of(lines_, rows.LINE_BYTES)
    with pytest.raises(DistcompError, match="6 columns"):
        rows.read_indices(places[:0].byte(), RowTable(torch.zeros(0, 5, dtype=torch.int64), 0), places)
    assert not x.any()
