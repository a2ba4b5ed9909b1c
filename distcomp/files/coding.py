"""Symbols in few bytes and back: packed bits, canonical Huffman codes, or zlib, whichever is smallest.

Decoders trust nothing: they know how many symbols are due and from what alphabet, and raise CorruptFile for
anything else before they expand it. Beside the symbols, in one or two bytes each, none takes more than a few
megabytes.
"""

from __future__ import annotations

import heapq
import itertools
import zlib

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError

Symbols = NDArray[np.int64]
Narrow = NDArray[np.uint8 | np.uint16]
AT_ONCE = 1 << 16
"""Symbols (a multiple of 8) or bits that are expanded at a time."""
PACKED, HUFFMAN, ZLIB = 0, 1, 2
CODERS = {PACKED: "packed bits", HUFFMAN: "canonical Huffman", ZLIB: "zlib"}
LONGEST = 15
"""The longest Huffman code, in bits: a length then takes half a byte."""


class CorruptFile(DistcompError):
    """A compressed model that is damaged, cut short or not one at all; the message says where."""


def width(alphabet: int) -> int:
    """Bits of a symbol below ``alphabet``."""
    return max(1, (alphabet - 1).bit_length())


def encode(symbols: Symbols, alphabet: int) -> tuple[int, bytes]:
    """The coder that makes the fewest bytes, and these."""
    plain = symbols.astype(narrow(alphabet)).astype("<u1" if alphabet <= 256 else "<u2")
    ways = {
        PACKED: _pack(symbols, width(alphabet)),
        HUFFMAN: _huffman(symbols, alphabet),
        ZLIB: zlib.compress(plain.tobytes(), 9),
    }
    coder = min(ways, key=lambda way: (len(ways[way]), way))
    return coder, ways[coder]


def narrow(alphabet: int) -> type[np.uint8] | type[np.uint16]:
    """The type of a symbol below ``alphabet``."""
    return np.uint8 if alphabet <= 256 else np.uint16


def decode(coder: int, data: bytes | memoryview, count: int, alphabet: int) -> Narrow:
    """``count`` symbols below ``alphabet``, of the type :func:`narrow`. Raises CorruptFile where the bytes do
    not hold just these."""
    symbols: Narrow
    if coder == PACKED:
        symbols = _unpack(data, count, width(alphabet))
    elif coder == HUFFMAN:
        symbols = _unhuffman(data, count, alphabet)
    elif coder == ZLIB:
        symbols = _inflate(data, count, 1 if alphabet <= 256 else 2)
    else:
        raise CorruptFile(f"there is no coder {coder}; the file is damaged or of a later version")
    if symbols.size and int(symbols.max()) >= alphabet:
        raise CorruptFile("a symbol is outside its alphabet: the file is damaged")
    return symbols


