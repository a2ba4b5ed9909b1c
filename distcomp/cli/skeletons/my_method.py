"""my_method: the equation, in one line, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, ErrorFeedback, Method, StepContext, register
from distcomp.methods.base import State, all_reduce_bytes, mean


@dataclass(frozen=True)
class MyMethod(Method):
    """What is exchanged. The fields are the settings; ranks compare them when they attach."""

    grid: float

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        """The algorithm: it yields collectives and returns an estimate of the mean of ``x`` over the ranks.

        ``x`` is this rank's bucket (float32, ``[context.layout.numel]``) and is left alone, as ``state`` is.
        """
        sent = torch.round(x / self.grid) * self.grid
        estimate = yield from mean(sent, context)
        # The contributions of all ranks sum to n times the estimate: that is the law of every method.
        return AggregateResult(estimate, lambda: sent, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        """What one rank of ``size`` sends; the ledger is held to it."""
        return all_reduce_bytes(4 * layout.numel, size)


@register(paper="none yet", wire="2 (n-1)/n 4d", summable=True, biased=True)
def my_method(grid: float = 0.125) -> Method:
    """Average what is rounded to multiples of ``grid``."""
    return ErrorFeedback(MyMethod(grid))
