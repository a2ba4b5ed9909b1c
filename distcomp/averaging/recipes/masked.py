"""Any method, for active parameters only: those that masks keep, or that another source names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distcomp.active import ActiveParameters, ActiveSet, Context, Planned
from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.periodic import Periodic
from distcomp.collectives import AllReduce, Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.active_only import ActiveOnly, compared, recalled, remembered
from distcomp.methods.base import AggregateResult, Method, State, cut_state
from distcomp.methods.registry import parse

if TYPE_CHECKING:
    from distcomp.pruning.pruner import Pruner


def active_only(
    method: Method | Averaging | str,
    source: ActiveParameters,
    residuals: str = "keep",
    compare: bool = True,
) -> Any:
    """Let a method send the active parameters, or coordinates of them, and nothing of what is inactive.

    ``method`` carries gradients, averages models every few steps, or gossips; an object or the text of one.
    ``source`` says what is active in a step: :class:`distcomp.active.Frozen`, ``pruner.active_parameters()``,
    an :class:`~distcomp.active.Intersection`, or one of your own. ``residuals`` of coordinates that become
    inactive wait until they are active again (``keep``) or go (``drop``). ``compare``: ranks compare what is
    active at each exchange, and the one that differs is named.

    Bytes: the method's, for the active coordinates, and ``(n-1) 40`` at each exchange to compare; where ranks
    differ between exchanges (gossip) one float32 mean of the active weights when they change.

    Raises DistcompError for an averaging of whole models other than periodic averaging of differences and
    gossip that waits for its neighbours.
    """
    chosen = parse(method) if isinstance(method, str) else method
    if isinstance(chosen, Periodic):
        return replace(chosen, method=ActiveOnly(chosen.method, source, residuals, compare))
    if isinstance(chosen, Gossip) and not chosen.overlap:
        return ActiveGossip(chosen, source, compare, period=chosen.period, on_failure=chosen.on_failure)
    if isinstance(chosen, Method):
        return ActiveOnly(chosen, source, residuals, compare)
    raise DistcompError(
        f"{chosen!r} cannot be masked; use a gradient method, periodic averaging of differences, or gossip"
    )


def masked(pruner: Pruner, method: Method | Averaging | str, residuals: str = "keep") -> Any:
    """Let a method send the active weights of a pruned model, and nothing of the others.

    It is :func:`active_only` with the pruner's masks, which the pruner itself has the ranks compare whenever
    they change.

    Bytes: the method's, for the active weights; in the iteration before a mask changes all, where the
    criterion needs gradients of pruned weights; 8 bytes and a header to each rank at each change.

    Raises DistcompError as :func:`active_only` does.
    """
    chosen = parse(method) if isinstance(method, str) else method
    masks = pruner.active_parameters(dense=not isinstance(chosen, Gossip))
    return active_only(chosen, masks, residuals, compare=False)


@dataclass(frozen=True)
class ActiveGossip(Averaging):
    """Gossip about active weights; inactive ones are each worker's own and mean nothing.

    When the active set changes, replicas follow it: all workers take the exact mean of their models
    (``2 (n-1)/n 4 nnz`` bytes, once) and gossip starts anew from there. A source that changes with every
    exchange therefore makes plain averaging of it. Bytes: ``inner``'s for the active weights, otherwise.

    Raises DistcompError for ``on_failure="continue"``.
    """

    inner: Gossip
    source: ActiveParameters
    compare: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_failure != "stop":
            raise DistcompError("pruned gossip asks all workers when a mask changes; use on_failure='stop'")

    @property
    def starts_anew(self) -> bool:
        return True

    def init(self, x: Tensor, context: AveragingContext) -> State:
        active = self.source.active(context.layout, context)
        return self._begin(x, active.pick(x), active, context)

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        active = self.source.active(context.layout, context)
        if self.compare:
            yield from compared(active, context)
        about = replace(context, layout=active.layout)
        mine = active.pick(x)
        if not torch.equal(state["alive"].data, active.spread(torch.ones_like(mine))):
            # Replicas of other coordinates mean nothing now: all begin again from one model, exactly equal.
            mean = yield AllReduce(mine * (1.0 / context.size))
            return agreed(active.put(x, mean), self._begin(x, mean, active, context))
        fitted = recalled(self.inner.init(mine, about), cut_state(state["inner"]), active)
        result = yield from self.inner.aggregate(mine, fitted, about)
        inner = remembered(result.state, state["inner"], active)
        return agreed(active.put(x, result.estimate), {**state, "inner": inner})

    def _begin(self, x: Tensor, mine: Tensor, active: ActiveSet, context: AveragingContext) -> State:
        """The state of gossip that begins at ``mine``: of the whole, with nothing where it is inactive."""
        begun = self.inner.init(mine, replace(context, layout=active.layout))
        whole = remembered(begun, self.inner.init(x, context), active, keeps=False)
        alive = active.spread(torch.ones(active.layout.numel, dtype=torch.float32))
        return {"alive": FlatBuffer(alive, active.whole), "inner": whole}

    def _planned(self, layout: Layout) -> Layout:
        planned: Context = Planned()
        return self.source.active(layout, planned).layout

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        return self.inner.conditions(self._planned(layout), size)

    def report(self, state: State) -> dict[str, Any]:
        return self.inner.report(state["inner"])
