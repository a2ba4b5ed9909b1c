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
from distcomp.kernels import two_means
from distcomp.kernels.two_means import Units
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
        return (
            Part("scales", torch.float32, self._units(layout).scale_count),
            Part("codes", torch.uint8, sign_bytes(layout.numel)),
        )

    def _units(self, layout: Layout) -> Units:
        return layout.remember((OneBit, "units"), lambda: _laid_out(layout))

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        two_means.encode(x.contiguous(), self._units(layout), payload["codes"], payload["scales"])
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        two_means.put(payload["codes"], self._units(layout), payload["scales"], out, int(add))

    def subtract_from(self, out: Tensor, payload: Payload, layout: Layout) -> None:
        two_means.put(payload["codes"], self._units(layout), payload["scales"], out, -1)

    def delta(self, numel: int) -> float:
        return 1 / max(1, numel)


def _laid_out(layout: Layout) -> Units:
    places = zip(layout.offsets, layout.slices, strict=True)
    return Units.of(
        [(at, param.numel, param.start, _unit_length(param)) for at, param in places], layout.numel
    )


def _unit_length(param: ParamSlice) -> int:
    """Elements that enter one output unit."""
    if len(param.shape) < 2:
        return max(1, *param.shape) if param.shape else 1
    length = 1
    for side in param.shape[1:]:
        length *= side
    return max(1, length)
