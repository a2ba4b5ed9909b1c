"""Coefficients instead of elements: what a chain makes of them."""

from __future__ import annotations

import torch

from distcomp.compressors import Chain, DctTopK, Identity
from distcomp.layout import Layout
from distcomp.randomness import Key


def test_a_chain_rounds_the_coefficients() -> None:
    """``C(x) = DCT^-1 Q(top_k(DCT x))``: what stands for the values is the transform's, not an element."""
    layout = Layout.of([("a", (64, 48)), ("b", (100,))])
    x = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    exact, chain = DctTopK(k=8, side=16), Chain(DctTopK(k=8, side=16), Identity())
    wanted = exact.decode(exact.encode(x, layout, Key.of(1)), layout)
    assert torch.equal(chain.decode(chain.encode(x, layout, Key.of(1)), layout), wanted)
    owed = x.clone()
    chain.subtract_from(owed, chain.encode(x, layout, Key.of(1)), layout)
    assert torch.equal(owed, x - wanted)
