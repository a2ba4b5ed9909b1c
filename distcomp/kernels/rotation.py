"""Random rotations: rows of a flat buffer, turned by random signs and the Walsh-Hadamard transform.

The specification, in plain torch, and what serves where C does not; ``_rotation.h`` (CPU) equals it bit for
bit, within the passes of :mod:`distcomp.kernels.minifloat`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.kernels.reference import uniform

SIDE = 128
"""Values that are rotated together: a power of two, and a multiple of every usual block."""

Places = Sequence[tuple[int, int, int, int]]
"""Pieces of a flat buffer: at, numel, which element of its parameter is the first, which parameter it is."""


def reference_rotate(x: Tensor, places: Places, keys: Tensor, back: bool) -> Tensor:
    """``H D x`` of every ``SIDE`` values of each piece, or ``D H x``, which takes it back. H: orthonormal.
    ``D``: signs, a function of the parameter's key (int64, ``[parameters]``, on ``x``'s device) and the place
    in it.

    ``x``: float32. Fewer values than a side, at the end of a piece, stay as they are: padded, they would be
    sent as so many.
    """
    out = x.clone()
    for at, numel, first, owner in places:
        whole = numel - numel % SIDE
        rows = x[at : at + whole].view(-1, SIDE)
        drawn = uniform(whole, keys[owner], first, x.device).view_as(rows)
        signs = torch.where(drawn < 0.5, -torch.ones_like(drawn), 1.0)
        turned = hadamard(rows) * signs if back else hadamard(rows * signs)
        out[at : at + whole] = turned.view(-1)
    return out


def reference_put_back(values: Tensor, out: Tensor, places: Places, keys: Tensor, sign: int) -> None:
    """Write what was rotated, taken back, into ``out``; add it (``sign=1``) or subtract it (``sign=-1``)."""
    turned = reference_rotate(values, places, keys, back=True)
    for at, numel, _, _ in places:
        there, here = out[at : at + numel], turned[at : at + numel]
        there.copy_(there + here if sign > 0 else there - here if sign < 0 else here)


def hadamard(rows: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each row: its own inverse, and the same bits everywhere."""
    count, side = rows.shape
    half = 1
    # Butterflies, side log2(side) additions a row: a product with the matrix would add in an order that
    # depends on the machine's library.
    while half < side:
        pairs = rows.view(count, side // (2 * half), 2, half)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        half *= 2
    return rows.reshape(count, side) * (1 / math.sqrt(side))
