"""DeMo with its coefficients' values in few bits: what is sent, what is kept, what it weighs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distcomp.compressors import Chain, DctTopK, Natural, Quantize, TopK, parse_compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import DecoupledMomentum, demo
from tests.lockstep import World, once

LAYOUT = Layout.of([("w", (64, 64)), ("v", (32, 16))])
BETA = 0.9


def gradient(step: int, rank: int = 0) -> Tensor:
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.parametrize("values", ["int8", "int1", "onebit", "mxfp4"])
def test_what_is_kept_is_the_momentum_less_what_was_sent(values: str) -> None:
    """``d <- beta d + g - DCT^-1(q)``, q as the others read it: what rounding missed is not lost."""
    method = DecoupledMomentum(Chain(DctTopK(8, 16), parse_compressor(values)), BETA, sign=False)
    world = World(method, 2, LAYOUT)
    d = [torch.zeros(LAYOUT.numel, dtype=torch.float32) for _ in range(2)]
    for step in range(5):
        xs = [gradient(step, rank) for rank in range(2)]
        estimate = torch.as_tensor(world.mean(xs))
        assert estimate.abs().sum() > 0
        before = [BETA * old + x for old, x in zip(d, xs, strict=True)]
        d = [state["momentum"].data.clone() for state in world.states]
        sent = [old - new for old, new in zip(before, d, strict=True)]
        coefficients = [method.transform.transform(one, LAYOUT) for one in sent]
        kept = method.transform.kept(LAYOUT).numel
        assert all(int((one.abs() > 1e-4).sum()) <= kept for one in coefficients)


def test_one_bit_is_the_sign_times_the_mean_magnitude_of_the_chosen() -> None:
    layout = Layout.of([("w", (16, 16))])
    x = torch.randn(256, generator=torch.Generator().manual_seed(1))
    method = DecoupledMomentum(Chain(DctTopK(8, 16), Quantize(1)), 0.0, sign=False)
    result = once(method, [x], layout)
    y = method.transform.transform(x, layout)
    chosen = y.abs().topk(8).indices
    wanted = torch.zeros(256, dtype=torch.float32)
    wanted[chosen] = y[chosen].sign() * y[chosen].abs().mean()
    assert torch.allclose(result.estimate, method.transform.inverse(wanted, layout), atol=1e-5)


def test_narrow_values_weigh_what_their_bits_say() -> None:
    sizes = {values: demo(values=values).payload_bytes(LAYOUT, 2, 0) for values in ("fp32", "int8", "int1")}
    kept = DctTopK().kept(LAYOUT).numel
    assert sizes["fp32"] - sizes["int8"] == pytest.approx(3 * kept, abs=32)
    assert sizes["fp32"] - sizes["int1"] == pytest.approx(4 * kept - kept / 8, abs=32)
    assert str(demo(values="int1")) == "demo:values=int1"


def test_coefficients_of_no_transform_are_refused() -> None:
    with pytest.raises(DistcompError, match="DctTopK"):
        DecoupledMomentum(Chain(TopK(), Natural()))
    with pytest.raises(DistcompError, match="no compressor"):
        demo(values="int99")
