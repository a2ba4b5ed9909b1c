"""A method of two rounds in one file: agree on a magnitude, then on how many ranks have which sign."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distcomp.collectives import Rounds
from distcomp.compressors.grid import per_parameter_mean, spread
from distcomp.layout import Layout
from distcomp.methods import AggregateResult, ErrorFeedback, Method, StepContext, register
from distcomp.methods.base import State, all_reduce_bytes, mean


@dataclass(frozen=True)
class SharedMagnitude(Method):
    """``s = mean_i mean|x_i|`` of each parameter, then ``estimate = s mean_i sign(x_i)``."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        s = yield from mean(per_parameter_mean(x, context.layout), context)
        magnitude = spread(s, context.layout)
        agreed = yield from mean(x.sign(), context)
        return AggregateResult(magnitude * agreed, lambda: magnitude * x.sign(), state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        return all_reduce_bytes(4 * len(layout.slices), size) + all_reduce_bytes(4 * layout.numel, size)


@register(paper="none: a toy", wire="2 (n-1)/n (4d + 4 per parameter)", summable=True, biased=True)
def two_round_toy() -> Method:
    """Send signs times a magnitude that all ranks share."""
    return ErrorFeedback(SharedMagnitude())
