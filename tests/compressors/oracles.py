"""The algorithms in plain NumPy, one parameter at a time, written from the papers.

Randomness is an argument: uniform numbers in [0, 1), one per element. :func:`noise` draws the ones that the
package draws (a counter-based hash, keyed by names).
"""

from __future__ import annotations

import itertools

import numpy as np

from distcomp.layout import Layout
from distcomp.randomness import Key

F = np.float32


def noise(layout: Layout, key: Key) -> np.ndarray:
    """For each element of a flat buffer."""
    parts = [hashed(param.numel, key.fold(param.name).bits) for param in layout.slices]
    return np.concatenate([np.zeros(0, F), *parts])


def hashed(count: int, key: int) -> np.ndarray:
    """lowbias32 of (low half of the key + index), the high half xored in between its products."""
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64).astype(np.uint32) + np.uint32(key & 0xFFFFFFFF)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) ^ np.uint32(key >> 32)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return ((x ^ (x >> np.uint32(16))) >> np.uint32(8)).astype(F) * F(2.0**-24)


def natural(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Horvath 2019, definition 1: up with probability |x| 2^-floor - 1, down to 2^floor otherwise."""
    out = np.zeros(len(x))
    for i, value in enumerate(x.astype(np.float64)):
        size = abs(value)
        if size == 0:
            continue
        low = 2.0 ** np.floor(np.log2(size)) if size >= 2.0**-126 else 0.0
        high = 2 * low if low else 2.0**-126
        up = (size - low) / (high - low)
        chosen = high if u[i] >= 1 - up else low
        out[i] = np.sign(value) * min(chosen, 2.0**127)
    return out


def nonuniform(v: np.ndarray, u: np.ndarray, bits: int, norm: str) -> np.ndarray:
    """NUQSGD, section 3: |v| sign(v) h, h one of 0, 2^(1-s), ..., 1/2, 1 around |v_i|/|v|; one block."""
    s = 2 ** (bits - 1) - 1
    levels = [0.0, *(2.0**-p for p in range(s - 1, -1, -1))]
    scale = float(np.abs(v).max() if norm == "max" else np.sqrt(np.square(v.astype(np.float64)).sum()))
    out = np.zeros(len(v))
    for i, value in enumerate(v.astype(np.float64)):
        r = min(1.0, abs(value) / scale) if scale else 0.0
        for low, high in itertools.pairwise(levels):
            if low <= r <= high:
                out[i] = scale * np.sign(value) * (high if u[i] >= 1 - (r - low) / (high - low) else low)
    return out


def scaled_sign(v: np.ndarray) -> np.ndarray:
    """Karimireddy 2019, algorithm 1: the l1 norm over d, times the sign."""
    return np.abs(v.astype(np.float64)).mean() * np.where(v >= 0, 1.0, -1.0) if len(v) else v


def one_bit(v: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Seide 2014, section 3.3: per output unit the means of what is quantized to 1 and to 0."""
    units = (
        v.astype(np.float64).reshape(shape[0], -1) if len(shape) > 1 else v.astype(np.float64).reshape(1, -1)
    )
    out = np.zeros_like(units)
    for unit, target in zip(units, out, strict=True):
        for side in (unit >= 0, unit < 0):
            if side.any():
                target[side] = unit[side].mean()
    return out.reshape(-1)


def top(v: np.ndarray, k: int) -> np.ndarray:
    """The places of the k largest magnitudes, rising; of equal ones the first."""
    return np.sort(np.lexsort((np.arange(len(v)), -np.abs(v)))[:k])


def kept(v: np.ndarray, places: np.ndarray) -> np.ndarray:
    out = np.zeros_like(v)
    out[places] = v[places]
    return out


def count(d: int, ratio: float) -> int:
    return min(d, max(1, round(ratio * d)))


def ternary(x: np.ndarray, s: float, u: np.ndarray) -> np.ndarray:
    """Wen 2017, equation 1: sign(g) b with P(b = 1) = |g|/s, drawn as floor(g/s + u)."""
    return np.clip(np.floor(x.astype(F) / F(s) + u), -1, 1) if s else np.zeros_like(x)


def clip_deviations(x: np.ndarray, c: float) -> np.ndarray:
    """Wen 2017, section 3.4: to c standard deviations, where the mean is 0; never below its magnitude."""
    if not len(x):
        return x
    sigma = x.astype(np.float64).std() if len(x) > 1 else np.abs(x).sum()
    limit = max(c * sigma, abs(x.astype(np.float64).mean()))
    return np.clip(x, -limit, limit)


def vote(xs: list[np.ndarray]) -> np.ndarray:
    """Bernstein 2019: the sign of the sum of signs, sign(0) = +1."""
    return np.where(sum(np.where(x >= 0, 1, -1) for x in xs) >= 0, 1.0, -1.0)


def dct_matrix(side: int) -> np.ndarray:
    rows = []
    for k in range(side):
        row = np.array([np.cos(np.pi * (2 * j + 1) * k / (2 * side)) for j in range(side)])
        rows.append(row / np.linalg.norm(row))
    return np.array(rows)


class Demo:
    """Peng 2024, algorithm 1, on one matrix whose chunks are ``(high, wide)``; n workers at once."""

    def __init__(self, n: int, shape: tuple[int, int], chunk: tuple[int, int], k: int, decay: float) -> None:
        self.d = [np.zeros(shape) for _ in range(n)]
        self.shape, self.chunk, self.k, self.decay = shape, chunk, k, decay
        self.basis = dct_matrix(chunk[0]), dct_matrix(chunk[1])

    def step(self, gradients: list[np.ndarray]) -> np.ndarray:
        """The mean over senders, back from the cosine domain."""
        (high, wide), (down, across) = self.chunk, self.basis
        agreed = np.zeros(self.shape)
        for i, j in itertools.product(range(0, self.shape[0], high), range(0, self.shape[1], wide)):
            here = np.s_[i : i + high, j : j + wide]
            total, senders = np.zeros(high * wide), np.zeros(high * wide)
            for rank, gradient in enumerate(gradients):
                self.d[rank][here] = self.decay * self.d[rank][here] + gradient[here]
                y = (down @ self.d[rank][here] @ across.T).reshape(-1)
                places = top(y, min(self.k, y.size))
                q = kept(y, places)
                self.d[rank][here] -= down.T @ q.reshape(high, wide) @ across
                total += q
                senders[places] += 1
            agreed[here] = down.T @ (total / np.maximum(senders, 1)).reshape(high, wide) @ across
        return agreed


class DeepGradient:
    """Lin 2018, algorithm 4 (momentum correction, factor masking) for one parameter, n workers."""

    def __init__(self, n: int, d: int, ratio: float, m: float, nesterov: bool) -> None:
        self.u, self.v = [np.zeros(d) for _ in range(n)], [np.zeros(d) for _ in range(n)]
        self.k, self.m, self.nesterov = count(d, ratio), m, nesterov

    def step(self, gradients: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(self.u[0])
        for rank, g in enumerate(gradients):
            if self.nesterov:
                self.u[rank] = self.m * (self.u[rank] + g)
                self.v[rank] = self.v[rank] + self.u[rank] + g
            else:
                self.u[rank] = self.m * self.u[rank] + g
                self.v[rank] = self.v[rank] + self.u[rank]
            places = top(self.v[rank], self.k)
            total += kept(self.v[rank], places)
            self.u[rank][places] = 0
            self.v[rank][places] = 0
        return total / len(gradients)


class Fields:
    """Signed integers side by side in a machine word, as a list of Python integers."""

    @staticmethod
    def pack(codes: list[int], bits: int) -> list[int]:
        fields = 32 // bits
        words = -(-len(codes) // fields)
        padded = codes + [0] * (fields * words - len(codes))
        return [sum(padded[f * words + w] << (bits * f) for f in range(fields)) for w in range(words)]
