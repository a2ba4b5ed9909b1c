"""Levels that are powers of two: natural compression, natural dithering and NUQSGD."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.compressors.base import Compressor, register_compressor
from distcomp.compressors.grid import from_rows, pack_signs, sign_bytes, to_rows, uniform_noise, unpack_signs
from distcomp.compressors.quantize import worst_variance
from distcomp.errors import DistcompError
from distcomp.kernels import reference
from distcomp.kernels.packing import block_bytes
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

MANTISSA = reference.MANTISSA
SMALLEST_SCALE = reference.SMALLEST_SCALE


@register_compressor("natural")
@dataclass(frozen=True)
class Natural(Compressor):
    """Round each value to one of the two powers of two around it, at random so that the mean is right.

    For ``2^a <= |x| < 2^(a+1)``::

        C(x) = sign(x) 2^(a + b),    b in {0, 1},    P(b = 1) = |x| / 2^a - 1;      omega = 1/8

    What stays of a float32 is its sign and its exponent: 9 bits. The code *is* the exponent's byte after a
    23-bit random number was added to the mantissa (a carry rounds up), so it is exact over the whole range:
    below ``2^-126`` values are rounded to 0 or to ``2^-126``, still with the right mean; above ``2^127`` to
    ``2^127``, because ``2^128`` is not finite.

    On the wire: 9/8 bytes per value; first the exponents, then the packed signs (sign(0) = +1, which decodes
    to 0).

    Source: Horváth et al., "Natural compression for distributed deep learning", 2019. Eight bits or fewer,
    which need a scale: :class:`NonUniform`. (GRACE clips the exponent to fit 8 bits, which is biased outside
    ``2^-109 .. 2^17``, has no zero, and doubles exact powers of two.)
    """

    unbiased = True

    def parts(self, layout: Layout) -> Parts:
        return (Part("codes", torch.uint8, layout.numel + sign_bytes(layout.numel)),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        codes = payload["codes"]
        for (param, piece), at in zip(layout.pieces(x), layout.offsets, strict=True):
            bits = key.fold(param.name).bits
            kernels.exponents(piece, codes[at : at + param.numel], key=bits, first=param.start)
        pack_signs(x, codes[x.numel() :])
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        codes = payload["codes"]
        values = torch.empty_like(out) if add else out
        # Signs first, as +1 and -1: scaling by an exponent keeps them, and makes the +1 of a zero a zero.
        unpack_signs(codes[out.numel() :], values)
        kernels.scale_by_exponents(codes[: out.numel()], values)
        if add:
            out += values

    def omega(self, numel: int) -> float:
        """``(x - 2^a)(2^(a+1) - x) <= x^2 / 8``, for values of ``2^-126`` and more."""
        return 1 / 8


@register_compressor("nonuniform")
@dataclass(frozen=True)
class NonUniform(Compressor):
    """Round ``|x|/norm`` at random to a level beside it, ``0, 2^(1-s), ..., 1/2, 1``: the mean is right.

    For a block ``v`` of ``block`` values and ``s = 2^(bits-1) - 1`` levels above zero::

        l <= |v_k|/|v| <= u    neighbours among the levels
        C(v)_k = |v| sign(v_k) u  with probability (|v_k|/|v| - l) / (u - l),  else  |v| sign(v_k) l

    where ``|v|`` is the largest magnitude (``norm="max"``) or the Euclidean norm (``norm="l2"``). Small
    values, which are most of a gradient, meet finer levels than in QSGD of the same width. ``bits`` counts
    the sign. On the wire: ``bits/8`` bytes per value and 4 per block; the payload: ``scales``, float32, one a
    block, and ``codes``, uint8. A block whose scale is below ``2^-120`` is sent as zeros.

    Source: Ramezani-Kebrya et al., "NUQSGD", JMLR 2021 (``norm="l2"``); Horváth et al. 2019, natural
    dithering (``norm="max"``). We differ: fixed-width codes (the papers entropy-code), blocks.

    Raises DistcompError for bits outside 2..8, a block below 1, or an unknown norm.
    """

    bits: int = 4
    block: int = 512
    norm: str = "l2"

    unbiased = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise DistcompError(
                f"a sign and a power of two take 2 to 8 bits, not {self.bits}; without a scale 9 (natural)"
            )
        if self.block < 1:
            raise DistcompError(f"a block holds at least one value, not {self.block}; the default is 512")
        if self.norm not in ("max", "l2"):
            raise DistcompError(f"the norms are max and l2, not {self.norm!r}")

    @property
    def alignment(self) -> int:  # type: ignore[override]
        return self.block

    @property
    def levels(self) -> int:
        """Levels above zero."""
        return (1 << (self.bits - 1)) - 1

    def parts(self, layout: Layout) -> Parts:
        return (
            Part("scales", torch.float32, layout.block_count(self.block)),
            Part("codes", torch.uint8, block_bytes(layout.numel, self.bits)),
        )

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        rows = to_rows(x, layout, layout.within(self.block))
        norms = _norms(rows, self.norm)
        payload["scales"].copy_(norms)
        # Clamped, for a quotient of two numbers that are nearly equal may round to just above 1.
        share = from_rows(rows.abs() / norms.clamp(min=SMALLEST_SCALE)[:, None], layout).clamp_(max=1.0)
        levels = self._round(share, uniform_noise(layout, key, x.device))
        codes = torch.where(
            (x < 0) & (levels > 0), self.levels + levels, levels
        )  # 0..s, or s+1..2s: negative
        payload["codes"].copy_(reference.pack_codes(codes[None], self.bits)[0])
        return payload

    def _round(self, share: Tensor, noise: Tensor) -> Tensor:
        """The number of the level, 0..s, for shares in [0, 1].

        From ``2^(1-s)`` up the number is the exponent after a carry out of the mantissa (as in
        :class:`Natural`); below it there are two levels, zero and the first.
        """
        s = self.levels
        # As in the kernel of Natural: noise below one unit of the exponent, so that it carries once or not.
        carried = share.view(torch.int32) + (noise * 2**MANTISSA).to(torch.int32)
        above = (carried >> MANTISSA) - (127 - s)  # 2^(1-s), the first level, has the exponent 128 - s
        below = reference.round_at_random(share * 2.0 ** (s - 1), noise).to(torch.int32)
        return torch.where(share < 2.0 ** (1 - s), below, above).clamp_(0, s).to(torch.int64)

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        codes = reference.unpack_codes(payload["codes"][None], layout.numel, self.bits)[0]
        negative = codes > self.levels
        levels = torch.where(negative, codes - self.levels, codes)
        exponents = (levels + (127 - self.levels)).to(torch.int32) << MANTISSA
        share = torch.where(levels > 0, exponents.view(torch.float32), 0.0)
        share = torch.where(negative, -share, share)
        value = from_rows(
            to_rows(share, layout, layout.within(self.block)) * payload["scales"][:, None], layout
        )
        if add:
            out += value
        else:
            out.copy_(value)

    def omega(self, numel: int) -> float:
        """``1/8`` from the smallest level l up. Below it a value errs by ``|x| (l|v| - |x|)``: with the max
        norm :func:`~distcomp.compressors.quantize.worst_variance` if that is more; with the Euclidean norm at
        most ``l^2 |v|^2 / 4`` a value and ``l sqrt(B)`` a block on top."""
        length = max(1, min(self.block, numel))
        smallest = 2.0 ** (1 - self.levels)
        if self.norm == "max":
            return max(1 / 8, worst_variance(length, smallest))
        return 1 / 8 + min(length * smallest**2 / 4, smallest * math.sqrt(length))


def _norms(rows: Tensor, norm: str) -> Tensor:
    """The norm of each block; 0 where it is too small to divide by. In float64, where squares fit."""
    order = float("inf") if norm == "max" else 2.0
    norms = torch.linalg.vector_norm(rows, order, dim=1, dtype=torch.float64).float()
    return torch.where(norms < SMALLEST_SCALE, 0.0, norms)
