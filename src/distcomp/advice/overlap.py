"""One step on the clock: backward on one thread, the exchange's arithmetic on another, the wire beside both.

Buckets are ready one after the other while backward goes on. The exchange's thread takes them in the order in
which it really does (:func:`distcomp.sync.pipeline.slots`): it waits for the answer it needs next, thinks,
and starts the next request. Requests under way share the wire; together they take as long as one behind the
other. Where ranks have less than two cores each, the two threads take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distcomp.advice.talks import Talk
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Cost, Host
from distcomp.sync.pipeline import slots


@dataclass(frozen=True)
class Timing:
    """A step without communication: when each bucket was ready and when it was over, after its start."""

    ready_s: tuple[float, ...]
    step_s: float

    @property
    def backward_s(self) -> float:
        """From the start to the last gradient."""
        return self.ready_s[-1]

    def times(self, factor: float) -> Timing:
        """On a machine that is slower by a factor."""
        return Timing(tuple(factor * one for one in self.ready_s), factor * self.step_s)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: all of it, and what is left of the exchange when backward is over."""

    step_s: float
    exposed_s: float
    wire_s: float
    work_s: float


def gradient_step(
    timing: Timing, talks: Sequence[Talk], fabric: Fabric, host: Host = ALONE, slowness: float = 1.0
) -> StepTime:
    """A step in which every bucket is exchanged. ``slowness``: of arithmetic, against when it was timed."""
    costs = [[one.ask.exchange(fabric).cost(fabric, host) for one in talk.rounds] for talk in talks]
    line = _Line(timing, shared=host.ranks > 1 and 2 * host.ranks > host.cores)
    finished = [False] * len(talks)
    for bucket, number in slots():
        if all(finished):
            break
        if bucket >= len(talks) or finished[bucket]:
            continue
        talk = talks[bucket]
        if number == 0:
            line.wait_until(line.ready_s(bucket))
        else:
            line.wait_until(line.arrived_s[bucket])
        if number < len(talk.rounds):
            line.work(slowness * talk.rounds[number].work_s)
            line.send(bucket, costs[bucket][number])
        else:
            line.work(slowness * talk.last_s)
            finished[bucket] = True
    backward_s = line.backward_s
    over_s = max(line.now_s, backward_s)
    rest_s = timing.step_s - timing.backward_s
    return StepTime(over_s + rest_s, over_s - backward_s, line.wire_s, line.work_s)


def averaging_step(
    timing: Timing, talks: Sequence[Talk], fabric: Fabric, host: Host = ALONE, slowness: float = 1.0
) -> StepTime:
    """The mean step of a model that is averaged in some steps, after the step; nothing overlaps."""
    asked = [(talk.share, one.ask.exchange(fabric)) for talk in talks for one in talk.rounds]
    wire_s = sum(share * exchange.cost(fabric, host).seconds for share, exchange in asked)
    work_s = slowness * sum(talk.share * talk.work_s for talk in talks)
    return StepTime(timing.step_s + wire_s + work_s, wire_s + work_s, wire_s, work_s)


class _Line:
    """The exchange's thread and its wire. ``shared``: the thread and backward take each other's core."""

    def __init__(self, timing: Timing, shared: bool) -> None:
        self.now_s = self.work_s = self.wire_s = 0.0
        self.arrived_s: dict[int, float] = {}
        self._free_s = self._held_up_s = 0.0
        self._timing, self._shared = timing, shared

    @property
    def backward_s(self) -> float:
        """When backward is over, which arithmetic during it held up."""
        return self._timing.backward_s + self._held_up_s

    def ready_s(self, bucket: int) -> float:
        """When a bucket is there."""
        return self._timing.ready_s[bucket] + self._held_up_s

    def wait_until(self, moment_s: float) -> None:
        self.now_s = max(self.now_s, moment_s)

    def work(self, seconds: float) -> None:
        """Half as fast while backward needs the core, too; and backward ends later by what was taken from
        it."""
        if self._shared and self.now_s < self.backward_s:
            taken_s = min(seconds, self.backward_s - self.now_s)
            self._held_up_s += taken_s
            self.now_s += taken_s
        self.now_s += seconds
        self.work_s += seconds

    def send(self, bucket: int, cost: Cost) -> None:
        self._free_s = max(self._free_s, self.now_s) + cost.transfer_s
        self.wire_s += cost.transfer_s
        self.arrived_s[bucket] = self._free_s + cost.latency_s
