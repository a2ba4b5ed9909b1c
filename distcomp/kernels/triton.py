"""The kernels in Triton, for a GPU: one pass over memory, and the bits of the reference.

Whole blocks of a whole number of bytes per plane (``block % 8 == 0``, at most :data:`LARGEST_TILE`) take the
fast path: a few blocks are the rows of a tile of registers that one warp scales, rounds, packs and stores.
Anything else (the short last block, an odd block size, a huge one) takes the general path: to encode, one
program for each block, in loops; to decode, each element finds the bytes it lies in.

Launched with ``enable_fp_fusion=False``: a multiply and an add contracted by the compiler would give other
bits than the CPU.
"""

# Triton's own language is not typed; the five functions at the end are.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from distcomp.kernels.packing import Coding, block_bytes
from distcomp.kernels.reference import block_l2, exponents, permuted, scale_by_exponents

# A few torch operations, each one pass over memory that a GPU is fast at: no kernel of their own.
__all__ = ["all_finite", "checksum", "dequantize", "exponents", "permuted", "quantize"]
__all__ += ["scale_by_exponents"]

LARGEST_TILE = 8192
TILE = 2048  # elements that one warp keeps in registers
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves an integer in the low bits of a float
LANES = tl.constexpr(16)


@triton.jit
def _random_24(counter, key_low, key_high):
    """Keyed lowbias32: 24 bits of it."""
    x = counter + key_low
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x ^= key_high ^ (key_high >> 15)  # what (x ^ key_high) ^ (x ^ key_high) >> 15 comes to, in fewer steps
    x *= 0x846CA68B
    x ^= x >> 16
    return x >> 8


@triton.jit
def _codes(
    x, inverse, counter, key_low, key_high, bits: tl.constexpr, stochastic: tl.constexpr, powers: tl.constexpr
):
    """The integers of ``x``, 0 .. 2s, in the low bytes; NaN becomes 2s: minimum() is the other one.
    ``inverse`` is the scale itself at one bit and for ``powers`` of two."""
    if bits == 1:
        return (x >= 0).to(tl.int32)
    if powers:
        return _power_codes(x, inverse, counter, key_low, key_high, bits)
    s: tl.constexpr = (1 << (bits - 1)) - 1
    y = tl.maximum(tl.minimum(x * inverse, 1.0 * s), -1.0 * s)
    if stochastic:  # reference.round_at_random: a sum with 24 bits after the point, in which s comes along
        fixed = (y * 16777216.0).to(tl.int32).to(tl.uint32, bitcast=True) + (s << 24)
        return ((fixed + _random_24(counter, key_low, key_high)) >> 24).to(tl.int32)
    return (y + MAGIC).to(tl.int32, bitcast=True) + s


@triton.jit
def _power_codes(x, scale, counter, key_low, key_high, bits: tl.constexpr):
    """reference.round_to_powers: a carry out of the mantissa rounds; below the lowest level there is zero."""
    s: tl.constexpr = (1 << (bits - 1)) - 1
    divisor = tl.where(scale < 2.0**-120, float("inf"), scale) + tl.zeros_like(x)
    share = tl.div_rn(tl.abs(x), divisor)
    share = tl.where(share < 1.0, share, 1.0)  # a NaN, too
    noise = _random_24(counter, key_low, key_high)
    above = ((share.to(tl.uint32, bitcast=True) + (noise >> 1)) >> 23).to(tl.int32) - (127 - s)
    small = tl.where(share < 2.0 ** (1 - s), share, 0.0)
    fixed = (small * 2.0 ** (s - 1) * 16777216.0).to(tl.int32).to(tl.uint32, bitcast=True)
    below = ((fixed + noise) >> 24).to(tl.int32)
    level = tl.where(share < 2.0 ** (1 - s), below, above)
    return level + tl.where((x < 0) & (level > 0), s, 0)


