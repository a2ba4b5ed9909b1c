"""Floats of 4 and 8 bits in Triton, for a GPU: the bits of :mod:`distcomp.kernels.minifloat`'s reference.

Each program makes a tile of bytes: of one code, or of two neighbouring codes of 4 bits. Launched with
``enable_fp_fusion=False``: a contracted multiply-add would give other bits than the CPU.
"""

# Triton's own language is not typed; the two functions at the end are.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from distcomp.kernels.minifloat import Minifloat
from distcomp.kernels.triton import MAGIC, _random_24, _signed, _unsigned

TILE = 1024


@triton.jit
def _code(
    x_at, inverses_at, element, numel, block, key_low, key_high, first, largest,
    width: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr,
    infinity: tl.constexpr, nan: tl.constexpr, stochastic: tl.constexpr,
):  # fmt: skip
    """The codes of these elements; 0 beyond the last."""
    alive = element < numel
    bits = tl.load(x_at + element, mask=alive, other=0.0).to(tl.int32, bitcast=True)
    inverse = tl.load(inverses_at + element // block, mask=alive, other=0.0)
    magnitude = bits & 0x7FFFFFFF
    y = magnitude.to(tl.float32, bitcast=True) * inverse
    y = tl.where(y < largest, y, largest)
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) >> 23, 128 - bias)
    steps = y * ((254 + mantissa - exponent) << 23).to(tl.float32, bitcast=True)
    if stochastic:
        fixed = (steps * 16777216.0).to(tl.int32).to(tl.uint32, bitcast=True)
        counter = _unsigned(first) + element.to(tl.uint32)
        n = ((fixed + _random_24(counter, _unsigned(key_low), _unsigned(key_high))) >> 24).to(tl.int32)
    else:
        n = (steps + MAGIC).to(tl.int32, bitcast=True) - 0x4B400000
    code = ((exponent - (128 - bias)) << mantissa) + n
    code = tl.where(magnitude == 0x7F800000, infinity, code)
    code = tl.where(magnitude > 0x7F800000, nan, code)
    code |= tl.where(bits < 0, 1 << (width - 1), 0)
    return tl.where(alive, code, 0)


@triton.jit(do_not_specialize=["numel", "block", "key_low", "key_high", "first"])
def _encode(
    x_at, inverses_at, codes_at, numel, block, key_low, key_high, first, largest,
    width: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr,
    infinity: tl.constexpr, nan: tl.constexpr, stochastic: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of bytes."""
    byte = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    if width == 8:
        value = _code(
            x_at, inverses_at, byte, numel, block, key_low, key_high, first, largest,
            width, mantissa, bias, infinity, nan, stochastic,
        )  # fmt: skip
        tl.store(codes_at + byte, value.to(tl.uint8), mask=byte < numel)
    else:
        low = _code(
            x_at, inverses_at, 2 * byte, numel, block, key_low, key_high, first, largest,
            width, mantissa, bias, infinity, nan, stochastic,
        )  # fmt: skip
        high = _code(
            x_at, inverses_at, 2 * byte + 1, numel, block, key_low, key_high, first, largest,
            width, mantissa, bias, infinity, nan, stochastic,
        )  # fmt: skip
        tl.store(codes_at + byte, (low | (high << 4)).to(tl.uint8), mask=2 * byte < numel)


@triton.jit(do_not_specialize=["numel", "block"])
def _decode(
    codes_at, units_at, out_at, numel, block,
    width: tl.constexpr, mantissa: tl.constexpr, bias: tl.constexpr,
    infinity: tl.constexpr, finite: tl.constexpr, sign: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of elements. ``infinity`` is -1 where there is none."""
    element = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    alive = element < numel
    if width == 8:
        code = tl.load(codes_at + element, mask=alive, other=0).to(tl.int32)
    else:
        code = tl.load(codes_at + element // 2, mask=alive, other=0).to(tl.int32)
        code = (code >> (4 * (element % 2)).to(tl.int32)) & 15
    magnitude = code & ((1 << (width - 1)) - 1)
    field = magnitude >> mantissa
    n = (magnitude & ((1 << mantissa) - 1)) | tl.where(field > 0, 1 << mantissa, 0)
    exponent = tl.maximum(field, 1) + (127 - bias - mantissa)
    value = (n.to(tl.float32) * (exponent << 23).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    value = tl.where(magnitude >= finite, tl.where(magnitude == infinity, 0x7F800000, 0x7FC00000), value)
    value |= (code >> (width - 1)) << 31
    unit = tl.load(units_at + element // block, mask=alive, other=0.0)
    product = value.to(tl.float32, bitcast=True) * unit
    if sign > 0:
        product = tl.load(out_at + element, mask=alive) + product
    if sign < 0:
        product = tl.load(out_at + element, mask=alive) - product
    tl.store(out_at + element, product, mask=alive)


def encode(
    x: Tensor, inverses: Tensor, codes: Tensor, block: int, kind: Minifloat, key: int | None, first: int
) -> None:
    """See :func:`distcomp.kernels.minifloat.reference_encode`."""
    if not x.numel():
        return
    number = key or 0
    with torch.cuda.device_of(x):
        _encode[(triton.cdiv(codes.numel(), TILE),)](
            x, inverses, codes, x.numel(), block, _signed(number), _signed(number >> 32), _signed(first),
            kind.largest, width=kind.width, mantissa=kind.mantissa, bias=kind.bias, infinity=kind.infinity,
            nan=kind.nan, stochastic=key is not None, tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip


def decode(codes: Tensor, units: Tensor, out: Tensor, block: int, kind: Minifloat, sign: int) -> None:
    """See :func:`distcomp.kernels.minifloat.reference_decode`."""
    if not out.numel():
        return
    infinity = kind.infinity if kind.infinity < kind.nan else -1
    with torch.cuda.device_of(out):
        _decode[(triton.cdiv(out.numel(), TILE),)](
            codes, units, out, out.numel(), block, width=kind.width, mantissa=kind.mantissa, bias=kind.bias,
            infinity=infinity, finite=kind.finite, sign=sign, tile=TILE, enable_fp_fusion=False,
        )  # fmt: skip
