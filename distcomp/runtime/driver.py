"""One driver of exchanges for everybody: DDP's buckets, FSDP's pieces, models, masks, Horovod, lock-step.

A method yields its requests and does no I/O; the pipeline carries them in order; here they meet.
:func:`exchange` begins one, and :func:`commit` is the one place that decides what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from torch import Tensor

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, State, StepContext
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation, Aggregator
from distcomp.runtime.channel import TRUE, Channel
from distcomp.runtime.executor import Executor
from distcomp.runtime.lockstep import Lockstep
from distcomp.runtime.pipeline import Timeline
from distcomp.runtime.states import States, select


def context_of(
    channel: Channel, layout: Layout, step: int, seed: int | str, observed: Observed = NOTHING_OBSERVED
) -> StepContext:
    """Who exchanges, about what, and when: of a step of a run with ``seed``."""
    rank, size = channel.transport.rank, channel.transport.size
    return StepContext(rank, size, layout, step, Key.of(seed, step), observed=observed)


def exchange(
    method: Aggregator, x: Tensor, state: State, context: StepContext, executor: Executor
) -> Exchange:
    """Begin to exchange ``x`` (float32, ``[context.layout.numel]``), in order, on ``executor``."""
    return start(Aggregation(method, x, state, context), executor)


def start(aggregation: Aggregation, executor: Executor) -> Exchange:
    """As :func:`exchange`, of an exchange that somebody has prepared."""
    return Exchange(aggregation, executor.start(aggregation))


class Exchange:
    """An exchange that has begun."""

    def __init__(self, aggregation: Aggregation, wait: Callable[[], Timeline]) -> None:
        self.aggregation = aggregation
        self._wait = wait

    @cached_property
    def timeline(self) -> Timeline:
        """When what was done. Waits for the end; raises what went wrong."""
        return self._wait()

    def result(self) -> AggregateResult:
        """The result. Waits for the end; raises what went wrong."""
        _ = self.timeline
        return self.aggregation.finished()

    @property
    def finite(self) -> Tensor:
        """Whether the tensor of every rank was finite (bool, on the tensor's device). Waits for the end."""
        _ = self.timeline
        return self.aggregation.finite


def in_lock_step(net: Lockstep, aggregations: Sequence[Aggregation]) -> list[AggregateResult]:
    """The result of every worker's exchange, of many workers in one process."""
    net.run(aggregations)
    return [aggregation.finished() for aggregation in aggregations]


def commit(
    states: States,
    aggregations: Iterable[Aggregation],
    agreed: Callable[[Tensor], Tensor] = lambda finite: finite,
) -> None:
    """Keep the new states of an iteration if every rank was finite in every one of its exchanges, else none.

    ``agreed`` makes one answer of this rank's where not all ranks took part in the same exchanges.
    """
    everything = list(aggregations)
    finite = finite_in_each(everything)
    # All buckets or none: half an iteration's residuals would go with no gradient that was applied.
    finite = agreed(finite)
    for aggregation in everything:
        kept = select(finite, aggregation.finished().state, aggregation.before)
        states.commit(aggregation.layout, kept)


def finite_in_each(aggregations: Iterable[Aggregation]) -> Tensor:
    """Whether every rank was finite in each of them (bool)."""
    finite = TRUE
    for aggregation in aggregations:
        finite = aggregation.finite & finite.to(aggregation.finite.device)
    return finite
