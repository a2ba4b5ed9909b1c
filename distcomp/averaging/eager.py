"""Eager outer updates: DiLoCo whose exchange takes a whole period, and whose own share does not wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, Departure, agreed
from distcomp.averaging.outer import Outer
from distcomp.averaging.periodic import Periodic
from distcomp.averaging.recipes.periodic import sent_through
from distcomp.collectives import Rounds
from distcomp.compressors import Compressor, Identity
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import from_compressor, register
from distcomp.methods.base import AggregateResult, Method, State


@dataclass(frozen=True)
class Eager(Averaging):
    """Step the outer optimizer at once with one's own share; those of the others follow a period later.

    ::

        Delta_i(t) = anchor_i - x_i
        g_i        = Delta_i(t) / n  +  ( mean_j Delta_j(t-1) - Delta_i(t-1) / n )
        anchor_i   = outer(anchor_i, g_i);    x_i = anchor_i

    The exchange of ``Delta(t)`` begins after step t and may take until the next one: nobody waits while it
    computes. What is in brackets is what the others learnt a period ago; before the first mean has come it is
    0. Anchors differ between workers by what is not heard yet, and no more: the sum of all ``g_i`` is that of
    all means. With ``method`` other than the exact mean, ``Delta_i(t-1)`` is the contribution. What is still
    under way at the end of a run is used by nobody: ``finish`` leaves the exact mean of the models.

    Source: Kale, Douillard & Donchev, "Eager updates for overlapped communication and computation in DiLoCo",
    2025. We differ: any method may carry the difference. Bytes: ``method``'s, every ``period`` steps. Memory:
    an anchor, an outer momentum and what is stale, float32 ``[layout.numel]`` each, and the method's state.

    Raises DistcompError for a period that changes, and for ``on_failure="continue"``.
    """

    method: Method = field(default_factory=lambda: from_compressor(Identity()))
    outer: Outer = field(default_factory=Outer)
    buffers: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.period, int):
            raise DistcompError(
                f"an eager exchange is under way for a period, which must not change, and {self.period} "
                "does; give a number of steps"
            )
        if self.on_failure != "stop" or self.buffers not in ("keep", "average"):
            raise DistcompError(
                "eager outer updates ask all workers and stop when one dies, and buffers are 'keep' or "
                f"'average', not {self.on_failure!r} and {self.buffers!r}"
            )

    @property
    def overlap(self) -> int:
        assert isinstance(self.period, int)
        return self.period

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "anchor": FlatBuffer(x.clone(), context.layout),
            "outer": self.outer.init(context.layout),
            "stale": FlatBuffer(torch.zeros_like(x), context.layout),
            "method": self.method.init(context.layout),
        }

    def depart(self, x: Tensor, state: State, context: AveragingContext) -> Departure:
        """The outer step, with one's own share of now and the others' of a period ago."""
        own = state["anchor"].data - x
        eager = own / context.size + state["stale"].data
        anchor, outer = self.outer.step(state["anchor"].data, eager, state["outer"])
        moved = {**state, "anchor": FlatBuffer(anchor, context.layout), "outer": outer}
        return Departure(own, anchor, moved)

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        """``x`` is what was learnt; the result is kept until the next departure."""
        result = yield from self.method.aggregate(x, state["method"], context)
        stale = result.estimate - result.contribution() / context.size
        kept = {**state, "stale": FlatBuffer(stale, context.layout), "method": result.state}
        return agreed(stale, kept)

    def merge(self, now: Callable[[], Tensor], estimate: Tensor) -> Tensor:
        """The model stays as it is: what has come is used at the next departure."""
        return now()

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        assert isinstance(self.period, int)
        return {"bytes_per_step": self.method.payload_bytes(layout, size, 0) / self.period}


@register(
    paper="Kale, Douillard & Donchev, Eager updates for overlapped communication and computation in DiLoCo, "
    "2025",
    wire="2 (n-1)/n 4d / period, or the compressor's",
    summable=False,
    biased=False,
    kind="periodic",
    deviations="any compressor for the outer gradient; before the first mean has come, one's own share alone",
    limitations="short runs and many workers: at first a worker steps by an n-th of what it learnt, and what "
    "the others learnt comes a period late",
)
def eager_diloco(
    period: int = 100,
    delay: int = 1,
    compressor: Method | Compressor | str = "identity",
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    buffers: str = "average",
) -> Averaging:
    """DiLoCo whose exchange lasts ``period`` steps of computing; one's own share is used at once.

    ``delay``: 1, or 0, which waits for the exchange and is ``diloco``. ``compressor``, ``outer_lr``,
    ``outer_momentum``, ``nesterov`` as for ``diloco``; ``buffers``: ``average`` or ``keep`` them when an
    exchange ends.
    """
    if delay not in (0, 1):
        raise DistcompError(f"the delay is 0 or 1 outer steps, not {delay}")
    outer, method = Outer(outer_lr, outer_momentum, nesterov), sent_through(compressor)
    if delay == 0:
        return Periodic(method, outer, period=period, buffers=buffers)
    return Eager(method=method, outer=outer, buffers=buffers, period=period)
