"""Error feedback: what was not sent today is owed tomorrow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.exchange import Talk
from distcomp.layout import Layout, Slab
from distcomp.methods.base import Method, Outcome, State, Turn


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
        return {"residual": Slab(torch.zeros(layout.numel), layout), "inner": self.inner.init(layout)}

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        corrected = x + state["residual"].data
        outcome = yield from self.inner.talk(corrected, state["inner"], turn)
        residual = outcome.owed(corrected)
        return Outcome(
            outcome.estimate,
            lambda: x + state["residual"].data - residual,
            {"residual": Slab(residual, turn.layout), "inner": outcome.state},
        )

    def payload_bytes(self, layout: Layout, size: int) -> int:
        return self.inner.payload_bytes(layout, size)
