"""Floats of 4 and 8 bits whose blocks share a scale: fp8, MXFP8, MXFP4 and NVFP4.

They differ in what a block's scale is: a float32, a power of two, or an FP8 number of 16 values times a
float32 of many. What is alike stands in :mod:`distcomp.compressors.block_float`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distcomp.compressors.base import register_compressor
from distcomp.compressors.block_float import BlockFloat, nearest_error, rounding_variance
from distcomp.errors import DistcompError
from distcomp.kernels import minifloat as kernel
from distcomp.kernels.minifloat import E2M1, E4M3, E5M2, Minifloat, Scales, Spans
from distcomp.kernels.rotation import SIDE
from distcomp.kernels.scales import FloatScales, GivenScales, PowerScales, TwoLevelScales
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
"""The floats of 8 bits, by name: bits of the exponent, bits behind the point."""

SMALLEST_MAXIMUM = 2.0**-100
"""A block below is sent as zeros where its scale is a float32: no reciprocal overflows."""

PLAIN_BLOCK = kernel.SPAN
"""What is not scaled lies in blocks of this many, all of the factor 1."""


@register_compressor("fp8")
@dataclass(frozen=True)
class Float8(BlockFloat):
    """Round each value to a float of 8 bits, in units of its block's largest magnitude over the largest
    float::

        s = max|v| / L,    C(v)_k = s round(v_k / s);    L = 448 for e4m3, 57344 for e5m2

    ``round`` takes one of the two neighbours, at random so that the mean is right (``rounding="stochastic"``;
    variance at most ``v^2 / 288`` for e4m3, ``v^2 / 80`` for e5m2, above the smallest exponent), or the
    nearest (ties to even), which is biased: bit for bit what ``torch.float8_e4m3fn`` and
    ``torch.float8_e5m2`` make of ``v_k`` times ``1 / s``, rounded to float32. With ``block=0``, to the
    nearest only, nothing is scaled: the cast, in which every finite value beyond L is clamped to it (torch
    makes it an infinity in e5m2, and before 2.12 a NaN in e4m3) and an infinity is one, or a NaN in e4m3
    (where torch 2.13 makes it 448).

    ``hadamard`` rotates every 128 values of a parameter at random first and back after decoding
    (:func:`~distcomp.kernels.rotation.reference_rotate`).

    On the wire: 1 byte per value and 4 per block (none with ``block=0``), 8 for the seed of a rotation. The
    payload: ``seed``, int64, one if there is a rotation; ``scales``, float32, one a block; ``codes``, uint8.
    A block below ``2^-100`` is sent as zeros; one that holds a NaN or an infinity decodes to none that is
    finite.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022; blocks of 128 as in DeepSeek-V3's
    report, 2024. We differ: rounding at random.

    Raises DistcompError for an unknown format or rounding, a negative block, and a cast (``block=0``) that
    would be rounded at random or rotated.
    """

    format: str = "e4m3"
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in FORMATS:
            raise DistcompError(f"fp8 is {' or '.join(FORMATS)}, not {self.format!r}")
        if self.block < 0:
            raise DistcompError(f"a block holds at least one value, not {self.block}; 0 scales nothing")
        if not self.block and (self.rounding == "stochastic" or self.hadamard):
            raise DistcompError(
                "a cast without scales clamps what is large, so that rounding at random has no right mean, "
                "nor does a rotation help; set rounding=nearest and hadamard=false, or a block such as 128"
            )

    @property
    def kind(self) -> Minifloat:
        return FORMATS[self.format]

    @property
    def span(self) -> int:
        return self.block or PLAIN_BLOCK

    @property
    def grid(self) -> int:
        return self.block or 1

    def _laid_out(self, layout: Layout) -> Spans:
        if self.block:
            return super()._laid_out(layout)
        # One run of values that all have the factor 1: it may begin anywhere in a parameter.
        return Spans.of([(0, layout.numel, 0)], PLAIN_BLOCK, self.kind.width)

    def spans(self, layout: Layout) -> Spans:
        return layout.remember((Float8, self.block, self.hadamard), lambda: self._laid_out(layout))

    def scale_parts(self, layout: Layout, rows: int) -> Parts:
        return (Part("scales", torch.float32, rows),) if self.block else ()

    def scales(self, payload: Payload, layout: Layout) -> Scales:
        if self.block:
            return FloatScales(payload["scales"], SMALLEST_MAXIMUM)
        rows = self.spans(layout).rows
        return GivenScales(torch.ones(rows, dtype=torch.float32, device=payload.wire.device))

    def omega(self, numel: int) -> float | None:
        """:func:`rounding_variance`: the largest magnitude is the largest float."""
        length = max(1, min(self.block, numel))
        return rounding_variance(self.kind, length, self.kind.largest) if self.unbiased else None

    def delta(self, numel: int) -> float | None:
        """:func:`nearest_error`, where there is a scale; without one small values vanish."""
        if self.unbiased or not self.block:
            return super().delta(numel)
        length = max(1, min(self.block, numel))
        return 1 - nearest_error(self.kind, length, self.kind.largest, self.kind.largest)


class Microscaling(BlockFloat):
    """Blocks of 32 that share a power of two (E8M0): the OCP formats."""

    @property
    def span(self) -> int:
        return 32

    def scale_parts(self, layout: Layout, rows: int) -> Parts:
        return (Part("scales", torch.uint8, rows),)

    def scales(self, payload: Payload, layout: Layout) -> Scales:
        # Rounded at random, what is clamped is not right in the mean.
        return PowerScales(payload["scales"], up=self.rounding == "stochastic")

    def omega(self, numel: int) -> float | None:
        """:func:`rounding_variance`: half the largest float or more is what the largest magnitude becomes."""
        length = max(1, min(self.span, numel))
        return rounding_variance(self.kind, length, self.kind.largest / 2) if self.unbiased else None

    def delta(self, numel: int) -> float | None:
        """:func:`nearest_error`: up to the next power of two, the largest magnitude is clamped."""
        if self.unbiased:
            return super().delta(numel)
        length, power = max(1, min(self.span, numel)), 2.0**self.kind.largest_exponent
        return 1 - nearest_error(self.kind, length, power, 2 * power)


@register_compressor("mxfp8")
@dataclass(frozen=True)
class MXFP8(Microscaling):
    """Round each value to a float of 8 bits; blocks of 32 share a scale that is a power of two::

        s = 2^(floor(log2 max|v|) - e),    C(v)_k = s round(min(|v_k| / s, L)) sign(v_k)

    with L = 448 and e = 8 for e4m3, L = 57344 and e = 15 for e5m2: the largest float and its exponent.
    Rounded to the nearest (``rounding="nearest"``), values up to an eighth beyond L s are clamped, as the
    standard has it: bit for bit torchao's ``to_mx``. Rounded at random (the default), s is twice that
    wherever something would be clamped, so that ``E[C(v)] = v``. ``hadamard`` as in :class:`Float8`.

    On the wire: 33/32 bytes per value, 8 for the seed of a rotation. The payload: ``seed``, int64, one if
    there is a rotation; ``scales``, uint8, the exponent of each block's scale plus 127, 255 for a NaN;
    ``codes``, uint8.

    Source: Open Compute Project, "Microscaling formats (MX) specification v1.0", 2023; Rouhani et al.,
    "Microscaling data formats for deep learning", 2023. We differ: rounding at random; a block that holds a
    NaN *or an infinity* is a NaN; the smallest scale is ``2^-126``.

    Raises DistcompError for an unknown format or rounding.
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in FORMATS:
            raise DistcompError(f"mxfp8 is {' or '.join(FORMATS)}, not {self.format!r}")

    @property
    def kind(self) -> Minifloat:
        return FORMATS[self.format]


