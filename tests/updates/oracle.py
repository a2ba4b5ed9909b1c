"""An update in plain NumPy, written from the format's description: what the bytes say, word by word."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np

GAMMA, M64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mix(z: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def fingerprint(words: list[int], seed: int, first: int = 0) -> int:
    return sum(mix((seed + word + (first + i + 1) * GAMMA) & M64) for i, word in enumerate(words)) & M64


def seed_of(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    about = f"{name}\0{dtype}\0{shape}".encode()
    return int.from_bytes(hashlib.blake2b(about, digest_size=8).digest(), "little")


def number_of(word: int, bits: int) -> int:
    """A float's place among all floats of its size: -1 is the -0 next to the 0."""
    return word if word < 1 << bits - 1 else -1 - (word - (1 << bits - 1))


def word_of(number: int, bits: int) -> int:
    number &= (1 << bits) - 1
    return number if number < 1 << bits - 1 else (1 << bits - 1) + ((1 << bits) - 1 - number)


class Numbers:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def leb(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def planes(data: bytes, count: int, width: int) -> list[int]:
    """Packed integers: parts of 8, 4, 2 and 1 bits, low ones first, each in planes."""
    values, at, shift = [0] * count, 0, 0
    for part in (8, 4, 2, 1):
        if width & part:
            height = -(-count * part // 8)
            for i in range(count):
                values[i] |= (data[at + i % height] >> (i // height * part) & (1 << part) - 1) << shift
            at, shift = at + height, shift + part
    return values


def size_of(count: int, width: int) -> int:
    return sum(-(-count * part // 8) for part in (8, 4, 2, 1) if width & part)


def elias_fano_width(universe: int, count: int) -> int | None:
    """The width that takes the fewest bytes; None for a bitmap."""
    sizes = {None: -(-universe // 8)}
    for width in range(16):
        sizes[width] = size_of(count, width) + -(-(count + (universe - 1 >> width)) // 8)
    return min(sizes, key=lambda width: sizes[width])


def indices(source: Numbers, universe: int, count: int) -> list[int]:
    """Elias 1974, Fano 1971: low bits as they are, high ones in unary."""
    if count in (0, universe):
        return list(range(count))
    width = elias_fano_width(universe, count)
    if width is None:
        bits = planes(source.take(-(-universe // 8)), universe, 1)
        return [i for i, bit in enumerate(bits) if bit]
    low = planes(source.take(size_of(count, width)), count, width)
    length = count + (universe - 1 >> width)
    unary = planes(source.take(-(-length // 8)), length, 1)
    high = [at - i for i, at in enumerate(i for i, bit in enumerate(unary) if bit)]
    return [h << width | part for h, part in zip(high, low, strict=True)]


def expanded(source: Numbers, due: int) -> Numbers:
    coder = source.leb()
    raw = source.take(due) if coder == 0 else zlib.decompress(source.take(source.leb()))
    assert coder in (0, 1)
    assert len(raw) == due
    return Numbers(raw)


def block(source: Numbers, old: list[int], itemsize: int, floating: bool) -> list[int]:
    """The words that a block makes of the old ones."""
    head, bits, n = source.leb(), 8 * itemsize, len(old)
    if head == 0:
        return old
    if head == 1:
        raw = expanded(source, n * itemsize).data
        return [sum(raw[i + b * n] << 8 * b for b in range(itemsize)) for i in range(n)]
    count, far = head - 1, source.leb()
    width = source.leb() if far else 0
    due = (
        (0 if count == n else _bytes(n, count)) + -(-count // 8)
        + (0 if far in (0, count) else _bytes(count, far)) + far * width
    )  # fmt: skip
    raw = expanded(source, due)
    places = indices(raw, n, count)
    signs = np.unpackbits(np.frombuffer(raw.take(-(-count // 8)), np.uint8), bitorder="little")
    which = indices(raw, count, far)
    rest = raw.take(far * width)
    sizes = [1] * count
    for i, at in enumerate(which):
        sizes[at] = 2 + sum(rest[i + b * far] << 8 * b for b in range(width))
    new = list(old)
    for i, at in enumerate(places):
        move = -sizes[i] if signs[i] else sizes[i]
        if floating:
            new[at] = word_of(number_of(old[at], bits) + move, bits)
        else:
            new[at] = (old[at] + move) & (1 << bits) - 1
    return new


def _bytes(universe: int, count: int) -> int:
    width = elias_fano_width(universe, count)
    if width is None:
        return -(-universe // 8)
    return size_of(count, width) + -(-(count + (universe - 1 >> width)) // 8)


def apply(
    data: bytes, old: dict[str, tuple[list[int], int, bool]], dtypes: dict[int, str]
) -> dict[str, list[int]]:
    """The words of each tensor after an update of whole tensors of at most one block each."""
    magic, key, _, part, parts, _, _, before, after, table, raw_table, blocks, check = struct.unpack(
        "<4sBBHHHQQQIIQ16s", data[:68]
    )
    assert (magic, part, parts) == (b"dcu1", 0, 1)
    assert len(data) == 68 + table + blocks
    assert hashlib.blake2b(data[:52] + data[68:], digest_size=16).digest() == check
    lines, body = Numbers(zlib.decompress(data[68 : 68 + table])), Numbers(data[68 + table :])
    assert len(lines.data) == raw_table
    new: dict[str, list[int]] = {}
    names: list[str] = []
    sums = [0, 0]
    while lines.at < len(lines.data):
        name = lines.take(lines.leb()).decode()
        flags, dtype, dimensions = lines.leb(), lines.leb(), lines.leb()
        shape = tuple(lines.leb() for _ in range(dimensions))
        words, itemsize, floating = old[name]
        last = lines.leb()
        if flags == 2:
            new[name] = new[names[last]]
        else:
            assert flags == 0
            source = Numbers(body.take(last))
            new[name] = block(source, words, itemsize, floating) if words else words
            assert source.at == last
        names.append(name)
        seed = seed_of(name, f"torch.{dtypes[dtype]}", shape)
        sums = [sums[0] + fingerprint(words, seed), sums[1] + fingerprint(new[name], seed)]
    assert after == sums[1] & M64
    assert before == (0 if key else sums[0] & M64)
    return new
