"""A linear projection on the wire: drawn anew in every step, for a fixed one never arrives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.compressors import Compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key


@dataclass(frozen=True)
class RandomProjection(Compressor):
    """Send signed bucket means of each parameter, of a hash that is drawn anew in every step.

    ::

        C(x)[i] = s(i) mean_{j: h(j) = h(i)} s(j) x[j]      h: to numel/ratio buckets, s: +-1, drawn

    An orthogonal projection: what a hashed structure (:class:`distcomp.structured.Hashed`) does to a weight,
    done to a gradient. In expectation ``1/ratio`` of the square of x arrives, in each step another part of
    it: use it within error feedback.

    ``redraw=False``, the same projection in every step, is refused: what lies outside its range is never
    sent, error feedback piles it up, and training diverges. A structure that is *trained* is another matter;
    its own few numbers are exchanged whole.

    Bytes: ``8 + 4 numel/ratio``. Raises DistcompError for a ratio below 2, and for ``redraw=False``.
    """

    ratio: int = 4
    redraw: bool = True

    def __post_init__(self) -> None:
        if self.ratio < 2:
            raise DistcompError(f"a projection is to a half of the numbers or fewer, not to 1/{self.ratio}")
        if not self.redraw:
            raise DistcompError(
                "a fixed linear projection on the wire diverges, with error feedback too: what it leaves out "
                "is never sent; use redraw=True, or give the model the structure: "
                "distcomp.structured.hashed(model)"
            )

    def parts(self, layout: Layout) -> Parts:
        sums = sum(self._buckets(param) for param in layout.slices)
        return (Part("seed", torch.int64, 1), Part("means", torch.float32, sums))

    def _buckets(self, param: ParamSlice) -> int:
        return -(-param.numel // self.ratio)

    def _drawn(self, param: ParamSlice, seed: int) -> tuple[Tensor, Tensor]:
        draw = Key(seed).fold(param.name, param.start).generator()
        bucket = torch.randint(self._buckets(param), (param.numel,), generator=draw)
        sign = 2.0 * torch.randint(2, (param.numel,), generator=draw).to(torch.float32) - 1
        return bucket, sign

    def encode(self, x: Tensor, layout: Layout, key: Key) -> Payload:
        payload = Payload.empty(self.parts(layout), x.device)
        payload["seed"].fill_(key.seed)
        at = 0
        for param, start in zip(layout.slices, layout.offsets, strict=True):
            bucket, sign = (drawn.to(x.device) for drawn in self._drawn(param, key.seed))
            count = self._buckets(param)
            sums = torch.zeros(count, dtype=torch.float32, device=x.device)
            sums.index_add_(0, bucket, sign * x[start : start + param.numel])
            payload["means"][at : at + count] = sums / torch.bincount(bucket, minlength=count).clamp(min=1)
            at += count
        return payload

    def decode_into(self, out: Tensor, payload: Payload, layout: Layout, add: bool = False) -> None:
        seed, at = int(payload["seed"][0]), 0
        for param, start in zip(layout.slices, layout.offsets, strict=True):
            bucket, sign = (drawn.to(out.device) for drawn in self._drawn(param, seed))
            count = self._buckets(param)
            values = sign * payload["means"][at : at + count][bucket]
            own = out[start : start + param.numel]
            own.copy_(own + values if add else values)
            at += count

    def delta(self, numel: int) -> float:
        """In expectation over the draws."""
        return 1 / (2 * self.ratio)
