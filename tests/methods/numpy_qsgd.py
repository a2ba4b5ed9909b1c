"""QSGD, one bit, the two patterns and error feedback in plain NumPy.

Written from Alistarh et al. (NeurIPS 2017), Seide et al. (2014), Karimireddy et al. (2019), and, where
bits must agree, from what the docstrings of the kernels say of the hash, of rounding and of packing. Nothing
here is imported from distcomp but Key, whose names for streams are part of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distcomp.randomness import Key

F = np.float32
TINY = F(2.0**-120)

Params = Sequence[tuple[str, int]]
"""Names and numbers of elements, in the order of the flat buffer."""


def uniform(key: int, first: int, count: int) -> np.ndarray:
    """lowbias32 of (low half of the key + index), the high half xored in between its products; in [0, 1)."""
    with np.errstate(over="ignore"):
        x = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32) + np.uint32(key & 0xFFFFFFFF)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = x ^ np.uint32(key >> 32)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x = x ^ (x >> np.uint32(16))
    return (x >> np.uint32(8)).astype(F) * F(2.0**-24)


def levels(bits: int) -> int:
    return max(1, 2 ** (bits - 1) - 1)


def scale_of(v: np.ndarray, bits: int, norm: str) -> np.float32:
    """The block's largest magnitude or Euclidean norm; its mean magnitude at one bit."""
    if bits == 1:
        lanes = np.zeros(16, F)
        for i in range(0, len(v), 16):
            part = np.abs(v[i : i + 16])
            lanes[: len(part)] += part
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        return lanes[0] / F(len(v))
    if norm == "l2":
        return F(np.sqrt(np.square(v.astype(np.float64)).sum()))
    largest = np.abs(v).max()
    return largest if largest >= TINY else F(0)


def round_block(v: np.ndarray, scale: np.float32, bits: int, noise: np.ndarray | None) -> np.ndarray:
    """Signed integers xi * sign: floor(s v / |v| + u), half to even without noise; +-1 at one bit."""
    if bits == 1:
        return np.where(v >= 0, 1, -1)
    s = levels(bits)
    y = v * (F(s) / scale) if scale >= TINY else np.zeros_like(v)
    y = np.clip(y, -s, s).astype(np.float64)
    y = np.rint(y) if noise is None else np.floor(np.trunc(y * 2**24) / 2**24 + noise)
    return y.astype(np.int64)


@dataclass(frozen=True)
class Quantizer:
    bits: int = 4
    block: int = 512
    norm: str = "max"
    stochastic: bool = True

    def encode(self, v: np.ndarray, key: int, first: int, scales: np.ndarray | None = None):
        """Scales and integers of one parameter, or of a piece of it that starts at element ``first``."""
        found, integers = [], []
        for number, at in enumerate(range(0, len(v), self.block)):
            part = v[at : at + self.block]
            scale = scale_of(part, self.bits, self.norm) if scales is None else scales[number]
            noise = uniform(key, first + at, len(part)) if self.stochastic else None
            integers.append(round_block(part, scale, self.bits, noise))
            found.append(scale)
        return np.array(found, F), np.concatenate([np.zeros(0, np.int64), *integers])

    def decode(self, scales: np.ndarray, integers: np.ndarray) -> np.ndarray:
        step = np.repeat(scales / F(levels(self.bits)), self.block)[: len(integers)]
        return integers.astype(F) * step

    def through(self, v: np.ndarray, key: Key, name: str, first: int = 0) -> np.ndarray:
        return self.decode(*self.encode(v, key.fold(name).bits, first))


def unpack(packed: bytes, count: int, bits: int) -> np.ndarray:
    """Codes of one block: parts of 8, 4, 2, 1 bits, low bits first; byte j of each holds j, j+h, j+2h, ..."""
    codes, shift, at = np.zeros(count, np.int64), 0, 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        height = -(-count * width // 8)
        for j in range(count):
            place, row = divmod(j, height)
            codes[j] |= (packed[at + row] >> (place * width) & (2**width - 1)) << shift
        shift, at = shift + width, at + height
    assert at == len(packed)
    return codes


Piece = tuple[str, int, int]
"""Name, first element, number of elements."""


def chunks(params: Params, parts: int, alignment: int) -> list[list[Piece]]:
    """Blocks numbered through the flat buffer; chunk i takes those from floor(B i/n) to floor(B (i+1)/n)."""
    blocks = [
        (name, start, min(alignment, numel - start))
        for name, numel in params
        for start in range(0, numel, alignment)
    ]
    bounds = [len(blocks) * i // parts for i in range(parts + 1)]
    return [blocks[low:high] for low, high in pairwise(bounds)]


def over_slab(params: Params, buffer: np.ndarray, f: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
    out, at = [np.zeros(0, F)], 0
    for name, numel in params:
        out.append(f(name, buffer[at : at + numel]))
        at += numel
    return np.concatenate(out)


def mean_in_rank_order(decoded: Sequence[np.ndarray]) -> np.ndarray:
    total = decoded[0].copy()
    for one in decoded[1:]:
        total = total + one
    return total * F(1.0 / len(decoded))


def rank_key(shared: Key, rank: int) -> Key:
    return shared.fold("rank", rank)


def gather(q: Quantizer, params: Params, xs: Sequence[np.ndarray], shared: Key):
    """Everyone sends all of its tensor to everyone. The estimate and each rank's contribution."""
    sent = []
    for rank, x in enumerate(xs):
        key = rank_key(shared, rank).fold("gather")
        sent.append(over_slab(params, x, lambda name, v, key=key: q.through(v, key, name)))
    return mean_in_rank_order(sent), sent


def scatter_reduce(
    q: Quantizer,
    params: Params,
    xs: Sequence[np.ndarray],
    shared: Key,
    own_exact: bool = False,
    second: Quantizer | None = None,
):
    """Owners of chunks average what was sent of them and send the mean anew; n times the loss is theirs.

    ``own_exact``: an owner adds what it has of its chunk as it is (under error feedback).
    """
    n, starts = (
        len(xs),
        dict(zip([p for p, _ in params], np.cumsum([0, *(m for _, m in params)]), strict=False)),
    )
    estimate = np.zeros_like(xs[0])
    given = [np.zeros_like(x) for x in xs]
    for owner, pieces in enumerate(chunks(params, n, q.block)):
        for name, first, count in pieces:
            where = slice(starts[name] + first, starts[name] + first + count)
            for rank, x in enumerate(xs):
                key = rank_key(shared, rank).fold("scatter")
                kept = own_exact and rank == owner
                given[rank][where] = x[where] if kept else q.through(x[where], key, name, first)
            mean = mean_in_rank_order([g[where] for g in given])
            estimate[where] = (second or q).through(mean, shared.fold("reduce"), name, first)
            given[owner][where] += F(n) * (estimate[where] - mean)
    return estimate, given


def with_feedback(
    pattern, q: Quantizer, params: Params, steps: Sequence[Sequence[np.ndarray]], keys: Sequence[Key]
):
    """p = x + e;  estimate, c = pattern(p);  e = p - c. The estimates of all steps and the last residuals."""
    residuals = [np.zeros_like(x) for x in steps[0]]
    estimates = []
    for xs, key in zip(steps, keys, strict=True):
        corrected = [x + e for x, e in zip(xs, residuals, strict=True)]
        estimate, given = pattern(q, params, corrected, key)
        residuals = [p - c for p, c in zip(corrected, given, strict=True)]
        estimates.append(estimate)
    return estimates, residuals
