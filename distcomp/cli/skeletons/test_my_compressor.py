"""my_compressor against its oracle, the bound that it declares, and the bytes that it sends."""

from __future__ import annotations

import my_compressor_oracle as oracle
import pytest
import torch
from my_compressor import MyCompressor

from distcomp.compressors import parse_compressor
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import parse
from distcomp.payload import body_bytes
from distcomp.randomness import Key

LAYOUT = Layout.of([("weight", (16, 8)), ("bias", (5,))])


def given() -> torch.Tensor:
    """A flat buffer with a zero, a tiny and a huge value in it."""
    x = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x[:3] = torch.tensor([0.0, 1e-20, 1e20], dtype=torch.float32)
    return x


@pytest.mark.parametrize("kept", [2, 3])
def test_what_comes_back_is_the_oracle_s(kept: int) -> None:
    x, compressor = given(), MyCompressor(kept)
    before = x.clone()
    payload = compressor.encode(x, LAYOUT, Key.of(0))
    expected = torch.from_numpy(oracle.decoded(x.numpy(), kept))
    assert torch.equal(compressor.decode(payload, LAYOUT), expected)
    assert torch.equal(x, before), "encode changes what it is given"
    added = torch.ones_like(x)
    compressor.decode_into(added, payload, LAYOUT, add=True)
    assert torch.equal(added, 1 + expected)


@pytest.mark.parametrize("kept", [2, 3])
def test_the_bound_holds_and_the_bytes_are_those_declared(kept: int) -> None:
    x, compressor = given(), MyCompressor(kept)
    payload = compressor.encode(x, LAYOUT, Key.of(0))
    error = (compressor.decode(payload, LAYOUT).double() - x.double()).square().sum()
    assert error <= (1 - compressor.delta(LAYOUT.numel)) * x.double().square().sum()
    assert body_bytes(compressor.parts(LAYOUT)) == oracle.part_bytes(LAYOUT.numel, kept)
    assert payload.wire.numel() == compressor.wire_bytes(LAYOUT)


def test_its_text_makes_it_and_methods_carry_it() -> None:
    assert parse_compressor("my_compressor:kept=3") == MyCompressor(kept=3)
    assert "MyCompressor(kept=3)" in repr(parse("ef21:compressor=(my_compressor:kept=3)"))
    with pytest.raises(DistcompError, match="2 or 3"):
        MyCompressor(kept=5)
