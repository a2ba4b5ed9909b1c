"""Integers of up to 31 bits, packed, and rounding to an absolute grid.

Torch says it here, C does it in one pass (``_integers.c``), bit for bit alike. The codes of a whole buffer
are one block: first the low bytes of all, one plane after the other, while more than 15 bits are left; then
the rest in the planar layout of :mod:`distcomp.kernels.packing`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from distcomp.kernels import reference
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.packing import block_bytes
from distcomp.kernels.tables import check_tensor, lines_of

WIDEST_PLANES = 15
"""Bits that the planar layout of the kernels holds (8 + 4 + 2 + 1)."""
LINE_BYTES = 24


def integer_bytes(numel: int, bits: int) -> int:
    """Bytes of ``numel`` packed codes of ``bits`` bits: ``numel bits / 8``, rounded up."""
    low = _low_bytes(bits)
    return low * numel + block_bytes(numel, bits - 8 * low)


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """int64 codes in ``0 .. 2^bits - 1``, ``[numel]`` -> uint8 ``[integer_bytes]``; up to 31 bits."""
    if served_by_c(codes):
        from distcomp.kernels import _cpu

        codes = codes.contiguous()
        packed = torch.empty(integer_bytes(codes.numel(), bits), dtype=torch.uint8)
        check_tensor("codes", codes, torch.int64, 0)
        sizes = codes.numel(), packed.numel()
        _cpu.pack_integers(codes.data_ptr(), packed.data_ptr(), sizes, bits, False)
        return packed
    low = _low_bytes(bits)
    planes = [(codes >> (8 * byte) & 255).to(torch.uint8) for byte in range(low)]
    rest = (codes >> (8 * low)).view(1, -1)
    return torch.cat([*planes, reference.pack_codes(rest, bits - 8 * low).view(-1)])


def unpack_integers(packed: Tensor, numel: int, bits: int) -> Tensor:
    """What :func:`pack_integers` was given: int64 ``[numel]``."""
    if served_by_c(packed):
        from distcomp.kernels import _cpu

        packed, codes = packed.contiguous(), torch.empty(numel, dtype=torch.int64)
        check_tensor("packed codes", packed, torch.uint8, integer_bytes(numel, bits))
        _cpu.pack_integers(codes.data_ptr(), packed.data_ptr(), (numel, packed.numel()), bits, True)
        return codes
    low = _low_bytes(bits)
    rest = packed[low * numel :].view(1, -1)
    codes = reference.unpack_codes(rest, numel, bits - 8 * low).view(-1) << (8 * low)
    for byte in range(low):
        codes |= packed[byte * numel : (byte + 1) * numel].to(torch.int64) << (8 * byte)
    return codes


def grid_lines(places: Sequence[tuple[int, int, int]]) -> Tensor:
    """The table of pieces that :func:`grid_encode` takes: ``(at, numel, first)`` of each, in order."""
    return torch.tensor(list(places), dtype=torch.int64).reshape(-1, 3)


def grid_encode(
    x: Tensor, codes: Tensor, lines: Tensor, keys: Sequence[int], spacing: float, bits: int
) -> None:
    """Write ``clamp(floor(x / spacing + u), -s, s) + s`` into ``codes``, in ``bits`` bits.

    ``s = 2^(bits-1) - 1``; u is uniform in [0, 1), by the key of each piece. NaN takes the highest code.
    """
    check_tensor("values", x, torch.float32, x.numel())
    check_tensor("codes", codes, torch.uint8, integer_bytes(x.numel(), bits))
    if served_by_c(x):
        from distcomp.kernels import _cpu

        held = array("Q", keys)
        sizes, keys_at = (x.numel(), codes.numel()), held.buffer_info()[0]
        table = lines_of(lines, LINE_BYTES)
        _cpu.grid_encode(x.data_ptr(), codes.data_ptr(), sizes, *table, keys_at, spacing, bits)
        return
    pieces = zip(lines.tolist(), keys, strict=True)
    noise = [reference.uniform(numel, key, first, x.device) for (_, numel, first), key in pieces]
    s = (1 << (bits - 1)) - 1
    y = x / torch.full_like(x, spacing)  # by a Python number, torch on CUDA multiplies with the reciprocal
    y = torch.where(y < s, y, torch.full_like(y, s)).clamp_(min=-s)
    rounded = reference.round_at_random(y, torch.cat(noise)) if noise else y
    codes.copy_(pack_integers(rounded.to(torch.int64) + s, bits))


def grid_decode(codes: Tensor, out: Tensor, spacing: float, bits: int, sign: int) -> None:
    """Write into ``out`` what :func:`grid_encode` rounded to; ``sign`` +1 adds it, -1 subtracts it."""
    check_tensor("values", out, torch.float32, out.numel())
    check_tensor("codes", codes, torch.uint8, integer_bytes(out.numel(), bits))
    if served_by_c(out):
        from distcomp.kernels import _cpu

        _cpu.grid_decode(out.data_ptr(), codes.data_ptr(), (out.numel(), codes.numel()), spacing, bits, sign)
        return
    integers = unpack_integers(codes, out.numel(), bits) - ((1 << (bits - 1)) - 1)
    value = integers.float() * spacing
    out.copy_(out + value if sign > 0 else out - value if sign < 0 else value)


def _low_bytes(bits: int) -> int:
    return -(-max(0, bits - WIDEST_PLANES) // 8)
