"""Stop sending what is not there: a mask that all ranks share is a summable compressor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.active import ActiveSet
from distcomp.compressors import Compressor
from distcomp.layout import Layout
from distcomp.payload import Part, Parts, Payload
from distcomp.pruning.active import MaskSnapshot
from distcomp.randomness import Key


@dataclass(frozen=True, eq=False)
class Support(Compressor):
    """Send the active coordinates in float32 and nothing else: ``decode(encode(x)) = x * mask``.

    Masks are the same on every rank, so payloads may be added on the wire. ``4 nnz`` bytes, no indices.
    ``x``: float32 ``[layout.numel]``. It is a projection: what is inactive is not sent, and owed by whoever
    keeps residuals. The masks are those given and do not change: :func:`distcomp.masked` follows a pruner's.
    """

    summable = True

    masks: MaskSnapshot

    def _active(self, layout: Layout) -> ActiveSet:
        return self.masks.active(layout, dense=False)

    def parts(self, layout: Layout) -> Parts:
        return (Part("values", torch.float32, self._active(layout).layout.numel),)

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        payload["values"].copy_(self._active(layout).pick(x))
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        decoded = self._active(layout).spread(payload["values"])
        if add:
            out.add_(decoded)
        else:
            out.copy_(decoded)
