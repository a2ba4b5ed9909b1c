"""Symbols in few bytes and back: packed bits, canonical Huffman codes, or zlib, whichever is smallest.

Decoders trust nothing: they know how many symbols are due and from what alphabet, and raise CorruptFile for
anything else. None allocates more than the symbols take.
"""

from __future__ import annotations

import heapq
import itertools
import zlib

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError

Symbols = NDArray[np.int64]
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
    narrow = symbols.astype(np.uint8 if alphabet <= 256 else "<u2")
    ways = {
        PACKED: _pack(symbols, width(alphabet)),
        HUFFMAN: _huffman(symbols, alphabet),
        ZLIB: zlib.compress(narrow.tobytes(), 9),
    }
    coder = min(ways, key=lambda one: (len(ways[one]), one))
    return coder, ways[coder]


def decode(coder: int, data: bytes, count: int, alphabet: int) -> Symbols:
    """``count`` symbols below ``alphabet``. Raises CorruptFile where the bytes do not hold just these."""
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


def _unpack(data: bytes, count: int, bits: int) -> Symbols:
    if len(data) != -(-count * bits // 8):
        raise CorruptFile(f"{count} symbols of {bits} bits do not lie in {len(data)} bytes")
    planes = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits]
    weights: Symbols = planes.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))
    return weights


def _inflate(data: bytes, count: int, itemsize: int) -> Symbols:
    unzip = zlib.decompressobj()
    try:
        raw = unzip.decompress(data, count * itemsize + 1)
    except zlib.error as error:
        raise CorruptFile(f"a zlib stream is damaged ({error})") from None
    if len(raw) != count * itemsize or not unzip.eof or unzip.unused_data:
        raise CorruptFile("a zlib stream does not hold as many symbols as it should")
    return np.frombuffer(raw, np.uint8 if itemsize == 1 else "<u2").astype(np.int64)


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
        one, _, left = heapq.heappop(heap)
        two, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (one + two, next(order), left + right))
    return lengths


def canonical(lengths: Symbols) -> Symbols:
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
    codes = canonical(lengths)
    each = lengths[symbols]
    starts = np.cumsum(each) - each
    bits = np.zeros(int(each.sum()), np.uint8)
    for bit in range(int(each.max(initial=0))):
        has = each > bit
        bits[starts[has] + bit] = (codes[symbols[has]] >> (each[has] - 1 - bit)) & 1
    return _pack(lengths, 4) + np.packbits(bits).tobytes()


def _unhuffman(data: bytes, count: int, alphabet: int) -> Symbols:
    head = -(-alphabet * 4 // 8)
    lengths = _unpack(data[:head], alphabet, 4)
    if sum(1 << (LONGEST - int(n)) for n in lengths if n) > 1 << LONGEST:
        raise CorruptFile("a Huffman table is no prefix code: the file is damaged")
    if (len(data) - head) * 8 < count:
        raise CorruptFile("a Huffman stream is too short for its symbols")
    return _read_codes(np.unpackbits(np.frombuffer(data, np.uint8)[head:]), count, lengths)


def _read_codes(bits: NDArray[np.uint8], count: int, lengths: Symbols) -> Symbols:
    """Symbols one after the other, by the table of all codes of up to 15 bits."""
    table = np.full(1 << LONGEST, -1, np.int64)
    for symbol, code in enumerate(canonical(lengths)):
        if lengths[symbol]:
            free = LONGEST - int(lengths[symbol])
            table[int(code) << free : (int(code) + 1) << free] = symbol
    padded = np.concatenate([bits, np.zeros(LONGEST, np.uint8)]).astype(np.int64)
    windows = np.zeros(len(bits) + 1, np.int64)
    for bit in range(LONGEST):
        windows = (windows << 1) | padded[bit : bit + len(windows)] if bit else padded[: len(windows)].copy()
    found = table[windows]
    steps = np.where(found >= 0, lengths[found], 0).tolist()
    symbols, at, out = found.tolist(), 0, []
    for _ in range(count):
        if at >= len(bits) or symbols[at] < 0:
            raise CorruptFile("a Huffman stream ends early or holds no code: the file is damaged")
        out.append(symbols[at])
        at += steps[at]
    if at > len(bits) or len(bits) - at >= 8:
        raise CorruptFile("a Huffman stream is longer or shorter than its symbols")
    return np.array(out, np.int64)