@triton.jit
def _magnitude(x):
    """|x| as an integer that orders as |x| does, with inf and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _settled(largest):
    """The scale of a block whose largest magnitude is this integer; a tiny one is zero."""
    scale = largest.to(tl.float32, bitcast=True)
    return tl.where(scale < 2.0**-120, 0.0, scale)


@triton.jit
def _inverse(scale, bits: tl.constexpr):
    """s / scale, or 0 for a tiny scale."""
    s: tl.constexpr = (1 << (bits - 1)) - 1
    tiny = scale < 2.0**-120
    levels = tl.full(scale.shape, s, tl.float32)
    return tl.where(tiny, 0.0, tl.div_rn(levels, tl.where(tiny, 1.0, scale)))


@triton.jit
def _folded(lanes, rows: tl.constexpr):
    """(rows, 16) -> (rows,): lane i plus lane i + half, four times; a sum of two has only one order."""
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 8)), 1)
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 4)), 1)
    lanes = tl.sum(tl.reshape(lanes, (rows, 2, 2)), 1)
    return tl.sum(lanes, 1)


@triton.jit
def _unsigned(value):
    """A 32-bit argument as unsigned; it comes signed, so that its type does not depend on its value."""
    return tl.cast(value, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["rows_all", "key_low", "key_high", "first"])
def _quantize_tiles(
    x_at, codes_at, scales_at, rows_all, key_low, key_high, first,
    block: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr,
    bits: tl.constexpr, stochastic: tl.constexpr, given: tl.constexpr, powers: tl.constexpr,
):  # fmt: skip
    """``rows`` blocks as a (rows, 8, padded) tile: element p * block / 8 + j of a block is at (p, j)."""
    height: tl.constexpr = block // 8
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    j = tl.arange(0, padded)[None, None, :]
    element = row[:, None, None] * block + tl.arange(0, 8)[None, :, None] * height + j
    alive = (row[:, None, None] < rows_all) & (j < height)
    x = tl.load(x_at + element, mask=alive, other=0.0)
    if given:
        scale = tl.load(scales_at + row, mask=row < rows_all, other=0.0)
    elif bits == 1:
        lanes = tl.zeros((rows, LANES), tl.float32)
        for start in tl.static_range(0, block, LANES):
            place = start + tl.arange(0, LANES)[None, :]
            inside = (row[:, None] < rows_all) & (place < block)
            lanes += tl.abs(tl.load(x_at + row[:, None] * block + place, mask=inside, other=0.0))
        total = _folded(lanes, rows)
        scale = tl.div_rn(total, tl.full(total.shape, block, tl.float32))
    else:
        scale = _settled(tl.max(tl.reshape(_magnitude(x), (rows, 8 * padded)), 1))
    if not given:
        tl.store(scales_at + row, scale, mask=row < rows_all)
    inverse = scale[:, None, None] if bits == 1 or powers else _inverse(scale, bits)[:, None, None]
    counter = _unsigned(first) + element.to(tl.uint32)
    codes = _codes(x, inverse, counter, _unsigned(key_low), _unsigned(key_high), bits, stochastic, powers)
    for i in tl.static_range(4):
        if bits & (8 >> i):
            _store_part(codes, codes_at, row, rows_all, height, padded, rows, bits, 8 >> i)


@triton.jit
def _store_part(
    codes, codes_at, row, rows_all,
    height: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Store the part of ``width`` bits of a tile: the sum of its planes, each shifted to its place."""
    planes: tl.constexpr = 8 // width
    part = tl.reshape(_part(codes, bits, width), (rows, planes, width, padded))
    part = tl.sum(part << (tl.arange(0, planes)[None, :, None, None] * width), 1)
    byte, alive = _part_bytes(row, rows_all, height, padded, bits, width)
    tl.store(codes_at + byte, part.to(tl.uint8), mask=alive)


@triton.jit
def _part(codes, bits: tl.constexpr, width: tl.constexpr):
    """The bits of each code that belong to the part of this width: above those of the wider parts."""
    return (codes >> (bits & ~(2 * width - 1))) & ((1 << width) - 1)


