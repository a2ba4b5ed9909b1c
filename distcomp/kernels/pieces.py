"""Many pieces of one buffer in one call: what a step costs grows with its bytes, not with its names.

Each function equals its twin in :mod:`distcomp.kernels` (or a copy), piece by piece, bit for bit; where the C
extension does not serve, that is what it is. The tables that say where pieces lie are made once per layout.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.packing import NORMS, block_bytes, packed_bytes, scale_count
from distcomp.kernels.tables import check_tensor, lines_of

LARGE = 1 << 18
"""Elements: a piece of more is several lines of the table."""
PIECE_BYTES, MOVE_BYTES = 40, 24
"""A line of the tables that C reads."""


@dataclass(frozen=True)
class Piece:
    """One parameter's piece: ``numel`` elements at ``at`` of the flat buffer, the first of which is element
    ``first`` of its parameter; its codes and scales begin at ``codes`` and ``scales``."""

    at: int
    numel: int
    codes: int
    scales: int
    first: int


@dataclass(frozen=True)
class Pieces:
    """The pieces of a flat buffer that are quantized alike, and where their codes and scales lie."""

    each: tuple[Piece, ...]
    block: int
    bits: int
    powers: bool = False
    """Whether levels are powers of two."""

    @staticmethod
    def of(places: Sequence[tuple[int, int, int]], block: int, bits: int, powers: bool = False) -> Pieces:
        """From ``(at, numel, first)`` of each piece: codes and scales follow one another."""
        pieces, codes, scales = [], 0, 0
        for at, numel, first in places:
            if first % block:
                raise DistcompError(
                    f"first={first} is not a multiple of block={block}; split only between blocks"
                )
            pieces.append(Piece(at, numel, codes, scales, first))
            codes += packed_bytes(numel, block, bits)
            scales += scale_count(numel, block)
        return Pieces(tuple(pieces), block, bits, powers)

    @cached_property
    def numel(self) -> int:
        """Up to where the flat buffer is touched."""
        return max((piece.at + piece.numel for piece in self.each), default=0)

    @cached_property
    def code_bytes(self) -> int:
        return sum(packed_bytes(piece.numel, self.block, self.bits) for piece in self.each)

    @cached_property
    def scale_count(self) -> int:
        return sum(scale_count(piece.numel, self.block) for piece in self.each)

    @cached_property
    def lines(self) -> Lines:
        """The table that C reads: large pieces are several lines, which threads may share."""
        cut = [(index, part) for index, one in enumerate(self.each) for part in self._cut(one)]
        return Lines(tuple(index for index, _ in cut), tuple(part for _, part in cut))

    def _cut(self, one: Piece) -> Iterator[Piece]:
        """Parts of a piece, of whole blocks."""
        rows = max(1, LARGE // self.block)
        code_bytes = rows * block_bytes(self.block, self.bits)
        for number, start in enumerate(range(0, one.numel, rows * self.block)):
            numel = min(rows * self.block, one.numel - start)
            codes, scales = one.codes + number * code_bytes, one.scales + number * rows
            yield Piece(one.at + start, numel, codes, scales, one.first + start)

    def views(self, index: int, x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One piece's values, codes and scales."""
        one = self.each[index]
        code_bytes, blocks = (
            packed_bytes(one.numel, self.block, self.bits),
            scale_count(one.numel, self.block),
        )
        return (
            x[one.at : one.at + one.numel],
            codes[one.codes : one.codes + code_bytes],
            scales[one.scales : one.scales + blocks],
        )


class Lines:
    """Parts of pieces as C reads them, and of which piece each is."""

    def __init__(self, owners: tuple[int, ...], parts: tuple[Piece, ...]) -> None:
        self.owners = owners
        rows = [(one.at, one.numel, one.codes, one.scales, one.first) for one in parts]
        self._table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        self._at, _ = lines_of(self._table, PIECE_BYTES)
        *self._starts, self._numel = accumulate((one.numel for one in parts), initial=0)

    def shared(self, run: Callable[[int, int, int], None]) -> None:
        """``run(table, lines, first)`` for all lines from the address of one on, a thread for nearly equal
        shares of their elements."""
        from distcomp.kernels import cpu

        if cpu.alone(4 * self._numel):
            run(self._at, len(self.owners), 0)
            return

        def share(start: int, count: int) -> None:
            first, end = (bisect_left(self._starts, place) for place in (start, start + count))
            if first < end:
                run(self._at + PIECE_BYTES * first, end - first, first)

        cpu.shared(share, self._numel, 1, 4)


