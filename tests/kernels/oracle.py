"""The kernels in NumPy, written from their definition element by element; shares no code with torch's."""

from __future__ import annotations

import math

import numpy as np

F = np.float32


def uniform(key: int, counter: int) -> np.float32:
    """Keyed lowbias32 in Python's own integers, 24 bits of it in [0, 1)."""
    x = (counter + key) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= key >> 32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    return F(x >> 8) / F(2**24)


def pack_block(codes: list[int], bits: int) -> bytes:
    """Bit by bit: a code's low bits go to the widest part, the rest to the next, until none are left."""
    packed, done = b"", 0
    for width in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]:
        height = math.ceil(len(codes) * width / 8)
        part = [0] * height
        for j, code in enumerate(codes):
            for bit in range(width):
                part[j % height] += (code >> (done + bit) & 1) << (j // height * width + bit)
        packed += bytes(part)
        done += width
    return packed


def encode_block(
    x: np.ndarray, bits: int, key: int, first: int, stochastic: bool
) -> tuple[list[int], np.float32]:
    """(codes, scale) of one block of finite values."""
    if bits == 1:
        lanes = [F(0)] * 16
        for j, value in enumerate(x):
            lanes[j % 16] = lanes[j % 16] + abs(value)
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        return [1 if value >= 0 else 0 for value in x], lanes[0] / F(len(x))
    s, scale = 2 ** (bits - 1) - 1, max(abs(x))
    if scale < 2.0**-120:
        return [s] * len(x), F(0)
    inverse, codes = F(s) / scale, []
    for j, value in enumerate(x):
        y = min(max(value * inverse, F(-s)), F(s))
        noise = round(float(uniform(key, (first + j) % 2**32)) * 2**24)
        level = (int(float(y) * 2**24) + noise) // 2**24 if stochastic else round(float(y))
        codes.append(level + s)
    return codes, scale


def encode(
    x: np.ndarray, block: int, bits: int, key: int, first: int, stochastic: bool
) -> tuple[bytes, np.ndarray]:
    """(packed codes, scales) of a whole piece."""
    packed, scales = b"", []
    for start in range(0, len(x), block):
        codes, scale = encode_block(x[start : start + block], bits, key, first + start, stochastic)
        packed += pack_block(codes, bits)
        scales.append(scale)
    return packed, np.array(scales, dtype=F)


def decode_value(code: int, scale: np.float32, bits: int) -> np.float32:
    """The value a code stands for."""
    if bits == 1:
        return scale if code else -scale
    s = 2 ** (bits - 1) - 1
    return F(code - s) * (scale / F(s))


def checksum(data: bytes) -> int:
    """Two running sums over little-endian words."""
    padded = data + b"\0" * (-len(data) % 4)
    total = weighted = 0
    for i in range(0, len(padded), 4):
        word = int.from_bytes(padded[i : i + 4], "little")
        total += word
        weighted += (i // 4 + 1) * word
    return (weighted % 2**32) << 32 | total % 2**32
