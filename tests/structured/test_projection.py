"""A projection on the wire: it is one, it is drawn anew, and a fixed one is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import DistcompError, structured
from distcomp.layout import Layout
from distcomp.methods import ErrorFeedback, from_compressor
from distcomp.payload import wire_bytes
from distcomp.randomness import Key

LAYOUT = Layout.of([("a", (9, 7)), ("b", (5,))])


def test_it_is_an_orthogonal_projection_onto_signed_bucket_means() -> None:
    codec, x = structured.RandomProjection(4), torch.randn(68, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(x, LAYOUT, Key(3))
    once = codec.decode(payload, LAYOUT)
    for param, start in zip(LAYOUT.slices, LAYOUT.offsets, strict=True):
        bucket, sign = (drawn.numpy() for drawn in codec._drawn(param, Key(3).seed))
        piece = x[start : start + param.numel].numpy()
        for b in range(-(-param.numel // 4)):
            inside = bucket == b
            if inside.any():
                mean = (sign[inside] * piece[inside]).mean()
                decoded = once[start : start + param.numel].numpy()[inside]
                np.testing.assert_allclose(decoded, sign[inside] * mean, atol=1e-6)
    again = codec.decode(codec.encode(once, LAYOUT, Key(3)), LAYOUT)
    torch.testing.assert_close(again, once)
    assert float(once @ (x - once)) == pytest.approx(0, abs=1e-4)
    assert codec.wire_bytes(LAYOUT) == wire_bytes(codec.parts(LAYOUT))
    assert not torch.equal(codec.decode(codec.encode(x, LAYOUT, Key(4)), LAYOUT), once)


def test_a_fixed_one_is_refused_by_name() -> None:
    with pytest.raises(DistcompError, match=r"fixed linear projection on the wire diverges.*use redraw=True"):
        structured.RandomProjection(4, redraw=False)
    with pytest.raises(DistcompError, match="to a half of the numbers or fewer"):
        structured.RandomProjection(1)


def learns(rank: int, size: int) -> tuple[float, list[float]]:
    """The distance to a known solution after training with a quarter of the numbers on the wire."""
    torch.manual_seed(0)
    inner, truth = nn.Linear(12, 6), nn.Linear(12, 6)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = ErrorFeedback(from_compressor(structured.RandomProjection(4)))
    handle = distcomp.attach(model, optimizer, method)
    for step in range(150):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        (model(x) - truth(x)).square().sum(1).mean().backward()
        optimizer.step()
    handle.detach()
    weights = inner.weight.detach()
    return float((weights - truth.weight).abs().max()), weights.flatten().tolist()


def test_one_that_is_drawn_anew_learns_on_two_ranks(cluster) -> None:
    (first, weights), (_, other) = cluster(2).run(learns)
    assert first < 0.05
    assert weights == other
