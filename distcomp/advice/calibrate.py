"""What a step is among these very ranks: how long it computes, and what exchanges take beyond the model.

Every rank calls :func:`calibrate`. It takes steps in which a method that computes nothing sends zeros
(:class:`Zeros`), of a few sizes, directly and around a ring. What such a step needs of a core beyond one that
sends nothing is what its exchanges cost whoever computes; what it takes beyond :mod:`distcomp.advice.overlap`
is put down to its hops. Where ranks share cores, what the step with the smallest exchanges takes beyond is
the waking up of threads, while which no core is used well: it counts as work of the core, in every exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distcomp.advice.overlap import gradient_step
from distcomp.advice.predict import Machine, around_a_ring
from distcomp.advice.profile import ProfiledExchange, profiles_of
from distcomp.attaching.handle import attach
from distcomp.attaching.observe import observe, timed
from distcomp.collectives import DIRECT_BYTES, AllGather, AllReduce, Rounds, all_reduce_sent_bytes
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.network.fabric import Fabric
from distcomp.network.model import Host, Overhead
from distcomp.payload import Part, Payload, wire_bytes

Step = Callable[[], object]

ROUNDS = 2
"""As most methods have."""

REPEATS = 5


@dataclass(frozen=True)
class Zeros(Method):
    """Asks for zeros, twice, and leaves every rank's ``x`` as it is: an exchange and nothing else.

    ``around``: as a sum of ``nbytes`` around the backend's ring; else ``nbytes`` from everyone to everyone.
    """

    nbytes: int
    around: bool
    propagates_nonfinite = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        for _ in range(ROUNDS):
            if self.around:
                yield AllReduce(torch.zeros(self.nbytes, dtype=torch.uint8))  # no transport adds these itself
            else:
                yield AllGather(self._payload())
        return AggregateResult(x, lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int, step: int) -> int:
        if self.around:
            return ROUNDS * all_reduce_sent_bytes(self.nbytes, size)
        return ROUNDS * (size - 1) * wire_bytes(self._payload().parts)

    def _payload(self) -> Payload:
        payload = Payload.empty((Part("codes", torch.uint8, self.nbytes),))
        payload.body.zero_()
        return payload


def calibrate(
    ddp: DistributedDataParallel, step: Step, fabric: Fabric, sizes: Sequence[int], cores: int
) -> Machine:
    """Measure on all ranks of the process group, which share a machine of ``cores`` and the network
    ``fabric``; torch has one thread on each.

    ``step``: one forward, one backward and the optimizer. ``sizes``: rising; bytes that a rank sends in an
    exchange. Every rank takes its own steps: replicas are not equal any more.

    Raises DistcompError where the fabric does not have the ranks of the model's process group, or has one.
    """
    there = ddp.process_group.size()
    if not 1 < there == fabric.ranks:
        raise DistcompError(
            f"the fabric has {fabric.ranks} ranks and the model's process group {there}; calibrate on 2 or "
            "more, with Fabric.uniform(dist.get_world_size(), rate) or the file that distcomp probe wrote"
        )
    host = Host(fabric.ranks, cores)
    machine = Machine(observe(ddp, step, REPEATS, time.process_time), host, slowness=host.oversubscription)
    direct, around = (
        _excess([_zeros(size, around, fabric.ranks) for size in sizes], ddp, step, machine, fabric)
        for around in (False, True)
    )
    return replace(machine, host=replace(host, direct=direct, around=around))


def _excess(
    methods: Sequence[Zeros], ddp: DistributedDataParallel, step: Step, machine: Machine, fabric: Fabric
) -> Overhead:
    layouts = machine.observed.layouts
    exchanges = ROUNDS * len(layouts)
    profiles = [
        around_a_ring(profile) if method.around else profile
        for method in methods
        for profile in [profiles_of(method, layouts, fabric.ranks)]
    ]
    steps_s, core_s = [], []
    for method, profile in zip(methods, profiles, strict=True):
        with attach(ddp, method=method):
            step_s, busy_s = timed(step, REPEATS)
        computed_s = machine.observed.step_s + sum(exchange.work_s for exchange in profile)
        steps_s.append(step_s)
        core_s.append(max(0.0, busy_s - computed_s) / exchanges)
    if machine.host.shared:
        waking_s = steps_s[0] - modelled_s(0.0, core_s[0], profiles[0], machine, fabric)
        core_s = [
            seconds + max(0.0, waking_s) / exchanges / machine.host.oversubscription for seconds in core_s
        ]
    late_s = [
        late_per_hop_s(*measured, machine, fabric) for measured in zip(steps_s, core_s, profiles, strict=True)
    ]
    sent = [method.payload_bytes(layouts[0], fabric.ranks, 0) / ROUNDS for method in methods]
    return Overhead(tuple(sent), tuple(late_s), tuple(core_s))


def _zeros(sent_bytes: int, around: bool, ranks: int) -> Zeros:
    """In each round of which a rank sends so many bytes; a sum is never so small that it is sent directly."""
    if around:
        return Zeros(max(DIRECT_BYTES + 4, round(sent_bytes * ranks / (2 * (ranks - 1)))), around)
    return Zeros(max(1, sent_bytes // (ranks - 1)), around)


def late_per_hop_s(
    step_s: float, core_s: float, profiles: Sequence[ProfiledExchange], machine: Machine, fabric: Fabric
) -> float:
    """Seconds per hop with which the model of a step comes to ``step_s``, by bisection; 0 where it takes
    longer without any."""
    low, high = 0.0, step_s
    for _ in range(30):
        middle = (low + high) / 2
        shorter = modelled_s(middle, core_s, profiles, machine, fabric) < step_s
        low, high = (middle, high) if shorter else (low, middle)
    return low


def modelled_s(
    late_s: float, core_s: float, profiles: Sequence[ProfiledExchange], machine: Machine, fabric: Fabric
) -> float:
    """A step all of whose exchanges are alike: each hop so late, each exchange so much of a core."""
    overhead = Overhead((profiles[0].rounds[0].ask.sent_bytes(fabric.ranks),), (late_s,), (core_s,))
    host = replace(machine.host, direct=overhead, around=overhead)
    return gradient_step(machine.timing, profiles, fabric, host, machine.slowness).step_s
