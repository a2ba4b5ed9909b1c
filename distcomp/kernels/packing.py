"""Where the bits of a code lie: the planar layout every backend writes and reads.

A block of m codes of b bits is split, from the low bits up, into parts of w = 8, 4, 2 or 1 bits
(7 = 4 + 2 + 1). A part takes h = ceil(m / (8 / w)) bytes: element ``j + p * h`` sits in byte ``j`` at bits
``[p * w, (p + 1) * w)``. A block's bytes are its parts in that order; blocks follow one another. Neighbouring
elements lie in neighbouring bytes, so packing is shifts and ors of whole vectors, never a shuffle within one.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

NORMS = ("max", "l2", "given")
"""What a block's scale is: its largest magnitude, its Euclidean norm, or a number that is handed in. C
knows them by their places here."""


class Coding(NamedTuple):
    """How the values of a block become codes; see :func:`distcomp.kernels.quantize`."""

    stochastic: bool
    norm: str
    powers: bool


@cache
def parts(bits: int) -> tuple[int, ...]:
    """Widths in bits of the parts of a code, low bits first: the powers of two that sum to ``bits``."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@cache
def levels(bits: int) -> int:
    """s = 2^(b-1) - 1, the largest integer on either side of zero (1 for one bit, which has no zero)."""
    return max(1, (1 << bits - 1) - 1)


@cache
def block_bytes(numel: int, bits: int) -> int:
    """Bytes of one block of ``numel`` codes: the sum over its parts of ceil(numel * w / 8)."""
    return sum(-(-numel * width // 8) for width in parts(bits))


def packed_bytes(numel: int, block: int, bits: int) -> int:
    """Bytes of ``numel`` codes in blocks of ``block``: numel * bits / 8 where blocks are multiples of 8."""
    whole, rest = divmod(numel, block)
    return whole * block_bytes(block, bits) + block_bytes(rest, bits)


def scale_count(numel: int, block: int) -> int:
    """Number of blocks, and so of fp32 scales: ceil(numel / block)."""
    return -(-numel // block)
