"""From a method, a machine and a network to the seconds of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from distcomp.advice.overlap import StepTime, Timing, averaging_step, gradient_step
from distcomp.advice.talks import Round, Talk, clock, exchanges_of, talks_of
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.network.asks import Ask
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.sync.averaging import Averaging, Levels
from distcomp.sync.observe import Observed

STOCK = {"ddp": 4, "torch:fp16": 2}
"""PyTorch's own reductions that are predicted, and the bytes they send of each value."""


@dataclass(frozen=True)
class Machine:
    """What was measured of a model on a machine, and what its ranks share. ``slowness``: of computing,
    against when it was measured."""

    observed: Observed
    host: Host = ALONE
    slowness: float = 1.0

    @property
    def timing(self) -> Timing:
        """A step without communication."""
        return Timing(self.observed.ready_s, self.observed.step_s).times(self.slowness)


@dataclass(frozen=True)
class Rehearsed:
    """A method as it was held with an echo among ``ranks``."""

    method: str
    ranks: int
    talks: tuple[Talk, ...]
    averages: bool = False


@dataclass(frozen=True)
class Prediction(StepTime):
    """Seconds of a step, and the bytes each rank sends in one."""

    sent_bytes: float = field(default=0.0)


def rehearse(method: str, layouts: Sequence[Layout], ranks: int) -> Rehearsed:
    """Hold the method's conversations about these buckets, timed, on this machine."""
    if method in STOCK:
        return Rehearsed(method, ranks, tuple(_stock_talk(method, layout) for layout in layouts))
    parsed = parse(method)
    if isinstance(parsed, Averaging | Levels):
        model = Layout(tuple(segment for layout in reversed(layouts) for segment in layout.segments))
        return Rehearsed(method, ranks, exchanges_of(parsed, model, ranks), averages=True)
    assert isinstance(parsed, Method)
    return Rehearsed(method, ranks, talks_of(parsed, layouts, ranks))


def predict(rehearsed: Rehearsed, machine: Machine, fabric: Fabric) -> Prediction:
    """The step time of a method that was rehearsed among as many ranks as the fabric has."""
    talks = rehearsed.talks
    if rehearsed.averages:
        time_ = averaging_step(machine.timing, talks, fabric, machine.host, machine.slowness)
    else:
        if rehearsed.method in STOCK:
            talks = around_a_ring(talks)
        time_ = gradient_step(machine.timing, talks, fabric, machine.host, machine.slowness)
    sent = sum(talk.share * one.ask.sent_bytes(fabric.ranks) for talk in talks for one in talk.rounds)
    return Prediction(**vars(time_), sent_bytes=sent)


def around_a_ring(talks: Sequence[Talk]) -> tuple[Talk, ...]:
    """The talks with every sum around a ring, however small: PyTorch's own know no other way."""
    return tuple(
        replace(talk, rounds=tuple(replace(one, ask=replace(one.ask, kind="ring")) for one in talk.rounds))
        for talk in talks
    )


def _stock_talk(method: str, layout: Layout) -> Talk:
    """One sum of a bucket, multiplied by 1/n, and cast where that is what the hook does."""
    bucket, times_s = torch.randn(layout.numel), []
    for _ in range(7):
        begin_s = clock()
        sent = bucket.half() if method == "torch:fp16" else bucket
        sent.mul_(0.5)
        times_s.append(clock() - begin_s)
    return Talk((Round(statistics.median(times_s), Ask("sum", (STOCK[method] * layout.numel,))),), 0.0)
