"""An update as bytes: a header, a table of pieces, and the blocks of each.

========  =====  ==============================================================
offset    bytes  what
========  =====  ==============================================================
0         4      magic ``dcu1``
4         1      1 for a key frame (all words, whatever was there), 0 for a difference
5         1      0
6         2      part, of
8         2      how many parts
10        2      0
12        8      number of the version
20        8      fingerprint of the state before (0 for a key frame)
28        8      fingerprint of the state after
36        4      bytes of the table, and
40        4      bytes of the table once it is inflated
44        8      bytes of all blocks
52        16     BLAKE2b of the 52 bytes before, the table and the blocks
========  =====  ==============================================================

The fingerprints of a part count what is in it alone; :func:`merge_parts` adds them up. The checksum is
against accidents: whoever may write updates may write any weights.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from distcomp.errors import DistcompError
from distcomp.files.coding import CorruptFile
from distcomp.kernels.words import M64
from distcomp.updates.blocks import ByteLike, Cursor, leb128
from distcomp.updates.pieces import Box
from distcomp.updates.words import word_type

UPDATE_MAGIC = b"dcu1"
UPDATE_HEADER = struct.Struct("<4sBBHHHQQQIIQ16s")
CHECKSUM_BYTES = 16
DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "uint16", "uint32", "uint64", "complex32", "float4_e2m1fn_x2",
)  # fmt: skip
"""A dtype's number in the table is its place here."""
LONGEST_NAME = 1 << 16
MOST_DIMENSIONS = 64
MOST_PARTS = 1 << 16
TABLE_GROWTH = 1100
"""zlib makes nothing more than about 1,030 times smaller; a table that says so is not inflated."""
MOST_TABLE_BYTES = 1 << 28
MOST_EMPTY_PIECES = 1 << 16
"""Pieces without blocks (of no elements, or that share another's), beside one for each byte of blocks: a
table deflates to a thousandth, and each of its lines makes an object."""
WHOLE_FLAG, PART_FLAG, ALIAS_FLAG = 0, 1, 2
READ_BYTES = 1 << 24


@dataclass(frozen=True)
class UpdatePiece:
    """A box, and the bytes of its blocks; ``alias`` is the piece whose blocks are also these."""

    box: Box
    blocks: ByteLike
    alias: int | None = None


