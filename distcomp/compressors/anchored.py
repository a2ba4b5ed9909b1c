"""A grid around what all hold alike: the error does not depend on the value, and nothing is ever clamped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor
from distcomp.compressors.fixed import integer_bytes, pack_integers, unpack_integers
from distcomp.compressors.grid import uniform_noise
from distcomp.kernels.reference import round_at_random
from distcomp.layout import Layout, ParamSlice
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

FINENESS = 1024
"""Multiples of the spacing in a typical weight. The mean of n models wanders by ``spacing sqrt(2 T / (3 n))``
or less in T exchanges: 1 % of a typical weight in 1,000 with 8 workers."""

MEDIAN_OF_GAUSSIAN = 0.6745
"""The median magnitude of a standard normal variable."""


@dataclass(frozen=True, eq=False)
class AnchoredGrid(Compressor):
    """Round the difference to an anchor at random to a multiple of a spacing, in integers of ``bits`` bits::

        C(z)_k = a_k + h_p round((z_k - a_k) / h_p),    h_p = 2^w_p spacing_p
        w_p    = the smallest number >= 0 with max |z - a| <= h_p (2^(bits-1) - 1) over parameter p

    ``anchor`` (float32, one flat buffer) and ``spacing`` (one power of two per parameter) are equal on all
    ranks. The mean is right, and as long as nothing is widened (w = 0) the error of a value is below
    ``spacing_p``, whatever the value. Where a difference does not fit, its parameter's grid is widened for
    this message instead of clamping it: receivers read ``w`` from the payload. What equals the anchor is
    exact. ``x``: float32 ``[layout.numel]``.

    On the wire: ``bits/8`` bytes per value and one per parameter.

    Source: none; it is what ECD needs (:class:`distcomp.averaging.extrapolation.ECD`), whose paper asks for
    an absolutely bounded error and names no quantizer that has one.
    """

    anchor: Tensor
    spacing: Mapping[str, Tensor]
    bits: int

    unbiased = True

    @property
    def levels(self) -> int:
        """Levels on either side of the anchor."""
        return (1 << (self.bits - 1)) - 1

    def parts(self, layout: Layout) -> Parts:
        return (
            Part("codes", torch.uint8, integer_bytes(layout.numel, self.bits)),
            Part("widening", torch.uint8, len(layout.slices)),
        )

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        offset = x - self.anchor
        largest = [float(piece.abs().amax()) if piece.numel() else 0.0 for _, piece in layout.pieces(offset)]
        widened = [
            _doublings(peak / (float(self.spacing[param.name]) * self.levels))
            for param, peak in zip(layout.slices, largest, strict=True)
        ]
        payload["widening"].copy_(torch.tensor(widened, dtype=torch.uint8))
        rounded = round_at_random(offset / self._steps(payload, layout), uniform_noise(layout, key, x.device))
        # What is finite fits by now; an infinity becomes some integer, and its rank announces it.
        codes = rounded.clamp_(-self.levels, self.levels).to(torch.int64) + self.levels
        payload["codes"].copy_(pack_integers(codes, self.bits))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        codes = unpack_integers(payload["codes"], layout.numel, self.bits)
        values = torch.add(self.anchor, (codes - self.levels).float() * self._steps(payload, layout))
        if add:
            out += values
        else:
            out.copy_(values)

    def _steps(self, payload: Payload, layout: Layout) -> Tensor:
        """``h_p`` of each value's parameter."""
        widened = payload["widening"].tolist()
        steps = [
            math.ldexp(float(self.spacing[param.name]), doublings)
            for param, doublings in zip(layout.slices, widened, strict=True)
        ]
        lengths = torch.tensor([param.numel for param in layout.slices], dtype=torch.int64)
        return torch.repeat_interleave(torch.tensor(steps, dtype=torch.float32), lengths).to(
            payload.wire.device
        )

    def outside(self, x: Tensor, layout: Layout) -> Iterator[tuple[ParamSlice, Tensor]]:
        """How many values of each parameter do not fit into its grid as it is."""
        for param, piece in layout.pieces((x - self.anchor).abs()):
            yield param, (piece > float(self.spacing[param.name]) * self.levels).sum()


def _doublings(ratio: float) -> int:
    """The smallest w in 0..127 with ``ratio <= 2^w``; what is not finite takes the largest."""
    if not math.isfinite(ratio):
        return 127
    # frexp is exact, where log2 of a number just above a power of two rounds down to it.
    mantissa, exponent = math.frexp(ratio)
    return min(127, max(0, exponent - (mantissa == 0.5)))


def spacing_of(x: Tensor, layout: Layout, given: float | None = None) -> dict[str, Tensor]:
    """A spacing for each parameter: ``given``, or the power of two below a 1024th of its typical weight.

    Typical is the median magnitude of the weights that are not zero, as of a Gaussian: one outlier does not
    make the others coarse. A parameter of zeros takes the median over the others; a model of zeros counts as
    one of weights of 1.
    """
    if given is not None:
        return {name: torch.tensor(given, dtype=torch.float32) for name in layout.names}
    typical = {param.name: _typical(piece) for param, piece in layout.pieces(x)}
    known = sorted(scale for scale in typical.values() if scale > 0)
    usual = known[len(known) // 2] if known else 1.0
    return {
        name: torch.tensor(2.0 ** math.floor(math.log2((scale or usual) / FINENESS)), dtype=torch.float32)
        for name, scale in typical.items()
    }


def _typical(weights: Tensor) -> float:
    """The standard deviation of a Gaussian of the same median magnitude; 0 for zeros."""
    magnitudes = weights.abs()
    magnitudes = magnitudes[magnitudes > 0]  # pruned weights say nothing of the size of those that are left
    return float(magnitudes.median()) / MEDIAN_OF_GAUSSIAN if magnitudes.numel() else 0.0