@register_compressor("mxfp4")
@dataclass(frozen=True)
class MXFP4(Microscaling):
    """Round each value to 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign, times a power of two for each block of
    32::

        s = 2^(floor(log2 max|v|) - 2),    C(v)_k = s round(min(|v_k| / s, 6)) sign(v_k)

    Rounded to the nearest (``rounding="nearest"``), values up to a third beyond 6 s are clamped, as the
    standard has it: bit for bit torchao's ``to_mx``. Rounded at random (the default), s is twice that
    wherever something would be clamped, so that ``E[C(v)] = v``. ``hadamard`` as in :class:`Float8`.

    On the wire: 17/32 bytes per value (4.25 bits), 8 for the seed of a rotation. The payload: ``seed``,
    int64, one if there is a rotation; ``scales``, uint8, the exponent of each block's scale plus 127, 255 for
    a NaN; ``codes``, uint8, two to a byte, the first in its low half.

    Source: Open Compute Project, "Microscaling formats (MX) specification v1.0", 2023; at random and rotated:
    Tseng et al., "Training LLMs with MXFP4", AISTATS 2025. We differ: the larger scale in the place of their
    factor 3/4; a block that holds a NaN or an infinity is a NaN; the smallest scale is ``2^-126``.

    Raises DistcompError for an unknown rounding.
    """

    @property
    def kind(self) -> Minifloat:
        return E2M1


