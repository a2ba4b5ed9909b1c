"""One block of words as bytes: unchanged, a few words moved by a distance, or whole.

A block is at most :data:`BLOCK` consecutive words of one tensor, so that nothing that is held at a time is
larger. Its bytes::

    0                                       unchanged
    1, coder, planes                        whole: byte 0 of each word, then byte 1, ...
    1 + count, far, [width], coder, parts   count words changed

Numbers are LEB128. The parts of changed words are their indices (Elias-Fano,
:class:`distcomp.compressors.IndexCode`), one bit each for the direction, and for the ``far`` of them that
moved by more than one unit in the last place which these are (Elias-Fano among the changed) and the distance
less 2, ``width`` bytes each, in planes. In training at small rates nearly every changed word moves by one
unit: it then costs its index and one bit.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distcomp.compressors import IndexCode
from distcomp.compressors.sparse import Rows, RowSet
from distcomp.errors import DistcompError, require
from distcomp.files.coding import CorruptFile
from distcomp.updates.words import WordType, distances

BLOCK = 1 << 18
"""Words of a block, at most."""
RAW, ZLIB, ZSTD = 0, 1, 2
ENTROPY = {"none": RAW, "zlib": ZLIB, "zstd": ZSTD}
"""The entropy stages by name. Where one saves nothing, bytes are stored as they are."""
LEVELS = {ZLIB: 6, ZSTD: 3}

ByteLike = bytes | bytearray | memoryview


@dataclass(frozen=True)
class BlockChange:
    """What a block says. ``places`` (int64, rising) and ``distance``, or ``words``: all of them, as they are
    to be."""

    places: Tensor | None
    distance: Tensor | None
    words: Tensor | None


class Cursor:
    """Takes bytes and numbers from the front; never more than there are."""

    def __init__(self, data: ByteLike) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes. Raises CorruptFile where there are fewer."""
        if not 0 <= count <= len(self._data) - self._at:
            raise CorruptFile("the update ends before what it announces: it was cut short or altered")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        """The next LEB128 number, of 64 bits at most."""
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise CorruptFile("a number in the update is longer than 64 bits: it was altered")
        return value

    @property
    def left(self) -> int:
        """ByteLike that are left."""
        return len(self._data) - self._at


def leb128(*numbers: int) -> bytes:
    """Seven bits a byte, low ones first; the eighth says that more follow."""
    coded = bytearray()
    for number in numbers:
        while number > 127:
            coded.append(number & 127 | 128)
            number >>= 7
        coded.append(number)
    return bytes(coded)


def encode_block(before: Tensor | None, after: Tensor, places: Tensor, kind: WordType, entropy: int) -> bytes:
    """The bytes that make ``after`` of ``before``, which differ at ``places``; of any where there is none."""
    if before is None or 2 * len(places) > after.numel() + 1:
        return _whole(after, kind, entropy)
    if not len(places):
        return leb128(0)
    there = places.to(after.device)
    moves = distances(before.to(after.device)[there], after[there], kind).cpu()
    coded = _changed(places, moves, after.numel(), entropy)
    return coded if len(coded) < after.numel() * kind.itemsize else _whole(after, kind, entropy)


def decode_block(cursor: Cursor, numel: int, kind: WordType) -> BlockChange | None:
    """What a block of ``numel`` words says; None where nothing changed. Raises CorruptFile for what no
    encoder makes."""
    head = cursor.number()
    if head == 0:
        return None
    if head == 1:
        planes = _expanded(cursor, numel * kind.itemsize)
        bytewise = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, numel).T.copy()
        return BlockChange(None, None, torch.from_numpy(bytewise).view(-1).view(kind.dtype))
    count, far = head - 1, cursor.number()
    width = cursor.number() if far else 0
    if count > numel or far > count or width not in ((1, 2, 4, 8) if far else (0,)):
        raise CorruptFile("a block of the update has more changes than words: it was altered")
    sizes = _part_bytes(numel, count, far, width)
    parts = memoryview(_expanded(cursor, sum(sizes)))
    ends = np.cumsum(sizes)
    indices, signs, which, rest = (parts[end - size : end] for size, end in zip(sizes, ends, strict=True))
    places = _rising(indices, numel, count)
    distance = torch.ones(count, dtype=torch.int64)
    if far:
        distance[_rising(which, count, far)] = _from_planes(rest, far, width) + 2
    bits = np.unpackbits(np.frombuffer(signs, np.uint8), count=count, bitorder="little")
    return BlockChange(places, torch.where(torch.from_numpy(bits).bool(), -distance, distance), None)


def _whole(after: Tensor, kind: WordType, entropy: int) -> bytes:
    bytewise = after.cpu().view(torch.uint8).numpy().reshape(-1, kind.itemsize)
    return leb128(1) + _compacted(np.ascontiguousarray(bytewise.T).tobytes(), entropy)


