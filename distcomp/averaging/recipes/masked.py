"""Any method, for living weights only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.periodic import Periodic
from distcomp.collectives import AllReduce, Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, cut_state
from distcomp.methods.registry import parse
from distcomp.pruning.pruner import Pruner
from distcomp.pruning.wire import ActiveCoordinates, Masked, active, recalled, remembered


def masked(pruner: Pruner, method: Method | Averaging | str, residuals: str = "keep") -> Any:
    """Let a method send what lives of a pruned model, and nothing of what is dead.

    ``method`` carries gradients, averages models every few steps, or gossips; an object or the text of one.
    ``residuals`` of weights that are pruned wait until the weight lives again (``keep``) or go (``drop``).

    Bytes: the method's, for the living weights; in the iteration before a mask changes all, where the
    criterion needs gradients of dead weights; 8 bytes and a header to each rank at each change, and where
    ranks differ between exchanges one float32 mean of the weights.

    Raises DistcompError for an averaging of whole models other than periodic averaging of differences and
    gossip.
    """
    chosen = parse(method) if isinstance(method, str) else method
    if isinstance(chosen, Periodic):
        return replace(chosen, method=Masked(pruner, chosen.method, residuals))
    if isinstance(chosen, Gossip):
        return MaskedGossip(pruner, chosen, period=chosen.period, on_failure=chosen.on_failure)
    if isinstance(chosen, Method):
        return Masked(pruner, chosen, residuals)
    raise DistcompError(
        f"{chosen!r} cannot be masked; use a gradient method, periodic averaging of differences, or gossip"
    )


@dataclass(frozen=True)
class MaskedGossip(Averaging):
    """Gossip about living weights; dead ones are each worker's own and mean nothing.

    When a mask changes, replicas follow it: all workers take the exact mean of their models
    (``2 (n-1)/n 4 nnz`` bytes, once) and gossip starts anew from there.
    """

    pruner: Pruner
    inner: Gossip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_failure != "stop":
            raise DistcompError("pruned gossip asks all workers when a mask changes; use on_failure='stop'")

    @property
    def starts_anew(self) -> bool:
        return True

    def init(self, x: Tensor, context: AveragingContext) -> State:
        some = active(self.pruner, context.layout)
        return self._state(self.inner.init(some.pick(x), replace(context, layout=some.layout)), some)

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        some = active(self.pruner, context.layout)
        about = replace(context, layout=some.layout)
        mine = some.pick(x)
        if not torch.equal(state["alive"].data, some.spread(torch.ones_like(mine))):
            mean = yield AllReduce(mine * (1.0 / context.size))
            return agreed(_put(x, mean, some), self._state(self.inner.init(mean, about), some))
        fitted = recalled(self.inner.init(mine, about), cut_state(state["inner"]), some)
        result = yield from self.inner.aggregate(mine, fitted, about)
        return agreed(_put(x, result.estimate, some), self._state(result.state, some))

    def _state(self, inner: State, some: ActiveCoordinates) -> State:
        alive = some.spread(torch.ones(some.layout.numel))
        return {"alive": FlatBuffer(alive, some.whole), "inner": remembered(inner, {}, some)}

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        return self.inner.conditions(active(self.pruner, layout).layout, size)

    def report(self, state: State) -> dict[str, Any]:
        return self.inner.report(state["inner"])


def _put(x: Tensor, some: Tensor, where: ActiveCoordinates) -> Tensor:
    """``x`` with its living coordinates replaced."""
    if where.places is None:
        return some
    out = x.clone()
    out[where.places.to(x.device)] = some
    return out
