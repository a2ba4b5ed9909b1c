"""Random rotations: rows of a flat buffer, turned by random signs and the Walsh-Hadamard transform.

``reference_rotate`` is the specification, in plain torch. ``_rotation.c`` (CPU) equals it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.kernels.dispatch import backend
from distcomp.kernels.reference import uniform
from distcomp.kernels.tables import check_tensor, lines_of

SIDE = 128
"""Values that are rotated together: a power of two, and a multiple of every usual block."""
LINE_ROWS = 512
"""Rows of a line of the table: a longer parameter is cut in several, which threads may share."""
LINE_BYTES = 32


def rotation_lines(places: Sequence[tuple[int, int, int]]) -> Tensor:
    """The table (int64, ``[lines, 4]``: at, rows, first, owner) of the whole rows in each parameter, of which
    ``places`` say ``(at, numel, first)``. Fewer values than a side, at a parameter's end, are in no row."""
    lines = [
        (at + SIDE * row, min(LINE_ROWS, numel // SIDE - row), first + SIDE * row, owner)
        for owner, (at, numel, first) in enumerate(places)
        for row in range(0, numel // SIDE, LINE_ROWS)
    ]
    return torch.tensor(lines, dtype=torch.int64).reshape(-1, 4)


def rotate(x: Tensor, lines: Tensor, keys: Tensor, back: bool = False, out: Tensor | None = None) -> None:
    """``H D x`` of every row, in place, or ``D H x``, which takes it back. H: orthonormal. ``D``: signs, a
    function of the parameter's key (int64, ``[parameters]``, on ``x``'s device) and the place in it.

    ``x``: float32, contiguous. ``out``: as long, where the rows are left then, and nothing of what is in no
    row. On every backend the same bits. Raises DistcompError for another tensor.
    """
    out = x if out is None else out
    check_tensor("values", x, torch.float32, 0)
    check_tensor("rotated values", out, torch.float32, x.numel())
    check_tensor("keys", keys, torch.int64, 0)
    table, count = lines_of(lines, LINE_BYTES)
    if not count:
        return
    if x.device.type != "cpu" or backend("cpu") != "cpu":
        reference_rotate(x, lines, keys, back, out)
        return
    from distcomp.kernels import _cpu, cpu

    at, size = (x.data_ptr(), out.data_ptr()), x.numel()
    keys_at, known = keys.data_ptr(), keys.numel()

    def run(start: int, some: int) -> None:
        _cpu.rotate(*at, size, table + LINE_BYTES * start, some, keys_at, known, back)

    cpu.shared(run, count, 1, 4 * size // count)


def reference_rotate(x: Tensor, lines: Tensor, keys: Tensor, back: bool, out: Tensor) -> None:
    """The specification of :func:`rotate`."""
    for at, count, first, owner in lines.tolist():
        rows, to = (one[at : at + SIDE * count].view(-1, SIDE) for one in (x, out))
        drawn = uniform(rows.numel(), keys[owner], first, x.device).view_as(rows)
        signs = torch.where(drawn < 0.5, -torch.ones_like(drawn), 1.0)
        to.copy_(hadamard(rows) * signs if back else hadamard(rows * signs))


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
