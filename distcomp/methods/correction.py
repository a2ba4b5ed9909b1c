"""Momentum before compression instead of after it, around any method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors import TopK
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.methods.basic import PLAIN, with_feedback
from distcomp.methods.partition import Partition
from distcomp.methods.registry import method_of, register
from distcomp.methods.scheduled import EXACT

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer


@dataclass(frozen=True)
class MomentumCorrection(Method):
    """Every rank's own momentum goes through ``inner`` in the place of its gradient.

    ::

        u_i <- m u_i + x_i;       inner(u_i)
        u_i <- m (u_i + x_i);     inner(u_i + x_i)        # instead, with nesterov
        u_i <- 0 where contribution_i is not 0            # masking

    What error feedback holds back then arrives with the momentum it would have gathered. ``masking`` (for
    sparse methods) ends the momentum of what was sent, lest stale directions be pushed twice. The
    optimizer's own momentum must be 0. On the wire: ``inner``'s bytes. Memory: one tensor of the model's
    size (``u``, float32 ``[layout.numel]``), and inner's.

    Source: Lin et al., "Deep gradient compression", ICLR 2018, sections 3.1 and 3.2. Around
    ``ErrorFeedback`` over top-k it is that method.

    Raises DistcompError for a momentum outside [0, 1).
    """

    inner: Method
    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise DistcompError(f"a momentum lies in [0, 1), not {self.momentum}; the usual is 0.9")

    def check(self, optimizer: Optimizer | None) -> None:
        super().check(optimizer)
        if optimizer is not None and any(group.get("momentum") for group in optimizer.param_groups):
            raise DistcompError(
                "the momentum would be applied twice; with momentum_correction give the optimizer momentum=0"
            )

    def init(self, layout: Layout) -> State:
        return {
            "momentum": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout),
            "inner": self.inner.init(layout),
        }

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        u = state["momentum"].data
        u = self.momentum * (u + x) if self.nesterov else self.momentum * u + x
        result = yield from self.inner.aggregate(u + x if self.nesterov else u, state["inner"], context)
        if self.masking:
            # Made once: masking needs it now, and error feedback around all this would ask for it again.
            sent = result.contribution()
            u = torch.where(sent == 0, u, 0.0)
            result = replace(result, contribution=lambda: sent)
        return replace(result, state={"momentum": FlatBuffer(u, context.layout), "inner": result.state})

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)


SPARSE = with_feedback(TopK(0.01), "all_gather")
"""The paper's, unless another is given."""


@register(
    paper="Lin et al., Deep gradient compression, ICLR 2018, momentum correction",
    wire="that of the inner method",
    summable=False,
    biased=True,
    direction=True,
    deviations="around any method; biases and norms have their momentum in float32 and keep it",
    limitations="with momentum in the optimizer, which then counts twice",
)
def momentum_correction(
    inner: Method | str = SPARSE, momentum: float = 0.9, nesterov: bool = False, masking: bool = True
) -> Method:
    """Accumulate momentum on every rank before compression, for an optimizer without momentum of its own.

    See :class:`distcomp.methods.MomentumCorrection`. ``inner`` is a method or the text of one; ``momentum``
    and ``nesterov`` are those that the optimizer would have had; ``masking`` ends the momentum of elements
    that were sent: for sparse methods only.
    """
    # No masking where everything is sent in every step: it would be no momentum at all.
    dense = MomentumCorrection(EXACT, momentum, nesterov)
    return Partition(PLAIN, dense, MomentumCorrection(method_of(inner), momentum, nesterov, masking))
