"""Which few elements to send, and how to say which: selection and index codes for every sparsifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.errors import DistcompError
from distcomp.kernels import reference
from distcomp.kernels import rows as kernel
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.packing import block_bytes
from distcomp.kernels.rows import BITMAP, NOTHING, RowTable
from distcomp.layout import Layout
from distcomp.randomness import Key

SAMPLED_FROM = 2**16
"""Rows longer than this are permuted without being written down."""

MAX_WIDTH = 15
"""Widest packed integer (:mod:`distcomp.kernels.packing`)."""


def check_ratio(ratio: float) -> None:
    """Raises DistcompError for a density outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise DistcompError(
            f"a density lies above 0 and at most at 1, not {ratio}; 0.01 sends one value in a hundred"
        )


def kept_count(numel: int, ratio: float) -> int:
    """How many of ``numel`` elements are sent: ``ratio`` of them, one at least."""
    return min(numel, max(1, round(ratio * numel)))


def kept_layout(layout: Layout, counts: list[int]) -> Layout:
    """The layout of the values that are sent, parameter by parameter."""
    return Layout.of(
        [(param.name, (count,)) for param, count in zip(layout.slices, counts, strict=True)],
        {param.name: param.role for param in layout.slices},
    )


# ------------------------------------------------------------------------------------------- how to say which