@dataclass(frozen=True)
class Update:
    """What turns one version of a state dict into the next, or (``key``) gives all of it.

    ``number``: of the version that it leads to. ``before``, ``after``: fingerprints
    (:func:`state_fingerprint`) of the states that it leads from and to. ``part`` of ``parts``: where the
    trainer is sharded, what one of its ranks has to say.
    """

    number: int
    key: bool
    before: int
    after: int
    pieces: tuple[UpdatePiece, ...]
    part: int = 0
    parts: int = 1
    _head: list[bytes] = field(default_factory=list, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Its size in a file or on the wire."""
        return sum(map(len, self.chunks()))

    def chunks(self) -> Iterator[ByteLike]:
        """The bytes of the update, piece after piece; nothing is copied."""
        if not self._head:
            self._head.append(self._headed())
        yield self._head[0]
        yield from (piece.blocks for piece in self.pieces)

    def to_bytes(self) -> bytes:
        """The bytes of the update."""
        return b"".join(self.chunks())

    def _headed(self) -> bytes:
        raw = b"".join(map(_line, self.pieces))
        table = zlib.compress(raw, 9)
        blocks = sum(len(piece.blocks) for piece in self.pieces)
        numbers = self.part, self.parts, 0, self.number, self.before, self.after, len(table), len(raw), blocks
        bare = UPDATE_HEADER.pack(UPDATE_MAGIC, self.key, 0, *numbers, b"")[:-CHECKSUM_BYTES]
        check = _checksum([bare, table, *(piece.blocks for piece in self.pieces)])
        return bare + check + table


def _checksum(chunks: Sequence[ByteLike]) -> bytes:
    state = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for chunk in chunks:
        state.update(chunk)
    return state.digest()


def _line(piece: UpdatePiece) -> bytes:
    box, name = piece.box, piece.box.name.encode()
    flags = (WHOLE_FLAG if box.is_whole else PART_FLAG) | (ALIAS_FLAG if piece.alias is not None else 0)
    line = leb128(len(name)) + name + leb128(flags, _dtype_number(box.dtype), len(box.shape), *box.shape)
    if not box.is_whole:
        line += leb128(*box.offsets, *box.sizes)
    return line + leb128(len(piece.blocks) if piece.alias is None else piece.alias)


def _dtype_number(dtype: torch.dtype) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise DistcompError(f"updates do not know {dtype}; convert the tensor, or leave it out")
    return DTYPE_NAMES.index(name)


def read_update(source: ByteLike | Path | BinaryIO) -> Update:
    """The update in some bytes, or in a file, which is read once.

    Takes what the file takes, and no more beside than its table. Raises CorruptFile for bytes that are
    damaged, cut short or not of this format.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return read_update(file)
    data = memoryview(source) if isinstance(source, ByteLike) else memoryview(source.read())
    if len(data) < UPDATE_HEADER.size:
        raise CorruptFile("the update ends within its header: it was cut short, or is none")
    fields = UPDATE_HEADER.unpack(data[: UPDATE_HEADER.size])
    magic, key, zero, part, parts, also_zero, number, before, after, table_bytes, raw_bytes, blocks, check = (
        fields
    )
    if magic != UPDATE_MAGIC or zero or also_zero:
        raise CorruptFile(
            "this is no update, or one of a later version of distcomp; name one that encode made"
        )
    if len(data) != UPDATE_HEADER.size + table_bytes + blocks:
        announced = UPDATE_HEADER.size + table_bytes + blocks
        raise CorruptFile(
            f"the update has {len(data)} bytes and announces {announced}: it was cut short or altered"
        )
    bare, rest = data[: UPDATE_HEADER.size - CHECKSUM_BYTES], data[UPDATE_HEADER.size :]
    if _checksum([bare, rest]) != check:
        raise CorruptFile(f"update {number} was altered: its checksum is wrong; get it again")
    if key > 1 or not part < parts or (key and before):
        raise CorruptFile(f"update {number} has a header that no encoder writes: it was altered")
    pieces = _pieces(rest[:table_bytes], raw_bytes, rest[table_bytes:])
    return Update(number, bool(key), before, after, pieces, part, parts)


def _pieces(coded: memoryview, raw_bytes: int, blocks: memoryview) -> tuple[UpdatePiece, ...]:
    if raw_bytes > min(MOST_TABLE_BYTES, TABLE_GROWTH * (len(coded) + 1)):
        raise CorruptFile("the update's table announces more than it can hold: it was altered")
    unzip = zlib.decompressobj()
    try:
        raw = unzip.decompress(coded, raw_bytes + 1)
    except zlib.error as error:
        raise CorruptFile(f"the update's table is damaged ({error})") from None
    if len(raw) != raw_bytes or not unzip.eof or unzip.unused_data:
        raise CorruptFile("the update's table is not as long as announced: it was altered")
    table, body = Cursor(raw), Cursor(blocks)
    pieces: list[UpdatePiece] = []
    while table.left:
        if len(pieces) >= len(blocks) + MOST_EMPTY_PIECES:
            raise CorruptFile("the update's table names more tensors than it has blocks for: it was altered")
        pieces.append(_read_line(table, body, pieces))
    if body.left:
        raise CorruptFile("the update holds more blocks than its table names: it was altered")
    return tuple(pieces)


def _read_line(table: Cursor, body: Cursor, pieces: list[UpdatePiece]) -> UpdatePiece:
    length = table.number()
    if length > LONGEST_NAME:
        raise CorruptFile("a name in the update is longer than 65,536 bytes: it was altered")
    try:
        name = str(table.take(length), "utf-8")
    except UnicodeDecodeError:
        raise CorruptFile("a name in the update is no text: it was altered") from None
    flags, dtype, dimensions = table.number(), table.number(), table.number()
    if flags > 3 or dtype >= len(DTYPE_NAMES) or dimensions > MOST_DIMENSIONS:
        raise CorruptFile(
            f"{name[:80]} is of an unknown kind: the update was altered, or is of a later version"
        )
    if not hasattr(torch, DTYPE_NAMES[dtype]):
        raise DistcompError(
            f"{name[:80]} is of {DTYPE_NAMES[dtype]}, which this PyTorch lacks; use a newer one"
        )
    shape = tuple(table.number() for _ in range(dimensions))
    offsets, sizes = (0,) * dimensions, shape
    if flags & PART_FLAG:
        offsets = tuple(table.number() for _ in range(dimensions))
        sizes = tuple(table.number() for _ in range(dimensions))
    box = Box(name, getattr(torch, DTYPE_NAMES[dtype]), shape, offsets, sizes)
    _check_box(box)
    last = table.number()
    if not flags & ALIAS_FLAG:
        return UpdatePiece(box, body.take(last))
    if last >= len(pieces) or pieces[last].alias is not None or not _alike(pieces[last].box, box):
        raise CorruptFile(
            f"{name[:80]} shares the words of a tensor that it cannot share: the update was altered"
        )
    return UpdatePiece(box, b"", last)


def _check_box(box: Box) -> None:
    fits = all(
        at + size <= length for at, size, length in zip(box.offsets, box.sizes, box.shape, strict=True)
    )
    # Also of an empty tensor: each of its dimensions is a number of 64 bits to torch.
    elements = math.prod(max(1, length) for length in box.shape)
    if not fits or elements * box.dtype.itemsize >= 1 << 62:
        raise CorruptFile(f"{box.name[:80]} has an impossible shape: the update was altered")
    word_type(box.dtype)


def _alike(one: Box, other: Box) -> bool:
    return replace(one, name=other.name) == other


def merge_parts(updates: Sequence[Update]) -> Update:
    """The parts of one version, which the ranks of a sharded trainer made, as one update.

    Raises DistcompError unless all parts of one version are there, each once.
    """
    first = updates[0] if updates else None
    if first is None or sorted(update.part for update in updates) != list(range(first.parts)):
        there = sorted(update.part for update in updates)
        raise DistcompError(f"parts {there} are not those of one version; give each part once")
    for update in updates:
        if (update.number, update.key, update.parts) != (first.number, first.key, first.parts):
            raise DistcompError(
                f"parts of version {first.number} and of version {update.number} do not belong together; "
                "merge those of one version"
            )
    pieces: list[UpdatePiece] = []
    for update in sorted(updates, key=lambda update: update.part):
        at = len(pieces)
        pieces += [
            piece if piece.alias is None else replace(piece, alias=piece.alias + at)
            for piece in update.pieces
        ]
    before, after = (sum(sums) & M64 for sums in zip(*((u.before, u.after) for u in updates), strict=True))
    return Update(first.number, first.key, before, after, tuple(pieces))
