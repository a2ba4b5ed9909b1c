"""The specification of every kernel, in plain torch: the other backends equal it bit for bit.

Written to be read, not to be fast. Each fp32 operation is rounded on its own (nothing is contracted into a
fused multiply-add) and every sum has a fixed order, so any CPU and any GPU gives the same bytes. The one
freedom left to a backend is which of the NaNs a decoded NaN is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distcomp.kernels.packing import Coding, block_bytes, levels, parts

MASK = 0xFFFFFFFF
ONE = 2.0**24  # 1 in fixed point, with the 24 bits after the point that random numbers have
SMALLEST_SCALE = 2.0**-120  # below it s / scale could overflow; such a block is sent as zeros
LANES = 16
MANTISSA = 23  # bits of a float32's


def uniform(count: int, key: int | Tensor, first: int, device: torch.device) -> Tensor:
    """u_j = (hash(key, first + j mod 2^32) >> 8) / 2^24, in [0, 1). A key may be an int64 tensor.

    The hash is lowbias32 (C. Wellons' integer hash) with the low half of the 64-bit key added to its input
    and the high half mixed in between its two multiplications. int64 arithmetic stands in for uint32.
    """
    x = torch.arange(count, dtype=torch.int64, device=device) + ((first & MASK) + (key & MASK))
    x &= MASK
    x ^= x >> 16
    x = (x * 0x7FEB352D) & MASK
    x ^= (key >> 32) & MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & MASK
    x ^= x >> 16
    return (x >> 8).to(torch.float32) * 2.0**-24


def round_at_random(y: Tensor, u: Tensor) -> Tensor:
    """floor(y + u), added in fixed point: one of the two integers around ``y``, with E[result] = y.

    ``y`` keeps as many bits after the point as ``u`` has, 24 (what is finer is cut off, towards 0), so that
    the sum is exact. An integer stays what it is, however large; added in float32, ``2^15 + 0.999`` would be
    rounded up. It is the one stochastic rounding there is: of gradients on the wire and of numbers at rest.
    """
    below = torch.floor(y)
    fraction = torch.trunc(y * ONE) - below * ONE
    return below + (fraction + u * ONE >= ONE)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(rows, m) integers in 0 .. 2^bits - 1 -> (rows, bytes) uint8, each row one block."""
    rows, m = codes.shape
    planes, shift = [], 0
    for width in parts(bits):
        per_byte = 8 // width
        height = -(-m // per_byte)
        part = (codes >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, height * per_byte - m)).view(rows, per_byte, height)
        place = torch.arange(0, 8, width, device=codes.device).view(1, per_byte, 1)
        planes.append((part << place).sum(1).to(torch.uint8))
        shift += width
    return torch.cat(planes, dim=1)


def unpack_codes(packed: Tensor, m: int, bits: int) -> Tensor:
    """(rows, bytes) uint8 -> (rows, m) int64: what :func:`pack_codes` was given."""
    rows = packed.shape[0]
    codes = torch.zeros(rows, m, dtype=torch.int64, device=packed.device)
    shift = start = 0
    for width in parts(bits):
        per_byte = 8 // width
        height = -(-m // per_byte)
        plane = packed[:, start : start + height].to(torch.int64).view(rows, 1, height)
        place = torch.arange(0, 8, width, device=packed.device).view(1, per_byte, 1)
        part = (plane >> place) & (2**width - 1)
        codes |= part.view(rows, per_byte * height)[:, :m] << shift
        shift, start = shift + width, start + height
    return codes


def block_max(x: Tensor) -> Tensor:
    """(rows, m) -> (rows,): max |x| by the integer order of the bits, so that inf and NaN win; tiny -> 0."""
    scale = (x.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)
    return torch.where(scale < SMALLEST_SCALE, torch.zeros_like(scale), scale)


def block_mean(x: Tensor) -> Tensor:
    """(rows, m) -> (rows,): mean |x|."""
    return _divide(lane_sum(x.abs()), float(x.shape[1]))


def block_l2(x: Tensor) -> Tensor:
    """(rows, m) -> (rows,): the Euclidean norm, squares and sum in float64, where they fit; tiny -> 0."""
    norm = lane_sum(x.double().square()).sqrt().float()
    return torch.where(norm < SMALLEST_SCALE, torch.zeros_like(norm), norm)


def lane_sum(x: Tensor) -> Tensor:
    """(rows, m) -> (rows,): the sum, added in 16 lanes (element j in lane j % 16), then folded."""
    rows, m = x.shape
    lanes = torch.nn.functional.pad(x, (0, -m % LANES)).view(rows, -1, LANES)
    total = lanes[:, 0].clone()
    for i in range(1, lanes.shape[1]):
        total += lanes[:, i]
    half = LANES // 2
    while half:
        total = total[:, :half] + total[:, half : 2 * half]
        half //= 2
    return total[:, 0]


def quantize(
    x: Tensor, codes: Tensor, scales: Tensor, *,
    block: int, bits: int, key: int, first: int, coding: Coding,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.quantize`."""
    stochastic, norm, powers = coding
    for start, x_rows, code_rows, scale in _blocks(x, codes, scales, block, bits):
        if norm != "given":
            find = block_mean if bits == 1 else block_l2 if norm == "l2" else block_max
            scale.copy_(find(x_rows))
        if bits == 1:
            integers = (x_rows >= 0).to(torch.int64)
        else:
            noise = uniform(x_rows.numel(), key, first + start, x.device).view_as(x_rows)
            if powers:
                integers = round_to_powers(x_rows, scale, levels(bits), noise)
            else:
                integers = round_to_levels(x_rows, scale, levels(bits), noise if stochastic else None)
        code_rows.copy_(pack_codes(integers, bits))


def round_to_levels(x: Tensor, scale: Tensor, s: int, noise: Tensor | None) -> Tensor:
    """floor(clamp(x * (s / scale), -s, s) + u) + s, see :func:`round_at_random`; half to even without noise.

    NaN takes the top code.
    """
    safe = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    inverse = torch.where(scale < SMALLEST_SCALE, torch.zeros_like(scale), torch.full_like(scale, s) / safe)
    y = x * inverse.view(-1, 1)
    y = torch.where(y < s, y, torch.full_like(y, s)).clamp(min=-s)
    y = torch.round(y) if noise is None else round_at_random(y, noise)
    return y.to(torch.int64) + s


def round_to_powers(x: Tensor, scale: Tensor, s: int, noise: Tensor) -> Tensor:
    """The number of a level beside ``|x| / scale`` among ``0, 2^(1-s), ..., 1/2, 1``, at random so that the
    mean is right: 0..s, and s+1..2s for negative ones.

    From the lowest level up, a carry out of the mantissa rounds, as in :func:`exponents`; below it there are
    zero and that level. NaN takes the highest level.
    """
    divisor = torch.where(scale < SMALLEST_SCALE, torch.full_like(scale, float("inf")), scale)
    share = x.abs() / divisor.view(-1, 1)
    share = torch.where(share < 1, share, torch.ones_like(share))
    carried = share.view(torch.int32) + (noise * 2**MANTISSA).to(torch.int32)
    above = (carried >> MANTISSA) - (127 - s)  # 2^(1-s), the first level, has the exponent 128 - s
    below = round_at_random(share * 2.0 ** (s - 1), noise).to(torch.int32)
    level = torch.where(share < 2.0 ** (1 - s), below, above).to(torch.int64)
    return level + s * ((x < 0) & (level > 0))


def dequantize(
    codes: Tensor, scales: Tensor, out: Tensor, *,
    block: int, bits: int, powers: bool, sign: int, times: float,
) -> None:  # fmt: skip
    """See :func:`distcomp.kernels.dequantize`; ``sign`` is 0 to overwrite, +1 to add, -1 to subtract."""
    for _, out_rows, code_rows, scale in _blocks(out, codes, scales, block, bits):
        integers = unpack_codes(code_rows, out_rows.shape[1], bits)
        if powers:
            value = powers_of_two(integers, levels(bits)) * scale.view(-1, 1)
        else:
            centred = 2 * integers - 1 if bits == 1 else integers - levels(bits)
            value = centred.to(torch.float32) * _divide(scale, float(levels(bits))).view(-1, 1)
        if sign:
            value = out_rows + value if sign > 0 else out_rows - value
        out_rows.copy_(value * times)


def powers_of_two(codes: Tensor, s: int) -> Tensor:
    """What :func:`round_to_powers` rounded to, in units of the scale."""
    negative = codes > s
    level = torch.where(negative, codes - s, codes)
    power = ((level + (127 - s)) << MANTISSA).to(torch.int32).view(torch.float32)
    share = torch.where(level > 0, power, torch.zeros_like(power))
    return torch.where(negative, -share, share)


def all_finite(x: Tensor) -> bool:
    """See :func:`distcomp.kernels.all_finite`."""
    return bool(torch.isfinite(x).all())


def checksum(data: Tensor) -> int:
    """See :func:`distcomp.kernels.checksum`; products are split in halves so that int64 cannot overflow."""
    padded = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(-1, 4).to(torch.int64)
    place = torch.tensor([0, 8, 16, 24], device=data.device, dtype=torch.int64)
    words = (padded << place).sum(1)
    index = torch.arange(1, words.numel() + 1, device=data.device) & MASK
    products = index * (words & 0xFFFF) + ((index * (words >> 16) & 0xFFFF) << 16)
    total, weighted = int(words.sum()) & MASK, int((products & MASK).sum()) & MASK
    return weighted << 32 | total


def _divide(numerator: Tensor, denominator: float) -> Tensor:
    """A true fp32 division: by a Python number, torch on CUDA multiplies with a rounded reciprocal."""
    return numerator / torch.full_like(numerator, denominator)


def _blocks(
    x: Tensor, codes: Tensor, scales: Tensor, block: int, bits: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(start, values, codes, scales): all whole blocks as rows of one matrix, then the short one, if any."""
    whole, rest = divmod(x.numel(), block)
    start, code_start = whole * block, whole * block_bytes(block, bits)
    if whole:
        yield 0, x[:start].view(whole, block), codes[:code_start].view(whole, -1), scales[:whole]
    if rest:
        yield start, x[start:].view(1, rest), codes[code_start:].view(1, -1), scales[whole:]


def magnitudes(x: Tensor) -> Tensor:
    """The magnitudes of float32 as the integers that their bits are: an order without exceptions."""
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def permuted(count: int, numel: int, keys: tuple[int, ...]) -> Tensor:
    """The images of 0 .. count-1 under a keyed permutation of 0 .. numel-1.

    A Feistel network permutes the integers of as many bits as numel - 1 has: each half in turn is xored with
    a hash of the other. What falls outside is permuted again until it does not.
    """
    bits = (numel - 1).bit_length()
    places = _permuted_once(torch.arange(count), bits, keys)
    outside = (places >= numel).nonzero().view(-1)
    while outside.numel():
        places[outside] = _permuted_once(places[outside], bits, keys)
        outside = outside[places[outside] >= numel]
    return places


def _permuted_once(places: Tensor, bits: int, keys: tuple[int, ...]) -> Tensor:
    low_bits = bits // 2
    low, high = places & ((1 << low_bits) - 1), places >> low_bits
    for of_low, of_high in zip(keys[::2], keys[1::2], strict=True):
        high = high ^ (_hashed(low, of_low) & ((1 << (bits - low_bits)) - 1))
        low = low ^ (_hashed(high, of_high) & ((1 << low_bits) - 1))
    return (high << low_bits) | low


def _hashed(x: Tensor, key: int) -> Tensor:
    """lowbias32 of ``x`` and a key, as in :func:`uniform`."""
    x = (x + (key & MASK)) & MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (key >> 32)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    hashed: Tensor = x ^ (x >> 16)
    return hashed


LARGEST_EXPONENT = 254


def exponents(x: Tensor, codes: Tensor, *, key: int, first: int) -> None:
    """The byte of the exponent, after 23 random bits were added to the mantissa."""
    # int64, for the sum of a NaN and noise may need 33 bits
    noise = (uniform(x.numel(), key, first, x.device) * 2**MANTISSA).to(torch.int64)
    codes.copy_(((magnitudes(x) + noise) >> MANTISSA).clamp_(max=LARGEST_EXPONENT))


def scale_by_exponents(codes: Tensor, out: Tensor) -> None:
    """``out`` times the powers of two that ``codes`` are the exponents of."""
    out.mul_((codes.to(torch.int32) << MANTISSA).view(torch.float32))