def quantize(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    pieces: Pieces,
    keys: Sequence[int] = (),
    *,
    stochastic: bool = True,
    norm: str = "max",
) -> None:
    """:func:`distcomp.kernels.quantize` of each piece, with the key of the same index (none where nothing is
    random)."""
    _check(x, codes, scales, pieces)
    _check_keys(keys, pieces)
    if served_by_c(x):
        _quantize_in_c(x, codes, scales, pieces, keys, (stochastic, NORMS.index(norm)), (0, 0))
        return
    for i in range(len(pieces.each)):
        kernels.quantize(
            *pieces.views(i, x, codes, scales),
            block=pieces.block,
            bits=pieces.bits,
            key=keys[i] if keys else 0,
            first=pieces.each[i].first,
            stochastic=stochastic,
            norm=norm,
            powers=pieces.powers,
        )


def quantize_owing(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    pieces: Pieces,
    keys: Sequence[int] = (),
    *,
    owing: tuple[Tensor, Tensor],
    stochastic: bool = True,
    norm: str = "max",
) -> None:
    """:func:`quantize` of ``x + residual``; what its codes do not stand for goes into ``owed``.

    ``owing``: residual and owed, neither of which is ``x`` or the other. A step of error feedback, with the
    same bits as adding, quantizing and subtracting what was decoded; in C one pass.
    """
    residual, owed = owing
    for what, tensor in (("residual's values", residual), ("values owed", owed)):
        check_tensor(what, tensor, torch.float32, x.numel())
    if not served_by_c(x):
        torch.add(x, residual, out=owed)
        quantize(owed, codes, scales, pieces, keys, stochastic=stochastic, norm=norm)
        dequantize(codes, scales, owed, pieces, subtract=True)
        return
    _check(x, codes, scales, pieces)
    _check_keys(keys, pieces)
    addresses = residual.data_ptr(), owed.data_ptr()
    _quantize_in_c(x, codes, scales, pieces, keys, (stochastic, NORMS.index(norm)), addresses)


def _quantize_in_c(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    pieces: Pieces,
    keys: Sequence[int],
    how: tuple[bool, int],
    owing: tuple[int, int],
) -> None:
    """All pieces in one call, or one of each thread."""
    from distcomp.kernels import _cpu

    lines = pieces.lines
    all_keys = array("Q", [keys[i] for i in lines.owners] if keys else bytes(8 * len(lines.owners)))
    coded, keys_at = _coded(x, codes, scales), all_keys.buffer_info()[0]

    def run(table: int, count: int, first: int) -> None:
        _cpu.quantize_pieces(
            *coded, table, count, keys_at + 8 * first, pieces.block, pieces.bits, *how, pieces.powers, owing
        )

    lines.shared(run)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    pieces: Pieces,
    *,
    add: bool = False,
    subtract: bool = False,
) -> None:
    """:func:`distcomp.kernels.dequantize` of each piece."""
    _check(out, codes, scales, pieces)
    if add and subtract:
        raise DistcompError("dequantize was asked to add and to subtract at once; choose one")
    if not served_by_c(out):
        for i in range(len(pieces.each)):
            piece_out, piece_codes, piece_scales = pieces.views(i, out, codes, scales)
            kernels.dequantize(
                piece_codes, piece_scales, piece_out,
                block=pieces.block, bits=pieces.bits, powers=pieces.powers, add=add, subtract=subtract,
            )  # fmt: skip
        return
    from distcomp.kernels import _cpu

    coded, sign = _coded(out, codes, scales), int(add) - int(subtract)

    def run(table: int, count: int, _: int) -> None:
        _cpu.dequantize_pieces(*coded, table, count, pieces.block, pieces.bits, pieces.powers, sign, 1.0, 0)

    pieces.lines.shared(run)


def dequantize_onto(
    base: Tensor, codes: Tensor, scales: Tensor, out: Tensor, pieces: Pieces, times: float
) -> None:
    """``out = base + times * values``, product and sum rounded once, of what codes and scales stand for: one
    pass of C, which has to serve ``out``; ``base`` is another tensor."""
    _check(out, codes, scales, pieces)
    check_tensor("base's values", base, torch.float32, out.numel())
    from distcomp.kernels import _cpu

    coded, about = _coded(out, codes, scales), (pieces.block, pieces.bits, pieces.powers)

    def run(table: int, count: int, _: int) -> None:
        _cpu.dequantize_pieces(*coded, table, count, *about, 0, times, base.data_ptr())

    pieces.lines.shared(run)


