"""Floats of 4 and 8 bits, of which blocks share a scale: to codes and back, bit for bit alike anywhere.

A number of a :class:`Minifloat` is ``(-1)^sign 2^(E - bias) (1 + M / 2^mantissa)``, below the smallest
exponent ``2^(1 - bias) M / 2^mantissa``. What a block's scale is, a rule of :mod:`distcomp.kernels.scales`
says.

The functions named ``reference_*`` are the specification, in plain torch. ``_minifloat.c`` (CPU) and
:mod:`distcomp.kernels.triton_minifloat` (GPU) equal it bit for bit.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels.dispatch import backend, served_by_c
from distcomp.kernels.reference import round_at_random, uniform
from distcomp.kernels.rotation import SIDE, reference_put_back, reference_rotate
from distcomp.kernels.tables import check_tensor, lines_of

SPAN = 1 << 16
"""Elements: a longer piece is cut in several spans, which threads may share."""
LINE_BYTES = 56


@dataclass(frozen=True)
class Minifloat:
    """A sign, ``width - 1 - mantissa`` bits of exponent, and ``mantissa`` bits behind the point."""

    name: str
    width: int
    mantissa: int
    bias: int
    largest: float
    infinity: int
    """The code that stands for it: that of a NaN, or of the largest number, where the format has none."""
    nan: int
    finite: int
    """How many magnitudes are numbers: from this code on they are infinity and NaN."""

    @property
    def smallest(self) -> float:
        """The smallest number above zero, and the distance between the numbers near zero."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def largest_exponent(self) -> int:
        """That of the largest number, without the bias."""
        return math.frexp(self.largest)[1] - 1

    def code_bytes(self, numel: int) -> int:
        """Bytes of so many codes."""
        return -(-numel * self.width // 8)

    @property
    def for_c(self) -> tuple[int, int, int, float, int, int, int]:
        """What C is told of it."""
        return self.width, self.mantissa, self.bias, self.largest, self.infinity, self.nan, self.finite


E4M3 = Minifloat("e4m3", 8, 3, 7, 448.0, 0x7F, 0x7F, 0x7F)
"""torch.float8_e4m3fn: no infinity, one NaN of each sign."""
E5M2 = Minifloat("e5m2", 8, 2, 15, 57344.0, 0x7C, 0x7F, 0x7C)
"""torch.float8_e5m2: infinity and NaN as in IEEE 754."""
E2M1 = Minifloat("e2m1", 4, 1, 1, 6.0, 7, 7, 8)
"""The four bits of MXFP4 and NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Neither infinity nor NaN."""


Encoder = Callable[[Tensor, Tensor, Tensor, int, Minifloat, int | None, int], None]
"""Of one span: values, factors, codes, block, format, key, first."""
Decoder = Callable[[Tensor, Tensor, Tensor, int, Minifloat, int], None]
"""Of one span: codes, units, values, block, format, sign."""


class Scales(Protocol):
    """What blocks' scales are: a rule, and the tensors that hold them (:mod:`distcomp.kernels.scales`)."""

    @property
    def blocks(self) -> Tensor:
        """What is sent of each block."""

    @property
    def groups(self) -> Tensor | None:
        """What is sent of each group of blocks, where there is anything."""

    @property
    def for_c(self) -> tuple[int, float, bool]:
        """The rule's number, from which magnitude on values count, whether scales are rounded up."""

    def check(self, spans: Spans) -> None:
        """Raise DistcompError where the tensors are others than these spans need."""

    def write(self, maxima: Tensor, spans: Spans, kind: Minifloat) -> Tensor:
        """Write them from the largest magnitude of each block (float32, none negative), and return what
        values are multiplied by (float32, a finite number of each block, not negative)."""

    def units(self, spans: Spans) -> Tensor:
        """What the numbers of each block are multiplied by when they are decoded (float32)."""


@dataclass(frozen=True)
class Span:
    """``numel`` elements at ``at`` of a flat buffer, the first of which is element ``first`` of parameter
    number ``owner``; their codes begin at byte ``codes``, their blocks are number ``row`` and those after
    it, their groups number ``group`` and those after it."""

    at: int
    numel: int
    codes: int
    row: int
    group: int
    first: int
    owner: int


@dataclass(frozen=True)
class Spans:
    """The pieces of a flat buffer, cut on block boundaries, and where their codes and blocks lie."""

    each: tuple[Span, ...]
    block: int
    per: int
    width: int
    numel: int
    code_bytes: int
    rows: int
    groups: int

    @staticmethod
    def of(
        places: Sequence[tuple[int, int, int]], block: int, width: int, per: int = 1, rotated: bool = False
    ) -> Spans:
        """From ``(at, numel, first)`` of each parameter; codes and blocks follow one another. ``per`` blocks
        of a parameter are a group, its last one's fewer. No group is cut, nor, where they are ``rotated``, a
        row of ``SIDE`` values.

        Raises DistcompError where a parameter was cut within a block, or blocks within a byte.
        """
        if block < 1 or per < 1 or width not in (4, 8) or (width == 4 and block % 2):
            raise DistcompError(
                f"blocks of {block} codes of {width} bits are none; take 8 bits, or 4 and an even block"
            )
        whole = math.lcm(block * per, SIDE) if rotated else block * per
        step = whole * max(1, SPAN // whole)
        spans, codes, rows, groups = [], 0, 0, 0
        for owner, (at, numel, first) in enumerate(places):
            if first % block:
                raise DistcompError(
                    f"first={first} is no multiple of block={block}; split only between blocks"
                )
            for start in range(0, numel, step):
                count = min(step, numel - start)
                code, row = codes + start * width // 8, rows + start // block
                group = groups + start // (block * per)
                spans.append(Span(at + start, count, code, row, group, first + start, owner))
            codes += -(-numel * width // 8)
            rows += -(-numel // block)
            groups += -(-numel // (block * per))
        end = max((at + numel for at, numel, _ in places), default=0)
        return Spans(tuple(spans), block, per, width, end, codes, rows, groups)

    @cached_property
    def table(self) -> Tensor:
        """For C: at, numel, codes, row, group, first, owner."""
        lines = [
            (one.at, one.numel, one.codes, one.row, one.group, one.first, one.owner) for one in self.each
        ]
        return torch.tensor(lines, dtype=torch.int64).reshape(-1, 7)

    @property
    def places(self) -> list[tuple[int, int, int, int]]:
        """Of each span, at, numel, first and owner."""
        return [(one.at, one.numel, one.first, one.owner) for one in self.each]

    def rows_of(self, span: Span) -> slice:
        """Which blocks are a span's."""
        return slice(span.row, span.row + -(-span.numel // self.block))

    def groups_of_blocks(self, device: torch.device) -> Tensor:
        """int64 ``[rows]``: the group that each block is in."""
        numbers = [torch.empty(0, dtype=torch.int64)]
        for span in self.each:
            numbers.append(torch.arange(-(-span.numel // self.block)) // self.per + span.group)
        return torch.cat(numbers).to(device)

    def codes_of(self, span: Span) -> slice:
        """Which bytes are a span's."""
        return slice(span.codes, span.codes + -(-span.numel * self.width // 8))


# ---------------------------------------------------------------------------------------------- for everybody


def encode(
    x: Tensor,
    codes: Tensor,
    spans: Spans,
    kind: Minifloat,
    scales: Scales,
    keys: Sequence[int] = (),
    signs: Tensor | None = None,
) -> None:
    """Write the scales of each block, and the code of ``x_j`` in units of its block's, clamped to the largest
    number. In C a stretch of a few thousand values goes through all of it while it lies in the cache;
    elsewhere it is a pass for each step.

    Args:
        x: float32, contiguous, ``[spans.numel]`` or more.
        codes: uint8 ``[spans.code_bytes]``; two codes of 4 bits share a byte, the first in its low half.
        scales: the rule they are made by, and where they are written.
        keys: one for each parameter: rounded at random, ``E[decoded] = x`` where nothing was clamped. None:
            to the nearest, ties to even.
        signs: int64, on ``x``'s device, a key for each parameter: its whole rows are rotated first
            (:mod:`distcomp.kernels.rotation`).

    A NaN becomes a NaN and an infinity an infinity, where ``kind`` has them. On every backend the same bits.
    Raises DistcompError for tensors of another type or size.
    """
    check_tensor("values", x, torch.float32, spans.numel)
    check_tensor("codes", codes, torch.uint8, spans.code_bytes)
    scales.check(spans)
    if served_by_c(x):
        from distcomp.kernels import _cpu

        drawn = array("Q", keys)
        keys_of = drawn.buffer_info()
        at, sizes = _buffers(x, codes, scales)
        rule, turned = _rule(scales, spans), _keys_of_signs(signs, spans)
        _share(spans, x, lambda table, lines: _cpu.minifloat_encode(
            at, sizes, table, lines, spans.block, kind.for_c, rule, keys_of if keys else (0, 0), turned
        ))  # fmt: skip
        return
    if signs is not None:
        x = reference_rotate(x, spans.places, signs, back=False)
    inverses = scales.write(block_maxima(x, spans), spans, kind)
    span_encode, _ = _twins(x)
    for span in spans.each:
        span_encode(
            x[span.at : span.at + span.numel], inverses[spans.rows_of(span)], codes[spans.codes_of(span)],
            spans.block, kind, keys[span.owner] if keys else None, span.first,
        )  # fmt: skip


def decode(
    codes: Tensor,
    out: Tensor,
    spans: Spans,
    kind: Minifloat,
    scales: Scales,
    sign: int = 0,
    signs: Tensor | None = None,
) -> None:
    """Write the number of each code times the unit of its block into ``out``, rotated back; add it
    (``sign=1``) or subtract it (``sign=-1``). Shapes, types and errors as in :func:`encode`."""
    check_tensor("values", out, torch.float32, spans.numel)
    check_tensor("codes", codes, torch.uint8, spans.code_bytes)
    scales.check(spans)
    if served_by_c(out):
        from distcomp.kernels import _cpu

        at, sizes = _buffers(out, codes, scales)
        rule, turned = _rule(scales, spans), _keys_of_signs(signs, spans)
        _share(spans, out, lambda table, lines: _cpu.minifloat_decode(
            at, sizes, table, lines, spans.block, kind.for_c, rule, turned, sign
        ))  # fmt: skip
        return
    values, units = out if signs is None else torch.empty_like(out), scales.units(spans)
    _, span_decode = _twins(out)
    for span in spans.each:
        span_decode(
            codes[spans.codes_of(span)], units[spans.rows_of(span)], values[span.at : span.at + span.numel],
            spans.block, kind, sign if signs is None else 0,
        )  # fmt: skip
    if signs is not None:
        reference_put_back(values, out, spans.places, signs, sign)


def block_maxima(x: Tensor, spans: Spans) -> Tensor:
    """The largest magnitude of each block (float32, ``[spans.rows]``); a NaN is above an infinity."""
    maxima = torch.empty(spans.rows, dtype=torch.float32, device=x.device)
    for span in spans.each:
        rows = _padded(x[span.at : span.at + span.numel], spans.block)
        maxima[spans.rows_of(span)] = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)
    return maxima


# ------------------------------------------------------------------------------------------ the specification


def reference_encode(
    x: Tensor, inverses: Tensor, codes: Tensor, block: int, kind: Minifloat, key: int | None, first: int
) -> None:
    """One span; what :func:`encode` says. Every operation is rounded on its own."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    y = magnitude.view(torch.float32) * inverses.repeat_interleave(block)[: x.numel()]
    y = torch.where(y < kind.largest, y, kind.largest)
    # In the binade of y neighbours lie 2^(exponent - mantissa) apart; below the smallest one as in it.
    exponent = (y.view(torch.int32) >> 23).clamp_(min=128 - kind.bias)
    steps = y * ((254 + kind.mantissa - exponent) << 23).view(torch.float32)
    if key is None:
        steps = torch.round(steps)
    else:
        steps = round_at_random(steps, uniform(x.numel(), key, first, x.device))
    # A step beyond the binade's last number is the first of the next: the sum of the two fields says so.
    code = ((exponent - (128 - kind.bias)) << kind.mantissa) + steps.to(torch.int32)
    code = torch.where(magnitude == 0x7F800000, kind.infinity, code)
    code = torch.where(magnitude > 0x7F800000, kind.nan, code)
    code = code | ((bits < 0).to(torch.int32) << (kind.width - 1))
    codes.copy_(_pairs(code) if kind.width == 4 else code)


def reference_decode(
    codes: Tensor, units: Tensor, out: Tensor, block: int, kind: Minifloat, sign: int
) -> None:
    """One span; what :func:`decode` says."""
    code = codes.to(torch.int32)
    if kind.width == 4:
        code = torch.stack([code & 15, code >> 4], dim=1).view(-1)[: out.numel()]
    magnitude, negative = code & ((1 << (kind.width - 1)) - 1), code >> (kind.width - 1)
    field = magnitude >> kind.mantissa
    steps = (magnitude & ((1 << kind.mantissa) - 1)) | ((field > 0).to(torch.int32) << kind.mantissa)
    exponent = field.clamp(min=1) + (127 - kind.bias - kind.mantissa)
    value = steps.to(torch.float32) * (exponent << 23).view(torch.float32)
    has_infinity = kind.infinity < kind.nan
    value = torch.where(magnitude >= kind.finite, math.nan, value)
    value = torch.where((magnitude == kind.infinity) & has_infinity, math.inf, value)
    value = torch.where(negative > 0, -value, value) * units.repeat_interleave(block)[: out.numel()]
    out.copy_(out + value if sign > 0 else out - value if sign < 0 else value)


def _pairs(code: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte, the first in its low half; the last one's upper half may be empty."""
    both = torch.nn.functional.pad(code, (0, code.numel() % 2)).view(-1, 2)
    return both[:, 0] | (both[:, 1] << 4)


def _padded(x: Tensor, block: int) -> Tensor:
    """Blocks as rows; the last one padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)


def _buffers(
    values: Tensor, codes: Tensor, scales: Scales
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Where values, codes, blocks' and groups' scales are, and how many there are of each."""
    blocks, groups = scales.blocks, scales.groups
    of_groups = (0, 0) if groups is None else (groups.data_ptr(), groups.numel())
    at = values.data_ptr(), codes.data_ptr(), blocks.data_ptr(), of_groups[0]
    return at, (values.numel(), codes.numel(), blocks.numel(), of_groups[1])


def _rule(scales: Scales, spans: Spans) -> tuple[int, int, float, bool]:
    """What C is told of it: also how many blocks a group has."""
    rule, least, up = scales.for_c
    return rule, spans.per, least, up


def _keys_of_signs(signs: Tensor | None, spans: Spans) -> tuple[int, int]:
    """Where they are, and how many."""
    if signs is None:
        return 0, 0
    check_tensor("keys of signs", signs, torch.int64, spans.each[-1].owner + 1 if spans.each else 0)
    return signs.data_ptr(), signs.numel()


def _share(spans: Spans, x: Tensor, run: Callable[[int, int], None]) -> None:
    """``run(address of the first line, lines)``, shared between threads."""
    from distcomp.kernels import cpu

    if not spans.each:
        return
    table, lines = lines_of(spans.table, LINE_BYTES)
    cpu.shared(lambda start, count: run(table + LINE_BYTES * start, count), lines, 1, 4 * x.numel() // lines)


def _twins(x: Tensor) -> tuple[Encoder, Decoder]:
    """What serves one span where C does not."""
    if backend(x.device) == "triton":
        from distcomp.kernels import triton_minifloat

        return triton_minifloat.encode, triton_minifloat.decode
    return reference_encode, reference_decode