def _changed(places: Tensor, moves: Tensor, numel: int, entropy: int) -> bytes:
    # |-2^63| is -2^63 again, and 2^63 once its bits are read as unsigned.
    size = moves.abs().numpy().view(np.uint64)
    far = torch.from_numpy(np.flatnonzero(size != 1))
    rest = size[far.numpy()] - np.uint64(2)
    width = _bytes_for(int(rest.max())) if len(far) else 0
    parts = [
        _indices(places, numel),
        np.packbits((moves < 0).numpy(), bitorder="little").tobytes(),
        _indices(far, len(places)),
        np.ascontiguousarray(rest.view(np.uint8).reshape(-1, 8)[:, :width].T).tobytes(),
    ]
    head = leb128(len(places) + 1, len(far), *([width] if len(far) else []))
    return head + _compacted(b"".join(parts), entropy)


def _bytes_for(largest: int) -> int:
    return next(width for width in (1, 2, 4, 8) if largest < 1 << 8 * width)


def _part_bytes(numel: int, count: int, far: int, width: int) -> tuple[int, int, int, int]:
    return IndexCode(numel, count).nbytes, -(-count // 8), IndexCode(count, far).nbytes, far * width


def _indices(places: Tensor, universe: int) -> bytes:
    rows = RowSet((Rows(0, 1, universe, len(places)),)) if len(places) else RowSet(())
    return rows.encode(places).numpy().tobytes()


def _rising(coded: memoryview, universe: int, count: int) -> Tensor:
    """``count`` indices below ``universe``. Raises CorruptFile unless they rise: then none comes twice."""
    codes = torch.from_numpy(np.frombuffer(coded, np.uint8).copy())
    places = RowSet((Rows(0, 1, universe, count),)).decode(codes)
    if bool((places[1:] <= places[:-1]).any()):
        raise CorruptFile("the indices of changed words do not rise: the update was altered")
    return places


def _from_planes(planes: memoryview, count: int, width: int) -> Tensor:
    whole = np.zeros((count, 8), np.uint8)
    whole[:, :width] = np.frombuffer(planes, np.uint8).reshape(width, count).T
    return torch.from_numpy(whole.view(np.int64).reshape(-1))


def _compacted(raw: bytes, entropy: int) -> bytes:
    """The coder, and the bytes; before those of a coder, how many they are."""
    if entropy != RAW:
        coded = (
            zstandard().compress(raw, LEVELS[ZSTD]) if entropy == ZSTD else zlib.compress(raw, LEVELS[ZLIB])
        )
        head = leb128(entropy, len(coded))
        if len(head) + len(coded) < len(raw) + 1:
            return head + coded
    return leb128(RAW) + raw


def _expanded(cursor: Cursor, due: int) -> bytes | memoryview:
    """``due`` bytes, stored or coded. Raises CorruptFile where they are coded and not as many; expands no
    more than that."""
    coder = cursor.number()
    if coder == RAW:
        return cursor.take(due)
    coded = cursor.take(cursor.number())
    if coder == ZLIB:
        raw = _inflated(coded, due)
    elif coder == ZSTD:
        raw = _unzstd(coded, due)
    else:
        raise CorruptFile(
            f"the update uses an entropy stage {coder}, which there is none; use a newer distcomp"
        )
    if len(raw) != due:
        raise CorruptFile(f"an entropy-coded part of the update holds other than {due} bytes: it was altered")
    return raw


def _inflated(coded: memoryview, due: int) -> bytes:
    unzip = zlib.decompressobj()
    try:
        raw = unzip.decompress(coded, due + 1)  # no further: a small stream may expand without end
    except zlib.error as error:
        raise CorruptFile(f"a zlib stream of the update is damaged ({error})") from None
    return raw if unzip.eof and not unzip.unused_data else b""


def _unzstd(coded: memoryview, due: int) -> bytes:
    zstd = zstandard()
    try:
        if zstd.frame_content_size(bytes(coded[:18])) != due:  # what it announces is what is set aside
            return b""
        raw: bytes = zstd.decompress(bytes(coded), max_output_size=due)
    except zstd.ZstdError as error:
        raise CorruptFile(f"a zstd frame of the update is damaged ({error})") from None
    return raw


def zstandard() -> Any:
    """The package, or a sentence that names the extra."""
    return require("zstandard", "zstd")


def entropy_number(name: str) -> int:
    """Of an entropy stage by name. Raises DistcompError for another name, or where zstandard is missing."""
    if name not in ENTROPY:
        raise DistcompError(f"entropy={name!r} is no stage; choose one of {', '.join(ENTROPY)}")
    if name == "zstd":
        zstandard()
    return ENTROPY[name]
