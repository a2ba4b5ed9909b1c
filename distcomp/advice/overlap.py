"""One step on the clock: backward on one thread, the exchange's arithmetic on another, the wire beside both.
A sharded step (:func:`sharded_step`) has a clock of its own.

Buckets are ready one after the other while backward goes on. The exchange's thread takes them in the order in
which it really does (:func:`distcomp.runtime.pipeline.request_order`): it waits for the answer it needs next,
thinks, and starts the next request. Every link carries what crosses it in the order in which it was asked
for. Where ranks have less than two cores each, backward, arithmetic and the carrying of messages
(``Cost.core_s``) share them evenly, and an answer is there when both the wire and the core have carried it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distcomp.advice.profile import ProfiledExchange
from distcomp.attaching.observe_shards import ObservedShardedSteps
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Cost, Host
from distcomp.network.request_sizes import RequestSizes
from distcomp.runtime.pipeline import request_order


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
        return Timing(tuple(factor * seconds for seconds in self.ready_s), factor * self.step_s)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: all of it, and what is left of the exchange when backward is over."""

    step_s: float
    exposed_s: float
    wire_s: float
    work_s: float


def gradient_step(
    timing: Timing,
    profiles: Sequence[ProfiledExchange],
    fabric: Fabric,
    host: Host = ALONE,
    slowness: float = 1.0,
) -> StepTime:
    """A step in which every bucket is exchanged. ``slowness``: of arithmetic, against when it was timed."""
    costs = _costs(profiles, fabric, host)
    line = _Line(timing, host)
    done = [0] * len(profiles)
    """Rounds of each bucket; one more when its result is there."""
    for bucket, _ in request_order():
        if all(count > len(one.rounds) for count, one in zip(done, profiles, strict=True)):
            break
        if bucket >= len(profiles) or done[bucket] > len(profiles[bucket].rounds):
            continue
        profile, goes_on = profiles[bucket], True
        while goes_on:
            number = done[bucket]
            if number == 0:
                line.wait_for_gradients(bucket)
            else:
                line.wait_for_answer(bucket)
            if number < len(profile.rounds):
                line.work(slowness * profile.rounds[number].work_s)
                line.send(bucket, costs[bucket][number])
            else:
                line.work(slowness * profile.last_s)
            goes_on = number < len(profile.rounds) and profile.rounds[number].leads
            done[bucket] += 1
    over_s = line.end()
    rest_s = timing.step_s - timing.backward_s
    return StepTime(over_s + rest_s, over_s - line.backward_over_s, line.wire_s, line.work_s)


def averaging_step(
    timing: Timing,
    profiles: Sequence[ProfiledExchange],
    fabric: Fabric,
    host: Host = ALONE,
    slowness: float = 1.0,
) -> StepTime:
    """The mean step of a model that is averaged in some steps, after the step; on one rank nothing overlaps.

    Of neighbours only a share ``held_up`` waits for the busiest link; the others go on ``slack`` before, and
    work meanwhile. On shared cores those work beside fewer, then::

        step = wire + busy - min((1 - held_up) busy, slack),    busy = step without averaging + work
    """
    exchanges = [
        (profile.share, round_.ask.exchange(fabric)) for profile in profiles for round_ in profile.rounds
    ]
    costs = [(share, exchange.cost(fabric, host)) for share, exchange in exchanges]
    wire_s = sum(share * max(cost.seconds, host.oversubscription * cost.core_s) for share, cost in costs)
    work_s = slowness * sum(profile.share * profile.work_s for profile in profiles)
    busy_s = timing.step_s + work_s
    # Nobody is faster than on a core of its own.
    beside = max(max((one.held_up for _, one in exchanges), default=1.0), 1 / host.oversubscription)
    slack_s = sum(share * exchange.slack_s for share, exchange in exchanges)
    exposed_s = wire_s + work_s - min((1 - beside) * busy_s, slack_s)
    return StepTime(timing.step_s + exposed_s, exposed_s, wire_s, work_s)


def _costs(profiles: Sequence[ProfiledExchange], fabric: Fabric, host: Host) -> list[list[Cost]]:
    """What each round of each exchange costs."""
    return [
        [round_.ask.exchange(fabric).cost(fabric, host) for round_ in profile.rounds] for profile in profiles
    ]


EXCHANGE_CORE_S = 1.3e-3
"""Of a core, to begin and to end an exchange, however small and whatever the network: the median over all
cells of ``benchmarks/results/model_error.json``. Where nothing was measured among the ranks, buckets count it
(``Host.exchange_s``), and a sharded step waits for it."""
HOOKED_CORE_S = 2.0e-3
"""The same of an exchange that FSDP asks us for, in the place of its own collective: fitted to the steps at
1 Gbit/s of four ranks in ``benchmarks/results/sharded_advice.json``."""


