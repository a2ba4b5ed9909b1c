"""ECD-PSGD: neighbours extrapolate each other's models, and the noise of what is sent is averaged out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.averaging.base import AveragingContext, agreed
from distcomp.averaging.gossip import Gossip, buffers, copies, tensors, weighted
from distcomp.collectives import Rounds
from distcomp.compressors import Compressor, Identity
from distcomp.compressors.anchored import AnchoredGrid, spacing_of
from distcomp.compressors.fixed import FixedGrid, GrowingGrid
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, PerParameter, State
from distcomp.payload import Payload

ABSOLUTE = (GrowingGrid, AnchoredGrid, FixedGrid, Identity)
"""Whose error does not grow with what is sent."""


@dataclass(frozen=True)
class ECD(Gossip):
    """Send a compressed extrapolation of the model; in the estimates ``x~`` of it the noise averages out.

    ::

        x_{t+1}^i  = sum_j W_ij x~_t^j - step_i
        z_{t+1}^i  = (1 - t/2) x_t^i + (t/2) x_{t+1}^i
        x~_{t+1}^j = (1 - 2/t) x~_t^j + (2/t) C(z_{t+1}^j)        all who hold an estimate of j, j included

    If the error of ``C(z)`` is bounded *absolutely*, that of ``x~`` falls as 1/t. But ``z`` grows with *t*:
    the error of a relative quantizer grows with it, and training diverges. So the default is an absolute grid
    around the model that all began with, whose spacing is chosen from that model, parameter by parameter,
    equal on all ranks, and whose integers grow by a bit with every doubling of *t*
    (:class:`~distcomp.compressors.anchored.AnchoredGrid`). Values that do not fit widen their parameter's
    grid for that message and are counted; they are never clamped. A ``FixedGrid`` clamps and counts, and is
    refused where it does not reach the model's weights. A relative quantizer is refused unless
    ``allow_relative=True``. In short: use CHOCO.

    Source: Tang et al., "Communication compression for decentralized training", NeurIPS 2018, ECD-PSGD. We
    differ: the count starts at t = 2, so that the first message is C(x_2) itself (the paper's first weights
    are -1 and 2); the grid. Bytes: degree x d bits(t) / 8. Memory: one model per neighbour and three of its
    own, float32 ``[layout.numel]`` each.

    Raises DistcompError for a relative compressor without ``allow_relative``, and for a grid that ends below
    the model's weights.
    """

    replicas: ClassVar[bool] = True
    replicated: ClassVar[str] = "estimate"

    compressor: Compressor | GrowingGrid = field(default_factory=GrowingGrid)  # type: ignore[assignment]
    allow_relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.compressor, ABSOLUTE) and not self.allow_relative:
            raise DistcompError(
                f"the error of {self.compressor} grows with what is sent, and ECD sends ever more: it "
                "diverges; leave the compressor at its default (an absolute grid), use choco, or pass "
                "allow_relative=True"
            )

    def init(self, x: Tensor, context: AveragingContext) -> State:
        self._refuse_a_short_grid(x)
        state: dict[str, Any] = {
            "model": FlatBuffer(x.clone(), context.layout),
            "estimate": FlatBuffer(x.clone(), context.layout),
            "replicas": copies(x, self.row(context), context.layout),
            "overflow": PerParameter(
                {name: torch.tensor(0, dtype=torch.int64) for name in context.layout.names}
            ),
        }
        if isinstance(self.compressor, GrowingGrid):
            state["anchor"] = FlatBuffer(x.clone(), context.layout)
            state["spacing"] = PerParameter(spacing_of(x, context.layout, self.compressor.spacing))
        return state

    def restart(self, x: Tensor, state: State, context: AveragingContext) -> State:
        # The grid stays that of the model that all began with: it is equal on all ranks.
        return {
            **state,
            "model": FlatBuffer(x.clone(), context.layout),
            "estimate": FlatBuffer(x.clone(), context.layout),
            "replicas": copies(x, self.row(context), context.layout),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        t = context.step + 2  # with the paper's t = 1 the weights were -1 and 2: of noise as well
        now = self.at(t, state)
        before, estimate, replicas = state["model"].data, state["estimate"].data, tensors(state["replicas"])
        model = weighted(self.row(context), estimate, replicas) + (x - before)
        z = torch.add(before, model - before, alpha=t / 2)  # what stands still is exact
        sent = now.encode(z, context)
        _, answers = yield from now.send(sent, context)
        estimate = now.averaged(estimate, sent, context.layout, 2 / t)
        for j, payload in answers.items():
            replicas[j] = now.averaged(replicas[j], payload, context.layout, 2 / t)
        return agreed(
            model,
            {
                **state,
                "model": FlatBuffer(model, context.layout),
                "estimate": FlatBuffer(estimate, context.layout),
                "replicas": buffers(replicas, context.layout),
                "overflow": now.overflown(z, state["overflow"], context.layout),
            },
        )

    def averaged(self, estimate: Tensor, payload: Payload, layout: Layout, weight: float) -> Tensor:
        """``(1 - weight) x~ + weight C(z)``, as owner and neighbours compute it; exact where both agree."""
        assert isinstance(self.compressor, Compressor)
        # lerp, where the equation has two products: equal arguments then give their value to the bit.
        return torch.lerp(estimate, self.compressor.decode(payload, layout), weight)

    def at(self, t: int, state: State) -> ECD:
        """Itself with the grid of exchange *t*."""
        grid = self.compressor
        if not isinstance(grid, GrowingGrid):
            return self
        anchored = AnchoredGrid(state["anchor"].data, state["spacing"], grid.bits_at(t))
        return replace(self, compressor=anchored)

    def overflown(self, z: Tensor, counted: PerParameter, layout: Layout) -> PerParameter:
        """How many values of each parameter did not fit the grid so far."""
        if isinstance(self.compressor, AnchoredGrid):
            outside = {param.name: count for param, count in self.compressor.outside(z, layout)}
        elif isinstance(self.compressor, FixedGrid):
            limit = self.compressor.limit
            outside = {param.name: (piece.abs() > limit).sum() for param, piece in layout.pieces(z)}
        else:
            return counted
        return PerParameter({name: counted[name] + count for name, count in outside.items()})

    def _refuse_a_short_grid(self, x: Tensor) -> None:
        """A grid that would clamp the weights that all begin with."""
        grid = self.compressor
        largest = float(x.abs().max()) if x.numel() else 0.0
        if isinstance(grid, FixedGrid) and largest > grid.limit:
            raise DistcompError(
                f"{grid} ends at {grid.limit:.3g}, and the model's largest weight is "
                f"{largest:.3g}, which it would clamp; leave the compressor at its default, which fits "
                "itself to the model, or use more bits or a wider spacing"
            )

    def report(self, state: State) -> dict[str, Any]:
        """Values that did not fit the grid, by parameter."""
        return {"overflow": {name: int(count) for name, count in state["overflow"].items() if count}}

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        grid = self.compressor
        return {**numbers, "bits_at_1000": grid.bits_at(1000)} if isinstance(grid, GrowingGrid) else numbers
