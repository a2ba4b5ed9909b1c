"""Any method, for living weights only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.exchange import Sum, Talk
from distcomp.layout import Layout, Slab
from distcomp.methods.base import Method, Outcome, State, cut_state
from distcomp.methods.registry import parse
from distcomp.pruning.pruner import Pruner
from distcomp.pruning.wire import Living, Masked, living, recalled, remembered
from distcomp.sync.averaging import Averaging, Moment, agreed
from distcomp.sync.gossip import Gossip
from distcomp.sync.periodic import Periodic


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

    def init(self, x: Tensor, turn: Moment) -> State:
        some = living(self.pruner, turn.layout)
        return self._state(self.inner.init(some.pick(x), replace(turn, layout=some.layout)), some)

    def talk(self, x: Tensor, state: State, turn: Moment) -> Talk[Outcome]:
        some = living(self.pruner, turn.layout)
        about = replace(turn, layout=some.layout)
        mine = some.pick(x)
        if not torch.equal(state["alive"].data, some.spread(torch.ones_like(mine))):
            mean = yield Sum(mine * (1.0 / turn.size))
            return agreed(_put(x, mean, some), self._state(self.inner.init(mean, about), some))
        fitted = recalled(self.inner.init(mine, about), cut_state(state["inner"]), some)
        outcome = yield from self.inner.talk(mine, fitted, about)
        return agreed(_put(x, outcome.estimate, some), self._state(outcome.state, some))

    def _state(self, inner: State, some: Living) -> State:
        alive = some.spread(torch.ones(some.layout.numel))
        return {"alive": Slab(alive, some.whole), "inner": remembered(inner, {}, some)}

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        return self.inner.conditions(living(self.pruner, layout).layout, size)

    def report(self, state: State) -> dict[str, Any]:
        return self.inner.report(state["inner"])


def _put(x: Tensor, some: Tensor, where: Living) -> Tensor:
    """``x`` with its living coordinates replaced."""
    if where.places is None:
        return some
    out = x.clone()
    out[where.places.to(x.device)] = some
    return out
