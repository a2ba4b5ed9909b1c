"""Error feedback: what was not sent today is owed tomorrow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors.base import Compressor
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext


@dataclass(frozen=True)
class ErrorFeedback(Method):
    """Add the residual, run the inner method, keep what it did not take.

    ::

        p_t = x_t + e_t;    estimate, c_t = inner(p_t);    e_{t+1} = p_t - c_t

    By the law of contributions, the sum over ranks of what was sent and of what is owed equals the sum of
    what came in, for every method. Costs one tensor of the model's size per rank.

    Source: Seide et al. 2014; Karimireddy et al. 2019. We differ: residuals are in units of the *unscaled*
    gradient and the learning rate is not inside (at a constant rate the two are the same); on a step that a
    GradScaler skips, nothing changes.
    """

    inner: Method

    def init(self, layout: Layout) -> State:
        return {"residual": FlatBuffer(torch.zeros(layout.numel), layout), "inner": self.inner.init(layout)}

    def assumed_state(self, layout: Layout, step: int) -> State:
        return {**self.init(layout), "inner": self.inner.assumed_state(layout, step)}

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        corrected = x + state["residual"].data
        result = yield from self.inner.aggregate(corrected, state["inner"], context)
        residual = result.residual(corrected)
        return AggregateResult(
            result.estimate,
            lambda: x + state["residual"].data - residual,
            {"residual": FlatBuffer(residual, context.layout), "inner": result.state},
        )

    def sole_compressor(self) -> Compressor | None:
        return self.inner.sole_compressor()

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return self.inner.payload_bytes(layout, size, step)
