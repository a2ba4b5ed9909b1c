"""Levels that are powers of two: natural compression, natural dithering and NUQSGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.compressors.base import Compressor, register_compressor
from distcomp.compressors.grid import pack_signs, sign_bytes, unpack_signs
from distcomp.compressors.quantize import worst_variance
from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.kernels import pieces as many
from distcomp.kernels.dispatch import served_by_c
from distcomp.kernels.pieces import Pieces
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


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
        pieces = self._pieces(layout)
        return (
            Part("scales", torch.float32, pieces.scale_count),
            Part("codes", torch.uint8, pieces.code_bytes),
        )

    def _pieces(self, layout: Layout) -> Pieces:
        return layout.remember((type(self), self.block, self.bits), lambda: self._laid_out(layout))

    def _laid_out(self, layout: Layout) -> Pieces:
        places = [
            (at, param.numel, param.start) for param, at in zip(layout.slices, layout.offsets, strict=True)
        ]
        return Pieces.of(places, self.block, self.bits, powers=True)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        keys = key.fold_each(layout.names)
        codes, scales = payload["codes"], payload["scales"]
        many.quantize(x, codes, scales, self._pieces(layout), keys, norm=self.norm)
        return payload

    def encode_owing(self, x: Tensor, residual: Tensor, owed: Tensor, layout: Layout, key: Key) -> Payload:
        payload, pieces = Payload.empty(self.parts(layout), x.device), self._pieces(layout)
        keys, coded = key.fold_each(layout.names), (payload["codes"], payload["scales"])
        many.quantize_owing(x, *coded, pieces, keys, owing=(residual, owed), norm=self.norm)
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        many.dequantize(payload["codes"], payload["scales"], out, self._pieces(layout), add=add)

    def decode_onto(self, base: Tensor, payload: Payload, layout: Layout, times: float = 1.0) -> Tensor:
        if not served_by_c(base):
            return super().decode_onto(base, payload, layout, times)
        out = memory.empty(layout.numel)
        many.dequantize_onto(base, payload["codes"], payload["scales"], out, self._pieces(layout), times)
        return out

    def mean_into(
        self, out: Tensor, payloads: Sequence[Payload], layout: Layout, own: tuple[int, Tensor] | None = None
    ) -> None:
        if not served_by_c(out):
            super().mean_into(out, payloads, layout, own)
            return
        coded = [(one["codes"], one["scales"]) for one in payloads]
        many.dequantize_mean(coded, out, self._pieces(layout), own)

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        many.dequantize(payload["codes"], payload["scales"], out, self._pieces(layout), subtract=True)

    def omega(self, numel: int) -> float:
        """``1/8`` from the smallest level l up. Below it a value errs by ``|x| (l|v| - |x|)``: with the max
        norm :func:`~distcomp.compressors.quantize.worst_variance` if that is more; with the Euclidean norm at
        most ``l^2 |v|^2 / 4`` a value and ``l sqrt(B)`` a block on top."""
        length = max(1, min(self.block, numel))
        smallest = 2.0 ** (1 - self.levels)
        if self.norm == "max":
            return max(1 / 8, worst_variance(length, smallest))
        return 1 / 8 + min(length * smallest**2 / 4, smallest * math.sqrt(length))
