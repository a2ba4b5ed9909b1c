"""What the kernel tests draw: awkward sizes, awkward values, and one call described by a value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from distcomp import kernels
from distcomp.kernels.dispatch import Backend
from distcomp.kernels.packing import Coding

AWKWARD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 2.0**-120, 3.4e38]


@dataclass(frozen=True)
class Case:
    """One tensor and how to quantize it."""

    x: Tensor
    block: int
    bits: int
    key: int = 0
    first: int = 0
    stochastic: bool = True
    given: Tensor | None = None
    """Scales handed in, or None to compute them."""
    l2: bool = False
    """Whether scales that are computed are Euclidean norms."""
    powers: bool = False
    """Whether levels are powers of two."""

    def encode(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """(codes, scales), from outputs that held rubbish."""
        n, device = self.x.numel(), self.x.device
        code_bytes = kernels.packed_bytes(n, self.block, self.bits)
        codes = torch.full((code_bytes,), 0xA5, dtype=torch.uint8, device=device)
        scales = torch.full((kernels.scale_count(n, self.block),), 7.0, device=device)
        if self.given is not None:
            scales.copy_(self.given)
        backend.quantize(
            self.x, codes, scales, block=self.block, bits=self.bits, key=self.key, first=self.first,
            coding=Coding(
                self.stochastic, "l2" if self.l2 else "max" if self.given is None else "given", self.powers
            ),
        )  # fmt: skip
        return codes, scales

    def decode(
        self, backend: Backend, codes: Tensor, scales: Tensor, sign: int = 0, times: float = 1.0
    ) -> Tensor:
        """Decoded into x reversed, so that what was there before matters where it should."""
        out = self.x.flip(0).contiguous()
        backend.dequantize(
            codes, scales, out, block=self.block, bits=self.bits, powers=self.powers, sign=sign, times=times
        )
        return out

    def on(self, device: str) -> Case:
        given = None if self.given is None else self.given.to(device)
        return replace(self, x=self.x.to(device), given=given)


@st.composite
def cases(draw: st.DrawFn, finite: bool = False, largest: int = 2100) -> Case:
    """Sizes about a block's edge, any width and key, magnitudes from denormal to huge, awkward values."""
    block = draw(st.sampled_from([1, 2, 7, 8, 16, 100, 512, 513]))
    edges = [0, 1, block - 1, block, block + 1, 3 * block - 1]
    numel = draw(st.sampled_from(edges) | st.integers(0, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    magnitude = draw(st.sampled_from([1.0, 1e-3, 1e4] if finite else [1.0, 1e-42, 1e-36, 1e30, 1e38]))
    x = torch.randn(numel, generator=generator) * magnitude
    if numel and not finite:
        for value in draw(st.lists(st.sampled_from(AWKWARD), max_size=4)):
            x[draw(st.integers(0, numel - 1))] = value
    rows = kernels.scale_count(numel, block)
    given = draw(st.none() | st.sampled_from([1.0, 0.0, 1e-40, float("inf"), float("nan")]))
    bits = draw(st.integers(1, 8))
    return Case(
        x, block, bits, key=draw(st.integers(0, 2**64 - 1)),
        first=block * draw(st.sampled_from([0, 1, 2**32 // block]) | st.integers(0, 10**6)),
        stochastic=draw(st.booleans()),
        given=None if finite or given is None else torch.rand(rows, generator=generator) * given * magnitude,
        l2=not finite and given is None and draw(st.booleans()),
        powers=not finite and bits > 1 and draw(st.booleans()),
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal fp32 bit patterns, -0.0 and denormals included; which NaN a NaN is may differ."""
    a, b = a.cpu(), b.cpu()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))
