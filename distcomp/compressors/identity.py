"""No compression: float32 as it is. The baseline that every other compressor is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor, register_compressor
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@register_compressor("identity")
@dataclass(frozen=True)
class Identity(Compressor):
    """``C(x) = x``, float32 as it is: exact, and payloads may be added on the wire.

    On the wire: 4 bytes per value; the payload is ``values``, float32 ``[layout.numel]``.
    """

    summable = True
    unbiased = True
    propagates_nonfinite = True

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float32, layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        payload["values"].copy_(x)
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        if add:
            out.add_(payload["values"])
        else:
            out.copy_(payload["values"])

    def omega(self, numel: int) -> float:
        return 0.0
