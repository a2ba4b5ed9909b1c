"""A method in one file, as a newcomer would add it: the mean, of what is rounded to an eighth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllReduce, Rounds
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, ErrorFeedback, Method, StepContext, register
from distcomp.methods.base import State, all_reduce_bytes


@dataclass(frozen=True)
class Eighths(Method):
    """Round to multiples of ``grid``, then average."""

    grid: float

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        rounded = torch.round(x / self.grid) * self.grid
        total = yield AllReduce(rounded * (1.0 / context.size))
        return AggregateResult(total, lambda: rounded, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return all_reduce_bytes(4 * layout.numel, size)


@register(paper="none: a toy", wire="2 (n-1)/n 4d", summable=True, biased=True)
def averaging_toy(grid: float = 0.125) -> Method:
    """Average what is rounded to multiples of ``grid``."""
    return ErrorFeedback(Eighths(grid))
