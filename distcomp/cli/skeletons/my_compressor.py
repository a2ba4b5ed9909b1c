"""my_compressor: the equation, in one line, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors import Compressor, register_compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@register_compressor("my_compressor")
@dataclass(frozen=True)
class MyCompressor(Compressor):
    """Keep the upper ``kept`` of the four bytes of each value: the rest of its mantissa is cut off."""

    kept: int = 2

    def __post_init__(self) -> None:
        if self.kept not in (2, 3):
            raise DistcompError(f"my_compressor keeps 2 or 3 bytes of 4, not {self.kept}; the default is 2")

    def parts(self, layout: Layout) -> Parts:
        """What a payload holds, from the layout alone: every rank knows what will arrive."""
        return (Part("codes", torch.uint8, self.kept * layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        """``x`` is float32, ``[layout.numel]``, and is left alone. All that is random comes from ``key``."""
        payload = Payload.empty(self.parts(layout), x.device)
        four = x.contiguous().view(torch.uint8).view(layout.numel, 4)
        payload["codes"].copy_(four[:, 4 - self.kept :].reshape(-1))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        """Write what was encoded into ``out``, or add it."""
        four = torch.zeros(layout.numel, 4, dtype=torch.uint8, device=out.device)
        four[:, 4 - self.kept :] = payload["codes"].view(layout.numel, self.kept)
        values = four.view(-1).view(torch.float32)
        out.copy_(out + values if add else values)

    def delta(self, numel: int) -> float:
        """``|C(x) - x|^2 <= (1 - delta) |x|^2``: what error feedback needs to converge."""
        mantissa_bits = 8 * self.kept - 9
        return 1 - 2.0 ** (-2 * mantissa_bits)