def sharded_step(
    observed: ObservedShardedSteps,
    profiles: Sequence[ProfiledExchange],
    fabric: Fabric,
    host: Host = ALONE,
    slowness: float = 1.0,
) -> StepTime:
    """A step of an FSDP2 model: ``profiles[i]`` is what ``observed.calls[i]`` exchanges, and what comes after
    is exchanged after the step, in its share of steps.

    On the CPU FSDP waits for each. On a GPU a line of its own carries them, one after the other: a gather is
    asked for when the weights of the one before are there (FSDP's prefetching), and whoever computes waits
    for its weights alone; the optimizer waits for all reductions.
    """
    costs = _costs(profiles, fabric, host)

    def carried_s(ask: RequestSizes, cost: Cost) -> float:
        seconds = max(cost.seconds, host.oversubscription * cost.core_s)
        if observed.overlaps:
            return seconds
        if host.ranks > 1:
            seconds += host.oversubscription * (EXCHANGE_CORE_S if ask.in_a_ring else HOOKED_CORE_S)
        return seconds + ask.announced_s(cost.transfer_s, fabric, host.ranks > 1)

    taken_s = [
        profile.share
        * (
            slowness * profile.work_s
            + sum(carried_s(one.ask, cost) for one, cost in zip(profile.rounds, of_profile, strict=True))
        )
        for profile, of_profile in zip(profiles, costs, strict=True)
    ]
    now_s = _passed_s(observed, taken_s, slowness)
    now_s += slowness * (observed.step_s - observed.begin_s[-1]) + sum(taken_s[len(observed.calls) :])
    wire_s = sum(p.share * sum(c.transfer_s for c in of) for p, of in zip(profiles, costs, strict=True))
    work_s = slowness * sum(profile.share * profile.work_s for profile in profiles)
    return StepTime(now_s, now_s - slowness * observed.step_s, wire_s, work_s)


def _passed_s(observed: ObservedShardedSteps, taken_s: Sequence[float], slowness: float) -> float:
    """When the last call of a step is over, and all that was asked for."""
    now_s = line_s = computed_s = 0.0
    gathers = [at for at, call in enumerate(observed.calls) if call.kind == "gather"]
    over_s: dict[int, float] = {}

    def ask(at: int) -> None:
        nonlocal line_s
        if at not in over_s:
            line_s = over_s[at] = max(line_s, now_s) + taken_s[at]

    for at, (call, begin_s) in enumerate(zip(observed.calls, observed.begin_s, strict=True)):
        now_s += slowness * (begin_s - computed_s)
        computed_s = begin_s
        ask(at)
        if call.kind == "gather" or not observed.overlaps:
            now_s = max(now_s, over_s[at])
        if call.kind == "gather" and observed.overlaps:
            for later in gathers[gathers.index(at) + 1 :][:1]:
                ask(later)
    return max(now_s, line_s)


NOTHING_S = 1e-12


class _Line:
    """One rank's time: backward, the arithmetic of the exchange's thread, and the carrying of its messages
    go on together, each as fast as if it were alone, or in turns where ranks have less than two cores
    each."""

    def __init__(self, timing: Timing, host: Host) -> None:
        self.now_s = self.work_s = self.backward_over_s = 0.0
        self._timing, self._crowd = timing, host.oversubscription
        self._in_turns = host.shared
        self._backward_s = self._carried_s = self._to_carry_s = 0.0
        self._free_s = self._occupied_s = np.zeros(1)  # of every link
        self._answers: dict[int, tuple[float, float]] = {}

    def wait_for_gradients(self, bucket: int) -> None:
        self._pass(backward_s=self._timing.ready_s[bucket])

    def wait_for_answer(self, bucket: int) -> None:
        arrival_s, carried_s = self._answers[bucket]
        self._pass(until_s=arrival_s, carried_s=carried_s)

    def work(self, seconds: float) -> None:
        self.work_s += seconds
        self._pass(work_s=seconds)

    def send(self, bucket: int, cost: Cost) -> None:
        self._free_s = np.maximum(self._free_s, self.now_s) + cost.links_s
        self._occupied_s = self._occupied_s + cost.links_s
        self._to_carry_s += self._crowd * cost.core_s
        busiest_s = float(np.max(self._free_s, where=cost.links_s > 0, initial=0.0))
        arrival_s = max(busiest_s, self.now_s + cost.transfer_s) + cost.latency_s
        self._answers[bucket] = arrival_s, self._to_carry_s

    @property
    def wire_s(self) -> float:
        """How long the busiest link is occupied."""
        return float(self._occupied_s.max())

    def end(self) -> float:
        """When everything is over."""
        self._pass(backward_s=self._timing.backward_s, carried_s=self._to_carry_s)
        return self.now_s

    def _pass(
        self, work_s: float = 0.0, backward_s: float = 0.0, carried_s: float = 0.0, until_s: float = 0.0
    ) -> None:
        """Let time pass until work is done, backward and carrying have come so far, and it is so late."""
        while True:
            going_on = [
                work_s,
                self._timing.backward_s - self._backward_s,
                self._to_carry_s - self._carried_s,
            ]
            awaited = [work_s, backward_s - self._backward_s, carried_s - self._carried_s]
            if max(*awaited, until_s - self.now_s) <= NOTHING_S:
                return
            active = [left_s > NOTHING_S for left_s in going_on]
            pace = 1 / sum(active) if self._in_turns and any(active) else 1.0
            ends_s = [left_s / pace for left_s in (*going_on, *awaited)] + [until_s - self.now_s]
            passed_s = min(end_s for end_s in ends_s if end_s > NOTHING_S)
            self.now_s += passed_s
            work_s -= active[0] * pace * passed_s
            self._backward_s += active[1] * pace * passed_s
            self._carried_s += active[2] * pace * passed_s
            if active[1] and self._timing.backward_s - self._backward_s <= NOTHING_S:
                self.backward_over_s = self.now_s
