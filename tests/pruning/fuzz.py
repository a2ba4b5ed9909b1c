"""Hostile files: mutations of good ones, with checksums made good again or not."""

from __future__ import annotations

import struct
import zlib
from functools import cache

import torch

from distcomp import DistcompError, pruning

HEADER = struct.Struct("<4sHHIII")
LIMIT_BYTES = 1 << 22


@cache
def seeds() -> tuple[bytes, ...]:
    """Good files of all codings."""
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(40, 30, generator=generator)
    sparse[torch.rand(40, 30, generator=generator) < 0.9] = 0
    return tuple(
        pruning.compress(state, bits)
        for state, bits in (
            ({"w": sparse, "b": torch.arange(7.0)}, 4),
            ({"w": sparse, "empty": torch.zeros(0, 3), "s": torch.tensor(3), "m": sparse != 0}, 2),
            ({"ones": torch.ones(300), "nan": torch.tensor([float("nan")] * 9)}, 5),
        )
    )


def mutated(which: int, edits: list[tuple[int, int]], cut: int, mend: bool) -> bytes:
    """A seed with bytes replaced, cut short, and with checksums mended where asked."""
    data = bytearray(seeds()[which % len(seeds())])
    for place, value in edits:
        data[place % len(data)] = value
    data = data[: len(data) - cut % len(data)] if cut else data
    return _mended(bytes(data)) if mend else bytes(data)


def _mended(data: bytes) -> bytes:
    """Checksums that fit, as a hostile writer would make them."""
    try:
        magic, version, zero, count, length, _ = HEADER.unpack_from(data)
        table = bytearray(data[HEADER.size : HEADER.size + length])
        at, body = 0, HEADER.size + length
        for _ in range(min(count, 16)):
            (name,) = struct.unpack_from("<H", table, at)
            at += 2 + name
            dims = table[at + 1]
            at += 2 + 4 * dims
            _, nbytes = struct.unpack_from("<BI", table, at)
            struct.pack_into("<I", table, at + 5, zlib.crc32(data[body : body + nbytes]))
            at += 9
            body += nbytes
        header = HEADER.pack(magic, version, zero, count, length, zlib.crc32(bytes(table)))
        return header + bytes(table) + data[HEADER.size + length :]
    except (struct.error, IndexError):
        return data


def try_to_read(data: bytes) -> str:
    """What became of it: read, or refused. Anything else raises."""
    try:
        state = pruning.decompress(data, LIMIT_BYTES)
    except DistcompError:
        return "refused"
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= LIMIT_BYTES
    return "read"
