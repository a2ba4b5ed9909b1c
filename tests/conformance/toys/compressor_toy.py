"""A compressor in one file, as a newcomer would add it: three of the four bytes of a float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors import Compressor, register_compressor
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@register_compressor("three_bytes")
@dataclass(frozen=True)
class ThreeBytes(Compressor):
    """Leave out the lowest byte of each value: 15 bits of the mantissa stay, in 3 bytes per value."""

    def parts(self, layout: Layout) -> Parts:
        return (Part("codes", torch.uint8, 3 * layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        payload["codes"].copy_(x.contiguous().view(torch.uint8).view(x.numel(), 4)[:, 1:].reshape(-1))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        four = torch.zeros(layout.numel, 4, dtype=torch.uint8, device=out.device)
        four[:, 1:] = payload["codes"].view(layout.numel, 3)
        values = four.view(-1).view(torch.float32)
        out.copy_(out + values if add else values)

    def delta(self, numel: int) -> float:
        return 1 - 2.0**-30
