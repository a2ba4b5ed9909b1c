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
from distcomp.compressors.fixed import FixedGrid, GrowingGrid
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, PerParameter, State


@dataclass(frozen=True)
class ECD(Gossip):
    """Send a compressed extrapolation of the model; in the estimates ``x~`` of it the noise averages out.

    ::

        x_{t+1}^i  = sum_j W_ij x~_t^j - step_i
        z_{t+1}^i  = (1 - t/2) x_t^i + (t/2) x_{t+1}^i
        x~_{t+1}^j = (1 - 2/t) x~_t^j + (2/t) C(z_{t+1}^j)        all who hold an estimate of j, j included

    If the error of ``C(z)`` is bounded *absolutely*, that of ``x~`` falls as 1/t. But ``z`` grows with *t*:
    the error of a relative quantizer grows with it, and training diverges. So the default is an absolute
    grid, whose integers must grow by a bit with every doubling of *t*; values that it had to clamp are
    counted per parameter. A relative quantizer is refused unless ``allow_relative=True``. In short: use
    CHOCO.

    Source: Tang et al., "Communication compression for decentralized training", NeurIPS 2018, ECD-PSGD. We
    differ: the count starts at t = 2, so that the first message is C(x_2) itself (the paper's first weights
    are -1 and 2). Bytes: degree x d bits(t) / 8. Memory: one model per neighbour and two of its own.
    """

    replicas: ClassVar[bool] = True

    compressor: Compressor | GrowingGrid = field(default_factory=GrowingGrid)  # type: ignore[assignment]
    allow_relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.compressor, GrowingGrid | FixedGrid | Identity) and not self.allow_relative:
            raise DistcompError(
                f"the error of {self.compressor} grows with what is sent, and ECD sends ever more: it "
                "diverges; leave the compressor at its default (an absolute grid), use choco, or pass "
                "allow_relative=True"
            )

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "model": FlatBuffer(x.clone(), context.layout),
            "estimate": FlatBuffer(x.clone(), context.layout),
            "replicas": copies(x, self.row(context), context.layout),
            "overflow": PerParameter({name: torch.tensor(0) for name in context.layout.names}),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        t = context.step + 2
        now = self.at(t)
        before, estimate, replicas = state["model"].data, state["estimate"].data, tensors(state["replicas"])
        model = weighted(self.row(context), estimate, replicas) + (x - before)
        z = torch.add((1 - t / 2) * before, model, alpha=t / 2)
        sent = now.encode(z, context)
        _, answers = yield from now.send(sent, context)
        estimate = now.advance((1 - 2 / t) * estimate, sent, context.layout, 2 / t)
        for j, payload in answers.items():
            replicas[j] = now.advance((1 - 2 / t) * replicas[j], payload, context.layout, 2 / t)
        return agreed(
            model.clone(),
            {
                "model": FlatBuffer(model, context.layout),
                "estimate": FlatBuffer(estimate, context.layout),
                "replicas": buffers(replicas, context.layout),
                "overflow": now.overflown(z, state["overflow"], context.layout),
            },
        )

    def at(self, t: int) -> ECD:
        """Itself with the grid of exchange *t*."""
        grid = self.compressor
        return replace(self, compressor=grid.at(t)) if isinstance(grid, GrowingGrid) else self

    def overflown(self, z: Tensor, counted: PerParameter, layout: Layout) -> PerParameter:
        """How many values of each parameter the grid has clamped so far."""
        if not isinstance(self.compressor, FixedGrid):
            return counted
        outside = {one.name: piece.abs() > self.compressor.limit for one, piece in layout.pieces(z)}
        return PerParameter({name: counted[name] + where.sum() for name, where in outside.items()})

    def report(self, state: State) -> dict[str, Any]:
        """Values that the grid had to clamp, by parameter."""
        return {"overflow": {name: int(count) for name, count in state["overflow"].items() if count}}

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        grid = self.compressor
        return {**numbers, "bits_at_1000": grid.at(1000).bits} if isinstance(grid, GrowingGrid) else numbers