@dataclass(frozen=True)
class IndexCode:
    """``count`` rising integers below ``universe``, in a number of bytes that depends on these two alone.

    The universe is cut into chunks of ``2^w``. An index is sent as its place within its chunk, ``w`` bits,
    and how many fall into each chunk is sent in unary, one bit per index and one per chunk::

        count w + count + universe / 2^w  bits         (about 2 + log2(universe / count) per index)

    ``w`` is the width that makes this least; a bitmap (``universe`` bits) is sent where it is smaller, and
    nothing at all where every element is sent. At 1 % an index takes 9 bits instead of 12 within chunks of
    4096, or 32.

    Source: Elias, "Efficient storage and retrieval by content and address of static files", JACM 1974; Fano
    1971.
    """

    universe: int
    count: int

    @property
    def width(self) -> int | None:
        """Bits of an index within its chunk; None where a bitmap is smaller."""
        return _best_width(self.universe, self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of one row's indices; 0 where none or all of the elements are sent."""
        if self.count in (0, self.universe):
            return 0
        return _code_bytes(self.universe, self.count, self.width)

    def encode(self, indices: Tensor) -> Tensor:
        """``[rows, count]`` int64, rising in each row -> ``[rows, nbytes]`` uint8."""
        rows, width = indices.shape[0], self.width
        if self.nbytes == 0:
            return torch.empty(rows, 0, dtype=torch.uint8, device=indices.device)
        if width is None:
            return _ones_at(indices, self.universe)
        # Rising indices lie in rising chunks; with its ordinal added no two of them fall on one bit, and the
        # zeros between the ones say in unary where a chunk ends.
        ordinal = torch.arange(self.count, device=indices.device)
        high = _ones_at((indices >> width) + ordinal, _unary_bits(self.universe, self.count, width))
        if width == 0:
            return high
        return torch.cat([reference.pack_codes(indices & (2**width - 1), width), high], dim=1)

    def decode(self, code: Tensor) -> Tensor:
        """``[rows, nbytes]`` -> ``[rows, count]``. Bytes that no encoder made give legal indices, too."""
        width = self.width
        ordinal = torch.arange(self.count, device=code.device)
        if self.nbytes == 0:
            return ordinal.expand(code.shape[0], -1)
        if width is None:
            return _places_of_ones(code, self.universe, self.count)
        low_bytes = block_bytes(self.count, width)
        high = _places_of_ones(code[:, low_bytes:], _unary_bits(self.universe, self.count, width), self.count)
        indices = (high - ordinal) << width
        if width:
            indices |= reference.unpack_codes(code[:, :low_bytes], self.count, width)
        return indices.clamp_(0, self.universe - 1)  # of damaged bytes; nobody indexes outside a buffer


def _unary_bits(universe: int, count: int, width: int) -> int:
    return count + ((universe - 1) >> width)


def _code_bytes(universe: int, count: int, width: int | None) -> int:
    if width is None:
        return block_bytes(universe, 1)
    return block_bytes(count, width) + block_bytes(_unary_bits(universe, count, width), 1)


@lru_cache(maxsize=1 << 12)
def _best_width(universe: int, count: int) -> int | None:
    widths: list[int | None] = [None, *range(MAX_WIDTH + 1)]
    return min(widths, key=lambda width: _code_bytes(universe, count, width))


def _ones_at(places: Tensor, length: int) -> Tensor:
    """Rows of ``length`` bits, packed, that are one at ``places``."""
    bits = torch.zeros(places.shape[0], length, dtype=torch.uint8, device=places.device)
    return reference.pack_codes(bits.scatter_(1, places, 1), 1)


def _places_of_ones(packed: Tensor, length: int, count: int) -> Tensor:
    """Where the first ``count`` ones of each row are. Waits for no device: the number of ones is known."""
    bits = reference.unpack_codes(packed, length, 1)
    rank = torch.where(bits == 1, bits.cumsum(1) - 1, count).clamp_(max=count)
    places = torch.zeros(packed.shape[0], count + 1, dtype=torch.int64, device=packed.device)
    places.scatter_(1, rank, torch.arange(length, device=packed.device).expand_as(rank))
    return places[:, :count]


# ------------------------------------------------------------------------------------------------------ which


@dataclass(frozen=True)
class Rows:
    """Rows of one length, at ``start`` in a flat buffer, of which each sends ``count`` elements."""

    start: int
    rows: int
    length: int
    count: int

    def view(self, buffer: Tensor) -> Tensor:
        """The rows in a flat buffer: ``[rows, length]``."""
        return buffer[self.start : self.start + self.rows * self.length].view(self.rows, self.length)

    @property
    def code(self) -> IndexCode:
        """How a row says which of its elements it sends."""
        return IndexCode(self.length, self.count)

    def in_rows(self, places: Tensor) -> Tensor:
        """From places in the flat buffer to places in the rows, ``[rows, count]``."""
        first = torch.arange(self.rows, device=places.device) * self.length + self.start
        return places.view(self.rows, self.count) - first[:, None]

    def in_buffer(self, indices: Tensor) -> Tensor:
        """From places in the rows to places in the flat buffer, flat."""
        first = torch.arange(self.rows, device=indices.device) * self.length + self.start
        return (indices + first[:, None]).view(-1)


@dataclass(frozen=True)
class RowSet:
    """Rows of many lengths, which follow one another: what of each is sent, and the bytes that say what."""

    each: tuple[Rows, ...]

    @cached_property
    def code_bytes(self) -> int:
        """Bytes that say which elements are sent, of all rows."""
        return sum(rows.rows * rows.code.nbytes for rows in self.each)

    @cached_property
    def count(self) -> int:
        """How many elements are sent."""
        return sum(rows.rows * rows.count for rows in self.each)

    def largest(self, x: Tensor) -> Tensor:
        """Where the largest magnitudes of each row are in a flat buffer (int64), row after row, rising."""
        if not served_by_c(x):
            return _concatenated(
                [rows.in_buffer(top_indices(rows.view(x), rows.count)) for rows in self.each], x
            )
        places = torch.empty(self.count, dtype=torch.int64)
        kernel.top(x.contiguous(), self._table, places)
        return places

    def encode(self, places: Tensor) -> Tensor:
        """The bytes (uint8) that say which elements of the flat buffer ``places`` are."""
        if served_by_c(places):
            codes = torch.empty(self.code_bytes, dtype=torch.uint8)
            kernel.write_indices(places.contiguous(), self._table, codes)
            return codes
        written = []
        for rows, part in zip(
            self.each, torch.split(places, [rows_.rows * rows_.count for rows_ in self.each]), strict=True
        ):
            written.append(rows.code.encode(rows.in_rows(part)).reshape(-1))
        return _concatenated(written, torch.empty(0, dtype=torch.uint8, device=places.device))

    def decode(self, codes: Tensor) -> Tensor:
        """What :meth:`encode` was given."""
        if served_by_c(codes):
            places = torch.empty(self.count, dtype=torch.int64)
            kernel.read_indices(codes.contiguous(), self._table, places)
            return places
        parts = torch.split(codes, [rows.rows * rows.code.nbytes for rows in self.each])
        read = [
            rows.in_buffer(rows.code.decode(part.view(rows.rows, rows.code.nbytes)))
            for rows, part in zip(self.each, parts, strict=True)
        ]
        return _concatenated(read, codes)

    @cached_property
    def _table(self) -> RowTable:
        """All rows for C."""
        # Six numbers a row, as the C kernel reads them: begin, length, count, where its places and its code
        # begin, and how it is coded.
        lines, place_at, code = [torch.empty(0, 6, dtype=torch.int64)], 0, 0
        for rows in self.each:
            number, size = torch.arange(rows.rows), rows.code.nbytes
            table = torch.empty(rows.rows, 6, dtype=torch.int64)
            table[:, 0] = rows.start + number * rows.length
            table[:, 1], table[:, 2] = rows.length, rows.count
            table[:, 3], table[:, 4] = place_at + number * rows.count, code + number * size
            width = rows.code.width
            table[:, 5] = NOTHING if size == 0 else BITMAP if width is None else width
            lines.append(table)
            place_at, code = place_at + rows.rows * rows.count, code + rows.rows * size
        return RowTable(torch.cat(lines), code)


def _concatenated(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=like.device)


def rows_of(layout: Layout, ratio: float, chunk: int) -> RowSet:
    """A flat buffer as rows: each parameter is one, or (``chunk > 0``) its chunks and a shorter last one."""
    return layout.remember(("rows", ratio, chunk), lambda: RowSet(tuple(_rows_of(layout, ratio, chunk))))


def _rows_of(layout: Layout, ratio: float, chunk: int) -> Iterator[Rows]:
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        length = chunk or max(1, param.numel)
        whole, rest = divmod(param.numel, length)
        if whole:
            yield Rows(at, whole, length, kept_count(length, ratio))
        if rest:
            yield Rows(at + whole * length, 1, rest, kept_count(rest, ratio))


def top_indices(rows: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest magnitudes of each row, rising; ties go to the lower index.

    ``[rows, length]`` float32 -> ``[rows, count]`` int64. Magnitudes are compared as the integers that their
    bits are, an order without exceptions: a NaN is larger than an infinity.
    """
    if count == rows.shape[1]:
        return torch.arange(count, device=rows.device).expand(rows.shape[0], -1)
    return _top_exactly(reference.magnitudes(rows), count)


def _top_exactly(magnitude: Tensor, count: int) -> Tensor:
    """``torch.topk`` with ties settled. On a CPU only rows with a tie at the edge take the slower road."""
    if magnitude.device.type != "cpu":
        return _top_by_keys(magnitude, count)
    top = magnitude.topk(count, dim=1, sorted=False)
    indices = top.indices.sort(dim=1).values
    tied = ((magnitude >= top.values.amin(1, keepdim=True)).sum(1) > count).nonzero().view(-1)
    if tied.numel():
        indices[tied] = _top_by_keys(magnitude[tied], count)
    return indices


def _top_by_keys(magnitude: Tensor, count: int) -> Tensor:
    """One integer holds magnitude and place, so that no two are equal and the lower place wins a tie."""
    length = magnitude.shape[1]
    # On a GPU topk breaks ties as it likes, and ranks must not differ.
    fall = torch.arange(length - 1, -1, -1, device=magnitude.device)
    keys = (magnitude.to(torch.int64) << 32) | fall
    return keys.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


# ------------------------------------------------------------------------------------------- random selection


def sample_indices(numel: int, count: int, key: Key) -> Tensor:
    """``count`` different places below ``numel``, each equally likely: a function of the key alone (CPU).

    Short rows are sorted by a keyed hash. Long ones are the images of 0, 1, ..., count-1 under a keyed
    permutation (six rounds of a Feistel network, walked until they fall below ``numel``), so that the cost is
    that of ``count``.
    """
    if numel <= SAMPLED_FROM:
        noise = reference.uniform(numel, key.bits, 0, torch.device("cpu"))
        return noise.sort(stable=True).indices[:count]
    return kernels.permuted(count, numel, _keys(key))


def _keys(key: Key) -> tuple[int, ...]:
    """Of the six half rounds."""
    halves = ((half, number) for number in range(3) for half in ("high", "low"))
    return tuple(key.fold(half, number).bits for half, number in halves)
