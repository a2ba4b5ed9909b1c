"""Half-width floats: bfloat16 and float16."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp import kernels
from distcomp.compressors.base import Compressor, register_preset
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Name -> type on the wire."""


@dataclass(frozen=True)
class Cast(Compressor):
    """``C(x) = round(x)`` to the nearest value of a 16-bit float (ties to even).

    ``|C(x)_j - x_j| <= 2^-8 |x_j|`` for bfloat16 and ``2^-11 |x_j|`` for float16, where x_j is a normal
    number of the type. On the wire: 2 bytes per value; the payload is ``values``, in the type, as many as the
    buffer has. A NaN stays one.

    float16 clamps finite values to its range (65504) and lets an infinity through: an overflow must not look
    like a number, and a number must not look like an overflow. Payloads may be added on the wire; every hop
    of the ring then rounds once more, so :class:`distcomp.methods.AllReduceMean` divides by the world size
    *before* it encodes.

    Raises DistcompError for a dtype other than ``bf16`` and ``fp16``.
    """

    dtype: str = "bf16"

    summable = True
    propagates_nonfinite = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DistcompError(f"cast knows no dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")

    @property
    def largest(self) -> float:  # type: ignore[override]
        return 65504.0 if self.dtype == "fp16" else math.inf

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", DTYPES[self.dtype], layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        values = payload["values"].copy_(x)
        # Looking costs a fraction of clamping; a GPU is not waited for and clamps.
        if self.dtype == "fp16" and not (x.device.type == "cpu" and kernels.all_finite(values)):
            # Found by what the cast did, not by comparing with 65504: up to 65519 rounds down to that.
            overflowed = values.isinf() & x.isfinite()
            values.copy_(torch.where(overflowed, x.clamp(-self.largest, self.largest), x))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        if add:
            out.add_(payload["values"])
        else:
            out.copy_(payload["values"])

    def delta(self, numel: int) -> float:
        """Relative rounding error of a normal number: 2^-8 (bf16, 8 significant bits), 2^-11 (fp16, 11)."""
        return 1 - 2.0 ** (-16 if self.dtype == "bf16" else -22)


register_preset("bf16", Cast("bf16"))
register_preset("fp16", Cast("fp16"))