@triton.jit
def _part_bytes(
    row, rows_all,
    height: tl.constexpr, padded: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """(rows, width, padded): where the bytes of a part lie, and which of them there are."""
    j = tl.arange(0, padded)[None, None, :]
    plane = (bits & ~(2 * width - 1)) + tl.arange(0, width)[None, :, None]
    byte = row[:, None, None] * (height * bits) + plane * height + j
    return byte, (row[:, None, None] < rows_all) & (j < height)


@triton.jit
def _value(code, unit, bits: tl.constexpr, powers: tl.constexpr):
    """What a code stands for."""
    if powers:
        s: tl.constexpr = (1 << (bits - 1)) - 1
        level = tl.where(code > s, code - s, code).to(tl.int32)
        share = tl.where(level > 0, ((level + (127 - s)) << 23).to(tl.float32, bitcast=True), 0.0)
        return tl.where(code > s, -share, share) * unit
    if bits == 1:
        return (2 * code - 1).to(tl.float32) * unit
    return (code - ((1 << (bits - 1)) - 1)).to(tl.float32) * unit


@triton.jit
def _unit(scale, bits: tl.constexpr, powers: tl.constexpr):
    """scale / s."""
    if bits == 1 or powers:
        return scale
    return tl.div_rn(scale, tl.full(scale.shape, (1 << (bits - 1)) - 1, tl.float32))


@triton.jit
def _put(out_at, alive, value, times, sign: tl.constexpr):
    """Overwrite, add or subtract; then scale."""
    if sign > 0:
        value = tl.load(out_at, mask=alive) + value
    if sign < 0:
        value = tl.load(out_at, mask=alive) - value
    tl.store(out_at, value * times, mask=alive)


@triton.jit(do_not_specialize=["rows_all"])
def _dequantize_tiles(
    codes_at, scales_at, out_at, rows_all, times,
    block: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr,
    bits: tl.constexpr, powers: tl.constexpr, sign: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`_quantize_tiles`: each byte is spread over the planes it carries."""
    height: tl.constexpr = block // 8
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    code = tl.zeros((rows, 8, padded), tl.int32)
    for i in tl.static_range(4):
        if bits & (8 >> i):
            code |= _load_part(codes_at, row, rows_all, height, padded, rows, bits, 8 >> i)
    unit = _unit(tl.load(scales_at + row, mask=row < rows_all, other=0.0), bits, powers)
    j = tl.arange(0, padded)[None, None, :]
    element = row[:, None, None] * block + tl.arange(0, 8)[None, :, None] * height + j
    alive = (row[:, None, None] < rows_all) & (j < height)
    _put(out_at + element, alive, _value(code, unit[:, None, None], bits, powers), times, sign)


@triton.jit
def _load_part(
    codes_at, row, rows_all,
    height: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, bits: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """(rows, 8, padded): the bits of one part, at their place in the code."""
    planes: tl.constexpr = 8 // width
    byte, alive = _part_bytes(row, rows_all, height, padded, bits, width)
    packed = tl.load(codes_at + byte, mask=alive, other=0).to(tl.int32)[:, None, :, :]
    part = (packed >> (tl.arange(0, planes)[None, :, None, None] * width)) & ((1 << width) - 1)
    return tl.reshape(part, (rows, 8, padded)) << (bits & ~(2 * width - 1))


@triton.jit(do_not_specialize=["block", "key_low", "key_high", "first"])
def _quantize_any(
    x_at, codes_at, scales_at, block, key_low, key_high, first,
    bits: tl.constexpr, stochastic: tl.constexpr, given: tl.constexpr, powers: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    """One block of any length, in chunks."""
    row = tl.program_id(0).to(tl.int64)
    x_at += row * block
    scale = _scale_of(x_at, scales_at + row, block, bits, given, chunk)
    inverse = scale if bits == 1 or powers else _inverse(scale, bits)
    counter = _unsigned(first) + (row * block).to(tl.uint32)
    codes_at += row * _packed_bytes(block, bits)
    for i in tl.static_range(4):
        if bits & (8 >> i):
            height = tl.cdiv(block, 1 << i)
            for start in range(0, height, chunk):
                j = start + tl.arange(0, chunk)
                byte = tl.zeros((chunk,), tl.int32)
                for p in tl.static_range(1 << i):
                    element = p * height + j
                    inside = (j < height) & (element < block)
                    x = tl.load(x_at + element, mask=inside, other=0.0)
                    at = counter + element.to(tl.uint32)
                    keys = _unsigned(key_low), _unsigned(key_high)
                    code = _codes(x, inverse, at, keys[0], keys[1], bits, stochastic, powers)
                    byte |= tl.where(inside, _part(code, bits, 8 >> i) << (p * (8 >> i)), 0)
                tl.store(codes_at + j, byte.to(tl.uint8), mask=j < height)
            codes_at += height


@triton.jit
def _packed_bytes(block, bits: tl.constexpr):
    """packing.block_bytes, where the length is only known on the device."""
    total = 0
    for i in tl.static_range(4):
        if bits & (8 >> i):
            total += tl.cdiv(block, 1 << i)
    return total


@triton.jit
def _scale_of(x_at, scale_at, block, bits: tl.constexpr, given: tl.constexpr, chunk: tl.constexpr):
    """(1,): the scale of one block of any length, read or computed and stored."""
    one = tl.arange(0, 1)
    if given:
        return tl.load(scale_at + one)
    if bits == 1:
        lanes = tl.zeros((1, LANES), tl.float32)
        for start in range(0, block, LANES):
            place = start + tl.arange(0, LANES)[None, :]
            lanes += tl.abs(tl.load(x_at + place, mask=place < block, other=0.0))
        scale = tl.div_rn(_folded(lanes, 1), tl.zeros((1,), tl.float32) + block)
    else:
        largest = tl.zeros((1, chunk), tl.int32)
        for start in range(0, block, chunk):
            j = start + tl.arange(0, chunk)[None, :]
            x = tl.load(x_at + j, mask=j < block, other=0.0)
            largest = tl.maximum(largest, _magnitude(x))
        scale = _settled(tl.max(largest, 1))
    tl.store(scale_at + one, scale)
    return scale


@triton.jit(do_not_specialize=["numel", "block"])
def _dequantize_any(
    codes_at, scales_at, out_at, numel, block, times,
    bits: tl.constexpr, powers: tl.constexpr, sign: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Whole blocks of any one length, element by element: each finds the bytes that its parts lie in."""
    start = tl.program_id(0).to(tl.int64) * tile
    index = start + tl.arange(0, tile)
    alive = index < numel
    row, j = index // block, index % block
    codes_at += row * _packed_bytes(block, bits)
    code = tl.zeros((tile,), tl.int64)
    for i in tl.static_range(4):
        if bits & (8 >> i):
            height = tl.cdiv(block, 1 << i)
            byte = tl.load(codes_at + j % height, mask=alive, other=0).to(tl.int64)
            part = (byte >> (j // height * (8 >> i))) & ((1 << (8 >> i)) - 1)
            code |= part << (bits & ~((16 >> i) - 1))
            codes_at += height
    unit = _unit(tl.load(scales_at + row, mask=alive, other=0.0), bits, powers)
    _put(out_at + index, alive, _value(code, unit, bits, powers), times, sign)


@triton.jit
def _find_non_finite(x_at, found_at, numel, exponent: tl.constexpr, tile: tl.constexpr):
    """Sets the flag where all exponent bits of a value are set."""
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    x = tl.load(x_at + index, mask=index < numel, other=0)
    bad = tl.max(((x & exponent) == exponent).to(tl.int32), 0)
    if bad != 0:
        tl.store(found_at, 1)


@triton.jit
def _add_sums(data_at, sums_at, size_bytes, tile: tl.constexpr):
    """Adds a tile's words, plain and weighted, to two counters that wrap at 2^32 (so in any order)."""
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    word = tl.zeros((tile,), tl.uint32)
    for i in tl.static_range(4):
        byte = tl.load(data_at + 4 * index + i, mask=4 * index + i < size_bytes, other=0)
        word |= byte.to(tl.uint32) << (8 * i)
    weighted = (index + 1).to(tl.uint32) * word
    tl.atomic_add(sums_at, tl.sum(word.to(tl.int64), 0).to(tl.int32))
    tl.atomic_add(sums_at + 1, tl.sum(weighted.to(tl.int64), 0).to(tl.int32))


def quantize(
    x: Tensor, codes: Tensor, scales: Tensor, *,
    block: int, bits: int, key: int, first: int, coding: Coding,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.quantize`."""
    stochastic, norm, powers = coding
    if norm == "l2" and bits > 1:  # in float64, of which a GPU has too few units for a kernel
        for start, row, rows, m in _runs(x.numel(), block):
            scales[row : row + rows] = block_l2(x[start : start + rows * m].view(rows, m))
    settings = {"bits": bits, "stochastic": stochastic, "powers": powers, "enable_fp_fusion": False}
    settings["given"] = norm == "given" or (norm == "l2" and bits > 1)
    for start, row, rows, m in _runs(x.numel(), block):
        at = x[start:], codes[row * block_bytes(block, bits) :], scales[row:]
        counters = _signed(key), _signed(key >> 32), _signed(first + start)
        with torch.cuda.device_of(x):
            if m == block and m % 8 == 0 and m <= LARGEST_TILE:
                padded, tile_rows, warps = _tile(m)
                _quantize_tiles[(triton.cdiv(rows, tile_rows),)](
                    *at, rows, *counters, block=m, padded=padded, rows=tile_rows, num_warps=warps, **settings
                )
            else:
                _quantize_any[(rows,)](*at, m, *counters, chunk=512, **settings)


def dequantize(
    codes: Tensor, scales: Tensor, out: Tensor, *,
    block: int, bits: int, powers: bool, sign: int, times: float,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.dequantize`."""
    settings = {"bits": bits, "powers": powers, "sign": sign, "enable_fp_fusion": False}
    for start, row, rows, m in _runs(out.numel(), block):
        at = codes[row * block_bytes(block, bits) :], scales[row:], out[start:]
        with torch.cuda.device_of(out):
            if m == block and m % 8 == 0 and m <= LARGEST_TILE:
                padded, tile_rows, warps = _tile(m)
                _dequantize_tiles[(triton.cdiv(rows, tile_rows),)](
                    *at, rows, times, block=m, padded=padded, rows=tile_rows, num_warps=warps, **settings
                )
            else:
                _dequantize_any[(triton.cdiv(rows * m, 512),)](*at, rows * m, m, times, tile=512, **settings)


def all_finite(x: Tensor) -> bool:
    """See :func:`distcomp.kernels.all_finite`."""
    integers, exponent = INTEGERS[x.dtype]
    found = torch.zeros(1, dtype=torch.int32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(x.numel(), TILE),)
            _find_non_finite[grid](x.view(integers), found, x.numel(), exponent=exponent, tile=TILE)
    return not found.item()


def checksum(data: Tensor) -> int:
    """See :func:`distcomp.kernels.checksum`."""
    sums = torch.zeros(2, dtype=torch.int32, device=data.device)
    if data.numel():
        with torch.cuda.device_of(data):
            _add_sums[(triton.cdiv(data.numel(), 4 * TILE),)](data, sums, data.numel(), tile=TILE)
    total, weighted = (value & 0xFFFFFFFF for value in sums.tolist())
    return int(weighted << 32 | total)


INTEGERS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def _runs(numel: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """(first element, first row, rows, length of each): the whole blocks, then the short one, if any."""
    whole, rest = divmod(numel, block)
    if whole:
        yield 0, 0, whole, block
    if rest:
        yield whole * block, whole, 1, rest


def _tile(block: int) -> tuple[int, int, int]:
    """(plane length padded to a power of two, blocks in a tile, warps for a tile)."""
    padded = triton.next_power_of_2(block // 8)
    return padded, max(1, TILE // (8 * padded)), max(1, 8 * padded // TILE)


def _signed(value: int) -> int:
    """The low 32 bits, as the int32 with the same bits."""
    return (value + 2**31) % 2**32 - 2**31