def dequantize_mean(
    sources: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    pieces: Pieces,
    own: tuple[int, Tensor] | None = None,
) -> None:
    """The mean of what several codes and scales stand for, added in the order given; the one of number
    ``own[0]`` is ``own[1]`` as it is: one pass of C, which has to serve ``out``."""
    for codes, scales in sources:
        _check(out, codes, scales, pieces)
    if own is not None:
        check_tensor("own values", own[1], torch.float32, pieces.numel)
    from distcomp.kernels import _cpu

    places = [(codes.data_ptr(), scales.data_ptr()) for codes, scales in sources]
    if own is not None:
        places[own[0]] = own[1].data_ptr(), 0
    addresses = array("Q", chain.from_iterable(places))
    sizes = out.numel(), *(min(one.numel() for one in kind) for kind in zip(*sources, strict=True))

    def run(table: int, count: int, _: int) -> None:
        _cpu.dequantize_mean(
            out.data_ptr(), addresses.buffer_info()[0], len(places), sizes, table, count,
            pieces.block, pieces.bits, pieces.powers, 1.0 / len(places),
        )  # fmt: skip

    pieces.lines.shared(run)


def _coded(values: Tensor, codes: Tensor, scales: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """What C is told of values, codes and scales."""
    sizes = values.numel(), codes.numel(), scales.numel()
    return values.data_ptr(), codes.data_ptr(), scales.data_ptr(), sizes


@dataclass(frozen=True)
class Moves:
    """Pieces of one flat buffer and where they lie in another: ``(from, to, numel)`` of each."""

    each: tuple[tuple[int, int, int], ...]

    @cached_property
    def back(self) -> Moves:
        """From the other buffer to the one."""
        return Moves(tuple((target, source, numel) for source, target, numel in self.each))

    @cached_property
    def table(self) -> Tensor:
        """Neighbours on both sides are one move."""
        joined: list[list[int]] = []
        for source, target, numel in self.each:
            last = joined[-1] if joined else None
            if last is not None and (last[0] + last[2], last[1] + last[2]) == (source, target):
                last[2] += numel
            elif numel:
                joined.append([source, target, numel])
        return torch.tensor(joined, dtype=torch.int64).reshape(-1, 3)

    @cached_property
    def lines(self) -> tuple[int, int]:
        """Where the table lies, and how many lines it has."""
        return lines_of(self.table, MOVE_BYTES)

    @cached_property
    def ends(self) -> tuple[int, int]:
        """Up to where the two buffers are touched."""
        table = self.table
        return (
            int((table[:, 0] + table[:, 2]).max()) if len(table) else 0,
            int((table[:, 1] + table[:, 2]).max()) if len(table) else 0,
        )


def move(source: Tensor, target: Tensor, moves: Moves) -> None:
    """Copy the pieces (float32, contiguous) to their places in ``target``."""
    check_tensor("source's values of a move", source, torch.float32, moves.ends[0])
    check_tensor("target's values of a move", target, torch.float32, moves.ends[1])
    if served_by_c(source) and target.device.type == "cpu":
        from distcomp.kernels import _cpu

        sizes = source.numel(), target.numel()
        _cpu.move(source.data_ptr(), target.data_ptr(), sizes, *moves.lines)
        return
    for begin, to, numel in moves.table.tolist():
        target.view(-1)[to : to + numel] = source.view(-1)[begin : begin + numel]


def _check_keys(keys: Sequence[int], pieces: Pieces) -> None:
    if keys and len(keys) != len(pieces.each):
        raise DistcompError(f"{len(keys)} keys were given for {len(pieces.each)} pieces; give one for each")


def _check(x: Tensor, codes: Tensor, scales: Tensor, pieces: Pieces) -> None:
    wanted = (
        ("values", x, torch.float32, pieces.numel),
        ("codes", codes, torch.uint8, pieces.code_bytes),
        ("scales", scales, torch.float32, pieces.scale_count),
    )
    for what, tensor, dtype, numel in wanted:
        check_tensor(what, tensor, dtype, numel)
    if not 1 <= pieces.bits <= 8 or pieces.block < 1:
        raise DistcompError(
            f"bits={pieces.bits} and block={pieces.block} are no widths of a code; choose 1 to 8 bits and "
            "a block of 1 or more"
        )
