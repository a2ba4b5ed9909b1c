"""Integers that are added on the wire: one range for all ranks, so that codes mean the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, Rounds
from distcomp.compressors.grid import (
    from_rows,
    per_parameter_max,
    spread,
    to_rows,
    uniform_noise,
)
from distcomp.errors import DistcompError
from distcomp.kernels.reference import round_at_random
from distcomp.kernels.rotation import hadamard
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import AggregateResult, Method, State, StepContext, all_reduce_bytes
from distcomp.methods.basic import except_small
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.registry import register
from distcomp.payload import Part, Parts, Payload, wire_bytes
from distcomp.randomness import Key

WORD_BITS = 32
"""What every transport adds as integers."""
SMALLEST_RANGE = 2.0**-120
"""A range that is smaller counts as zero: nothing is divided by it."""

LARGEST_SIDE = 2**20
LARGEST_LEVEL = 2**22
"""Integers up to here are rounded right in float32, with two bits to spare."""


# ------------------------------------------------------------------------------- exact sums of small integers


def field_bits(largest: int, size: int) -> int:
    """Bits of a signed field for the sum of ``size`` integers of magnitude ``largest``: with head-room."""
    return (size * largest).bit_length() + 1


def word_count(numel: int, bits: int) -> int:
    """32-bit words that hold ``numel`` fields."""
    return -(-numel // (WORD_BITS // bits))


def sum_integers(codes: Tensor, bits: int) -> Rounds[Tensor]:
    """The sum of int32 ``codes`` over the ranks, exact in any order; sums must fit signed fields of ``bits``.

    ``32 // bits`` numbers ride side by side in one 32-bit word, ``w = sum_j c_j 2^(bits j)``: every transport
    adds int32, few add anything narrower. With balanced digits, ``|sum of c_j| < 2^(bits-1)``, neither a
    partial nor the whole sum leaves its field or the word.
    """
    words: Tensor = yield AllReduce(pack_fields(codes, bits), kind="codes")
    return unpack_fields(words, codes.numel(), bits)


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """int32 ``[numel]`` -> int32 ``[word_count]``; field j holds the j-th stretch of the codes."""
    fields = WORD_BITS // bits
    words = word_count(codes.numel(), bits)
    planes = torch.nn.functional.pad(codes, (0, fields * words - codes.numel())).view(fields, words)
    packed = planes[0].clone()
    # Added, not or-ed: a negative digit borrows from the field above it, and unpacking gives that back.
    for field in range(1, fields):
        packed += planes[field] << (bits * field)
    return packed


def unpack_fields(words: Tensor, numel: int, bits: int) -> Tensor:
    """Peel off the lowest field, sign-extended, and subtract it before the next one is looked at."""
    planes, rest = [], words
    for _ in range(WORD_BITS // bits):
        # To the top and back down: the arithmetic shift extends the field's sign.
        low = (rest << (WORD_BITS - bits)) >> (WORD_BITS - bits)
        planes.append(low)
        rest = (rest - low) >> bits
    return torch.cat(planes)[:numel]


def largest_of_all(own: Tensor) -> Rounds[Tensor]:
    """The elementwise maximum over the ranks. ``own``: float32 or bfloat16. On the wire: (n-1) payloads."""
    # Gathered, not reduced: transports sum, and few take a maximum; n numbers a block are few. Their header
    # announces a NaN, of which the integers that follow could not tell.
    payload = Payload.empty(_range_parts(own.numel(), own.dtype), own.device)
    payload["scales"].copy_(own)
    payloads: list[Payload] = yield AllGather(payload)
    largest = payloads[0]["scales"].float()
    for received in payloads[1:]:
        largest = torch.maximum(largest, received["scales"].float())
    return largest


def _range_parts(numel: int, dtype: torch.dtype) -> Parts:
    return (Part("scales", dtype, numel),)


def _agreement_bytes(ranges: int, dtype: torch.dtype, words: int, size: int) -> int:
    return (size - 1) * wire_bytes(_range_parts(ranges, dtype)) + all_reduce_bytes(4 * words, size)


def _round_at_random(x: Tensor, layout: Layout, key: Key, largest: int) -> Tensor:
    """One of the integers around x, as int32: right in the mean. A NaN becomes some legal integer."""
    rounded = round_at_random(x, uniform_noise(layout, key, x.device))
    return torch.nan_to_num(rounded).clamp_(-largest, largest).to(torch.int32)


# ------------------------------------------------------------------------------------------------ the methods


@dataclass(frozen=True)
class HomomorphicQuantizer(Method):
    """Agree on each block's range, then add integers: no decoding, no rounding and no order on the way.

    ::

        r = max_i max|x_i|     of a block, agreed first
        q_i = floor(s x_i / r + u),    s >= 2^(bits-1) - 1 levels on either side of zero
        estimate = r / s * (sum_i q_i) / n

    ``bits`` is the width of one rank's integer; the sum of n of them takes ``log2 n`` bits of head-room more,
    rounded up so that whole fields fill a 32-bit word, and s is the largest that this width allows. The sum
    is exact, so every transport and every order of its ring gives the same bits. Unbiased: an element errs by
    a variance of at most ``(r/s)^2 / (4 n)``.

    On the wire: ``2 (n-1)/n`` times ``4 d / (32 // (bits + ceil(log2 n)))`` bytes (at 4 bits: 5.3 bits per
    value for 2 ranks, 6.4 for 4, 8 for 8 or 16), and ``2 (n-1)`` bytes per block (a range is a bfloat16,
    rounded up). A block whose range is below ``2^-120`` is sent as zeros.

    Source: Li et al., "THC: accelerating distributed deep learning using tensor homomorphic compression",
    NSDI 2024. We differ: the same width up and down (an all-reduce has no server), the range is the largest
    magnitude and nothing is clamped (so no error feedback is needed), uniform levels, no lookup table.

    Raises DistcompError for bits outside 2..16, a block below 1, or more ranks than a 32-bit word has
    head-room for.
    """

    bits: int = 4
    block: int = 512

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise DistcompError(
                f"integers of 2 to 16 bits are summed, not {self.bits}; use fp16 or identity for more"
            )
        if self.block < 1:
            raise DistcompError(f"a block holds at least one value, not {self.block}; the default is 512")

    def width(self, size: int) -> int:
        """Bits of a field: a rank's integer, head-room, and what would be left over of a 32-bit word."""
        wanted = field_bits((1 << (self.bits - 1)) - 1, size)
        if wanted > WORD_BITS:
            raise DistcompError(
                f"a sum of {self.bits}-bit integers over {size} ranks passes 32 bits; use fewer bits"
            )
        return WORD_BITS // (WORD_BITS // wanted)

    def levels(self, size: int) -> int:
        """Levels on either side of zero that leave head-room for a sum over ``size`` ranks."""
        return min(LARGEST_LEVEL, ((1 << (self.width(size) - 1)) - 1) // size)

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        s = self.levels(context.size)
        # Rounded up: a range below the largest magnitude would clamp it, which is biased.
        rows = to_rows(x, context.layout, context.layout.within(self.block))
        r = yield from largest_of_all(_bfloat16_above(rows.abs().amax(1)))
        r = torch.where(r < SMALLEST_RANGE, 0.0, r)

        ratio = from_rows(rows * (s / r.clamp(min=SMALLEST_RANGE))[:, None], context.layout)
        q = _round_at_random(ratio, context.layout, context.private.fold("round"), s)
        total = yield from sum_integers(q, self.width(context.size))

        def decoded(integers: Tensor, times: float) -> Tensor:
            levels = to_rows(integers.float(), context.layout, context.layout.within(self.block))
            return from_rows(levels * (r * (times / s))[:, None], context.layout)

        return AggregateResult(decoded(total, 1 / context.size), lambda: decoded(q, 1.0), state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        words = word_count(layout.numel, self.width(size))
        return _agreement_bytes(layout.block_count(self.block), torch.bfloat16, words, size)


def _bfloat16_above(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below ``x >= 0``; the largest finite one where there is none."""
    bits = (x.view(torch.int32) + 0xFFFF) >> 16 << 16
    return bits.view(torch.float32).clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)


@dataclass(frozen=True)
class TernGrad(Method):
    """Each value as -1, 0 or +1 times one magnitude that all ranks share; the integers are added on the wire.

    ::

        g_i = clip(x_i, +-c sigma_i)         sigma_i: the standard deviation of the rank's parameter;
                                             never below |mean|, where the paper's mean is 0
        s = max_i max|g_i|                   scaler sharing
        t_i = sign(g_i) b_i,                 P(b_i = 1) = |g_i| / s
        estimate = s (sum_i t_i) / n

    ``E[t_i s] = g_i``: unbiased for the clipped gradient, and for the gradient with ``clip=0`` (no clipping).
    On the wire: fields of ``bit_length(n) + 1`` bits (3 for up to 3 ranks, 4 up to 7, 5 up to 15), as many as
    fit a 32-bit word, by an all-reduce, and ``4 (n-1)`` bytes per parameter for the magnitudes.

    Source: Wen et al., "TernGrad", NeurIPS 2017. We differ: the sum stays integer all the way (the paper's
    server sends 32-bit floats down, or the shared scale's integers); the paper keeps the last layer in float,
    here biases and norms. It keeps no state.

    Raises DistcompError for a negative clip.
    """

    clip: float = 2.5

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise DistcompError(
                f"clip counts standard deviations, not {self.clip}; 0 does not clip, the paper takes 2.5"
            )

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        g = self._clipped(x, context.layout)
        # After clipping, as in the paper: the range is that of what is sent.
        s = yield from largest_of_all(per_parameter_max(g, context.layout))
        s = torch.where(s < SMALLEST_RANGE, 0.0, s)
        ratio = g / spread(s.clamp(min=SMALLEST_RANGE), context.layout)
        t = _round_at_random(ratio, context.layout, context.private.fold("round"), 1)
        total = yield from sum_integers(t, field_bits(1, context.size))
        scale = spread(s, context.layout)
        return AggregateResult(scale * total * (1 / context.size), lambda: scale * t, state)

    def _clipped(self, x: Tensor, layout: Layout) -> Tensor:
        if not self.clip:
            return x
        clipped = torch.empty_like(x)
        for (_, piece), (_, out) in zip(layout.pieces(x), layout.pieces(clipped), strict=True):
            # float64: the squares of a large parameter's values add up.
            sigma = piece.double().std(correction=0) if piece.numel() > 1 else piece.abs().sum()
            limit = torch.maximum(self.clip * sigma, piece.double().mean().abs()).float()
            out.copy_(torch.minimum(torch.maximum(piece, -limit), limit))
        return clipped

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        words = word_count(layout.numel, field_bits(1, size))
        return _agreement_bytes(len(layout.slices), torch.float32, words, size)


@dataclass(frozen=True)
class RandomHadamard(Method):
    """Aggregate a randomly rotated flat buffer: ``y = H D x`` by blocks; random signs D, Hadamard matrix H.

    A rotation spreads outliers over their block, so that the largest magnitude is near the typical one.
    ``estimate = D H estimate'``; the inverse is linear, so the law holds for any inner method. Signs are the
    same on all ranks. A parameter is padded with zeros to whole blocks, which are sent too. On the wire:
    ``inner``'s bytes for the padded buffer.

    Source: Suresh et al., "Distributed mean estimation with limited communication", ICML 2017; Li et al.,
    THC, NSDI 2024.

    Raises DistcompError where ``block`` is not a power of two up to 2^20: every parameter is padded to it.
    """

    inner: Method
    block: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.block <= LARGEST_SIDE or self.block & (self.block - 1):
            raise DistcompError(
                f"a Hadamard matrix has a power of two for its side, at most {LARGEST_SIDE:,}, not "
                f"{self.block}; use 512"
            )

    def padded(self, layout: Layout) -> Layout:
        """The rotated flat buffer's layout: whole blocks."""
        return Layout(tuple(self._padded(param) for param in layout.slices))

    def _padded(self, param: ParamSlice) -> ParamSlice:
        numel = -(-param.numel // self.block) * self.block
        return ParamSlice(param.name, (numel,), 0, numel, param.role)

    def init(self, layout: Layout) -> State:
        return self.inner.init(self.padded(layout))

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        padded = self.padded(context.layout)
        shape = (padded.numel // self.block, self.block)
        # The same signs on all ranks, or sums of rotated values would be no rotated sums.
        noise = uniform_noise(padded, context.shared.fold("rotate"), x.device).view(shape)
        signs = torch.where(noise < 0.5, -torch.ones_like(noise), 1.0)

        def back(y: Tensor) -> Tensor:
            return from_rows(hadamard(y.view(shape)) * signs, context.layout)

        rotated = hadamard(to_rows(x, context.layout, self.block) * signs).view(-1)
        result = yield from self.inner.aggregate(rotated, state, replace(context, layout=padded))
        return AggregateResult(back(result.estimate), lambda: back(result.contribution()), result.state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(self.padded(layout), size, step)


@register(
    paper="Li et al., THC: tensor homomorphic compression, NSDI 2024",
    wire="2 (n-1)/n 4d / (32 // (bits + ceil(log2 n))) + 2 (n-1) d/block",
    summable=True,
    biased=False,
    deviations="one width both ways; the range is the largest magnitude, so that nothing is clamped",
    limitations="one outlier on one rank makes a block coarse on all of them; every doubling of the ranks "
    "costs a bit",
)
def shared_range(
    bits: int = 4, block: int = 512, hadamard: bool = False, error_feedback: bool = False
) -> Method:
    """Agree on a range per block, then all-reduce small integers: the sum is exact in any order.

    See :class:`HomomorphicQuantizer` for the equation. ``hadamard`` rotates each block at random first
    (:class:`RandomHadamard`), which spreads outliers. ``error_feedback`` is not needed, but may be had.
    """
    method: Method = HomomorphicQuantizer(bits, block)
    if hadamard:
        method = RandomHadamard(method, block)
    return except_small(ErrorFeedback(method) if error_feedback else method)


@register(
    paper="Wen et al., TernGrad, NeurIPS 2017",
    wire="2 (n-1)/n d (bit_length(n)+1)/8 + 4 (n-1) per parameter",
    summable=True,
    biased=True,
    deviations="the sum stays integer; never clips below a parameter's mean magnitude; unbiased only with "
    "clip=0; biases and norms, not the last layer, in float32",
    limitations="the noise is as large as the largest value: few ranks and large learning rates do not "
    "average it out; with clip > 0 it is biased",
)
def terngrad(clip: float = 2.5) -> Method:
    """Send -1, 0 or +1 times a magnitude that all ranks share, at random so that the mean is right.

    ``clip`` is in standard deviations. See :class:`TernGrad`.
    """
    return except_small(TernGrad(clip))