def _pack(symbols: Symbols, bits: int) -> bytes:
    planes = (symbols[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little").tobytes()


def _unpack(data: bytes | memoryview, count: int, bits: int) -> Narrow:
    if len(data) != -(-count * bits // 8):
        raise CorruptFile(f"{count} symbols of {bits} bits do not lie in {len(data)} bytes")
    symbols = np.empty(count, narrow(1 << bits))
    coded = np.frombuffer(data, np.uint8)
    weights = 1 << np.arange(bits)
    for start in range(0, count, AT_ONCE):
        some = min(AT_ONCE, count - start)
        first = start * bits // 8  # a whole byte: AT_ONCE is a multiple of 8
        planes = np.unpackbits(coded[first : first + -(-some * bits // 8)], bitorder="little")
        symbols[start : start + some] = planes[: some * bits].reshape(some, bits).astype(np.int64) @ weights
    return symbols


def _inflate(data: bytes | memoryview, count: int, itemsize: int) -> Narrow:
    unzip = zlib.decompressobj()
    try:
        raw = unzip.decompress(data, count * itemsize + 1)
    except zlib.error as error:
        raise CorruptFile(f"a zlib stream is damaged ({error})") from None
    if len(raw) != count * itemsize or not unzip.eof or unzip.unused_data:
        raise CorruptFile("a zlib stream does not hold as many symbols as it should")
    if itemsize == 1:
        return np.frombuffer(raw, np.uint8)
    return np.frombuffer(raw, "<u2").astype(np.uint16)


def code_lengths(counts: Symbols) -> Symbols:
    """Lengths of a Huffman code of at most 15 bits; 0 for symbols that do not occur."""
    lengths = np.zeros(len(counts), np.int64)
    if np.count_nonzero(counts) == 1:
        lengths[counts > 0] = 1
        return lengths
    while np.count_nonzero(counts):
        lengths = _tree(counts)
        if lengths.max() <= LONGEST:
            break
        counts = np.where(counts > 0, (counts + 1) // 2, 0)
    return lengths


def _tree(counts: Symbols) -> Symbols:
    order = itertools.count()
    heap = [(int(n), next(order), [symbol]) for symbol, n in enumerate(counts) if n]
    heapq.heapify(heap)
    lengths = np.zeros(len(counts), np.int64)
    while len(heap) > 1:
        count, _, left = heapq.heappop(heap)
        two, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (count + two, next(order), left + right))
    return lengths


def canonical_codes(lengths: Symbols) -> Symbols:
    """The code of each symbol: shorter ones first, then in order of the symbols."""
    codes = np.zeros(len(lengths), np.int64)
    code = 0
    for length in range(1, LONGEST + 1):
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = code
            code += 1
        code <<= 1
    return codes


def _huffman(symbols: Symbols, alphabet: int) -> bytes:
    """Half a byte per symbol of the alphabet for the code's lengths, then the codes, first bit first."""
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    codes = canonical_codes(lengths)
    each = lengths[symbols]
    starts = np.cumsum(each) - each
    bits = np.zeros(int(each.sum()), np.uint8)
    for bit in range(int(each.max(initial=0))):
        has = each > bit
        bits[starts[has] + bit] = (codes[symbols[has]] >> (each[has] - 1 - bit)) & 1
    return _pack(lengths, 4) + np.packbits(bits).tobytes()


def _unhuffman(data: bytes | memoryview, count: int, alphabet: int) -> Narrow:
    head = -(-alphabet * 4 // 8)
    lengths = _unpack(data[:head], alphabet, 4).astype(np.int64)
    if sum(1 << (LONGEST - int(n)) for n in lengths if n) > 1 << LONGEST:
        raise CorruptFile("a Huffman table is no prefix code: the file is damaged")
    if not count <= (len(data) - head) * 8 <= count * LONGEST + 7:
        raise CorruptFile("a Huffman stream is longer or shorter than its symbols")
    return _read_codes(np.frombuffer(data, np.uint8)[head:], count, lengths, narrow(alphabet))


def _read_codes(
    coded: NDArray[np.uint8], count: int, lengths: Symbols, type_: type[np.uint8] | type[np.uint16]
) -> Narrow:
    """Symbols one after the other, by the table of all codes of up to 15 bits."""
    table = np.full(1 << LONGEST, -1, np.int64)
    for symbol, code in enumerate(canonical_codes(lengths)):
        if lengths[symbol]:
            free = LONGEST - int(lengths[symbol])
            table[int(code) << free : (int(code) + 1) << free] = symbol
    out = np.empty(count, type_)
    at, done, end = 0, 0, 8 * len(coded)
    while done < count:
        first = at // 8  # the byte in which the next code begins
        symbols, steps = _windows(coded[first : first + AT_ONCE // 8 + 2], table, lengths)
        bit, stop = at - 8 * first, min(AT_ONCE, end - 8 * first)
        decoded: list[int] = []
        while bit < stop and done + len(decoded) < count:
            if symbols[bit] < 0:
                raise CorruptFile("a Huffman stream holds no code: the file is damaged")
            decoded.append(symbols[bit])
            bit += steps[bit]
        if not decoded:
            raise CorruptFile("a Huffman stream ends early: the file is damaged")
        out[done : done + len(decoded)] = decoded
        at, done = 8 * first + bit, done + len(decoded)
    if at > end or end - at >= 8:
        raise CorruptFile("a Huffman stream is longer or shorter than its symbols")
    return out


def _windows(coded: NDArray[np.uint8], table: Symbols, lengths: Symbols) -> tuple[list[int], list[int]]:
    """For each bit of ``coded``, the symbol whose code begins there (-1: none) and the code's length."""
    bits = np.concatenate([np.unpackbits(coded), np.zeros(LONGEST, np.uint8)]).astype(np.int64)
    windows = np.zeros(8 * len(coded), np.int64)
    for bit in range(LONGEST):
        windows = (windows << 1) | bits[bit : bit + len(windows)]
    symbols = table[windows]
    return symbols.tolist(), np.where(symbols >= 0, lengths[symbols], 0).tolist()