@register_compressor("nvfp4")
@dataclass(frozen=True)
class NVFP4(BlockFloat):
    """Round each value to 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign, times scales of two levels::

        S = max|v| / (448 * 6)     of a group, a float32
        s = round_e4m3(max|u| / (6 S))     of each 16 values u of it, from 2^-6 to 448
        C(u)_k = S s round(min(|u_k| / (S s), 6)) sign(u_k)

    Rounded to the nearest (``rounding="nearest"``), s is, too, and up to a sixteenth is clamped: bit for bit
    torchao's ``nvfp4_quantize`` of a group. Rounded at random (the default), s is rounded up, so that nothing
    is clamped and ``E[C(v)] = v``. ``hadamard`` as in :class:`Float8`.

    On the wire: 9/16 bytes per value (4.5 bits) and 4 per group, 8 for the seed of a rotation. The payload:
    ``seed``, int64, one if there is a rotation; ``scales``, float32, one a group; ``block_scales``, uint8
    (e4m3), one for each 16 values; ``codes``, uint8, two to a byte, the first in its low half. A group below
    ``2^-100`` is sent as zeros; one that holds a NaN or an infinity decodes to NaN.

    Source: NVIDIA, "Pretraining large language models with NVFP4", 2025. We differ: groups of ``group``
    values in the place of whole tensors, so that a parameter may be cut; a group that no parameter reaches,
    such as 2**30, is one scale for each.

    Raises DistcompError for an unknown rounding, or a group that is no multiple of 128.
    """

    group: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < SIDE or self.group % SIDE:
            raise DistcompError(
                f"a group of scales is a multiple of {SIDE} values, not {self.group}; the default is 1024"
            )

    @property
    def kind(self) -> Minifloat:
        return E2M1

    @property
    def span(self) -> int:
        return 16

    @property
    def per(self) -> int:
        return self.group // self.span

    @property
    def grid(self) -> int:
        return self.group

    def scale_parts(self, layout: Layout, rows: int) -> Parts:
        groups = layout.block_count(self.group)
        return (Part("scales", torch.float32, groups), Part("block_scales", torch.uint8, rows))

    def scales(self, payload: Payload, layout: Layout) -> Scales:
        up = self.rounding == "stochastic"
        return TwoLevelScales(payload["block_scales"], payload["scales"], SMALLEST_MAXIMUM, up)

    def _floor(self, numel: int) -> float:
        """What blocks below the smallest scale may err by, relative to the group's square: half of their
        smallest number each."""
        smallest = E2M1.smallest * 2.0**-6 / (E4M3.largest * E2M1.largest)
        return max(1, min(self.group, numel)) * smallest**2 / 4

    def omega(self, numel: int) -> float | None:
        """:func:`rounding_variance`, for a scale that was rounded up by an eighth at most."""
        length = max(1, min(self.span, numel))
        return (
            rounding_variance(E2M1, length, 6 / (1 + 1 / 8)) + self._floor(numel) if self.unbiased else None
        )

    def delta(self, numel: int) -> float | None:
        """:func:`nearest_error`, for a scale that was rounded by a sixteenth at most."""
        if self.unbiased:
            return super().delta(numel)
        length = max(1, min(self.span, numel))
        return 1 - nearest_error(E2M1, length, 6 / (1 + 1 / 16), 6 * (1 + 1 / 16)) - self._floor(numel)
