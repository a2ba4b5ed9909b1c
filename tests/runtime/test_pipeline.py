"""The order in which buckets exchange: along diagonals, and sizes followed at once by what they are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distcomp.collectives import Request
from distcomp.layout import Layout
from distcomp.methods import parse
from distcomp.methods.base import StepContext
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Channel
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.pipeline import Drive

LAYOUT = Layout.of([("w", (64, 128))])


class Arrived:
    """A request that was answered by what it sent."""

    started_s = finished_s = 0.0

    def __init__(self, request: Request) -> None:
        self._wires = [request.sends()[0].wire]

    def wait(self) -> Any:
        return self._wires


class Alone:
    """A world of one rank that counts what it was asked."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.asked = 0

    def start(self, request: Request) -> Arrived:
        self.asked += 1
        return Arrived(request)


@pytest.mark.parametrize(
    ("method", "before_the_second"), [("qsgd:bits=4", 1), ("lossless:inner=(qsgd:bits=4)", 2)]
)
def test_a_bucket_is_on_its_way_before_the_next_one_is_there(method: str, before_the_second: int) -> None:
    """Of a coded one both its size and its payload: backward may still take long."""
    transport = Alone()
    drive = Drive(Channel(transport, 0, Ledger()))
    x = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(0))
    for bucket in range(2):
        assert transport.asked == bucket * before_the_second
        context = StepContext(0, 1, LAYOUT, 0, Key.of(bucket))
        drive.add(Aggregation(parse(method), x, parse(method).init(LAYOUT), context))
    drive.end()
    assert transport.asked == 2 * before_the_second
    assert all(one.result is not None for one in drive.aggregations)
