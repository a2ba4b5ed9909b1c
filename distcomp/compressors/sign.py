"""One bit per value, and as few scales as the papers have: one per parameter, or two per unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor, register_compressor
from distcomp.compressors.grid import (
    WHOLE,
    pack_signs,
    sign_bytes,
    unpack_signs,
)
from distcomp.layout import Layout, ParamSlice
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@register_compressor("sign")
@dataclass(frozen=True)
class ScaledSign(Compressor):
    """Each parameter as its signs and one mean magnitude::

        C(x) = (|x|_1 / d) sign(x),    sign(0) = +1;    |C(x) - x|^2 = (1 - |x|_1^2 / (d |x|_2^2)) |x|^2

    Biased: contracts by ``|x|_1^2 / (d |x|_2^2)`` (about 0.64 for Gaussian values, 1/d at worst); needs error
    feedback. On the wire: 1/8 byte per value, each parameter beginning a byte, and 4 bytes per parameter; the
    payload: ``scales``, float32, one a parameter, and ``codes``, uint8. With a scale per block instead:
    ``Quantize(bits=1)``.

    Source: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019. We differ: the paper's sign(0) is
    not said.
    """

    alignment = WHOLE

    def parts(self, layout: Layout) -> Parts:
        return (
            Part("scales", torch.float32, len(layout.slices)),
            Part("codes", torch.uint8, sum(sign_bytes(param.numel) for param in layout.slices)),
        )

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        for piece, codes, scale in self._pieces(x, payload, layout):
            scale.copy_(pack_signs(piece, codes))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        for piece, codes, scale in self._pieces(out, payload, layout):
            unpack_signs(codes, piece, scale, add)

    def _pieces(
        self, buffer: Tensor, payload: Payload, layout: Layout
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each parameter's values, signs and scale."""
        at = 0
        for number, (param, piece) in enumerate(layout.pieces(buffer)):
            stop = at + sign_bytes(param.numel)
            yield piece, payload["codes"][at:stop], payload["scales"][number]
            at = stop

    def delta(self, numel: int) -> float:
        return 1 / max(1, numel)


@register_compressor("onebit")
@dataclass(frozen=True)
class OneBit(Compressor):
    """Each value as one bit: the mean of its unit's non-negative values, or the mean of its negative ones.

    For the weights ``v`` that enter one output unit (a row of ``weight.view(out, -1)``)::

        C(v)_k = mean{v_j : v_j >= 0}  if v_k >= 0,    else  mean{v_j : v_j < 0}

    The two values are the least-squares fit for the threshold 0. Biased: contracts by one over the length of
    the longer side at worst; needs error feedback. On the wire: 1/8 byte per value and 8 bytes per unit; the
    payload: ``scales``, float32, of each parameter first all means of what is not negative, then the others;
    ``codes``, uint8.

    Source: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014. The paper has two values per
    *column*; its layers compute ``W^T v``, so a column of its W is what enters one unit: a row of torch's
    weight. We differ: a vector (a bias) is one unit.
    """

    alignment = WHOLE

    def parts(self, layout: Layout) -> Parts:
        units = sum(_unit_count(param) for param in layout.slices)
        return (
            Part("scales", torch.float32, 2 * units),
            Part("codes", torch.uint8, sign_bytes(layout.numel)),
        )

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        for units, means in self._units(x, payload, layout):
            means[0] = _mean_where(units, units >= 0)
            means[1] = _mean_where(units, units < 0)
        pack_signs(x, payload["codes"])  # the whole buffer at once: bits know no units
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        decoded = torch.empty_like(out)
        unpack_signs(payload["codes"], decoded)
        for param, piece, means in self._pieces(decoded, payload, layout):
            high, low = (_per_value(mean, param) for mean in means)
            piece.copy_(torch.where(piece >= 0, high, low))
        if add:
            out += decoded
        else:
            out.copy_(decoded)

    def _units(self, x: Tensor, payload: Payload, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter's units as rows, and where their two means go. A piece's missing values are NaN."""
        for param, piece, means in self._pieces(x, payload, layout):
            length = _unit_length(param)
            before = param.start % length
            after = -(before + param.numel) % length
            # A NaN is neither >= 0 nor < 0: what is missing of a row counts in neither mean.
            padded = torch.nn.functional.pad(piece, (before, after), value=float("nan"))
            yield padded.view(-1, length), means

    def _pieces(
        self, buffer: Tensor, payload: Payload, layout: Layout
    ) -> Iterator[tuple[ParamSlice, Tensor, Tensor]]:
        at = 0
        for param, piece in layout.pieces(buffer):
            count = 2 * _unit_count(param)
            if count:
                yield param, piece, payload["scales"][at : at + count].view(2, -1)
            at += count

    def delta(self, numel: int) -> float:
        return 1 / max(1, numel)


def _unit_length(param: ParamSlice) -> int:
    """Elements that enter one output unit."""
    if len(param.shape) < 2:
        return max(1, *param.shape) if param.shape else 1
    length = 1
    for side in param.shape[1:]:
        length *= side
    return max(1, length)


def _unit_count(param: ParamSlice) -> int:
    """How many units a slice touches, also where it is a piece that begins or ends within one."""
    if param.numel == 0:
        return 0
    length = _unit_length(param)
    return (param.stop - 1) // length - param.start // length + 1


def _mean_where(units: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values of each row; 0 where none is chosen."""
    total = torch.where(chosen, units, 0.0).sum(1)
    return total / chosen.sum(1).clamp(min=1)


def _per_value(means: Tensor, param: ParamSlice) -> Tensor:
    """One number per unit, for each value of the slice."""
    length = _unit_length(param)
    before = param.start % length
    return means.repeat_interleave(length)[before : before + param.numel]
