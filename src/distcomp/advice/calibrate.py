"""What a step is among these very ranks: how long it computes, and what exchanges take beyond the model.

Every rank calls :func:`calibrate`. It takes steps in which a method that computes nothing sends zeros
(:class:`Zeros`), of a few sizes, directly and around a ring. What such a step needs of a core beyond one that
sends nothing is what its exchanges cost whoever computes; what it takes beyond :mod:`distcomp.advice.overlap`
is put down to its hops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distcomp.advice.overlap import gradient_step
from distcomp.advice.predict import Machine
from distcomp.advice.talks import Talk, talks_of
from distcomp.attaching import attach
from distcomp.exchange import DIRECT_BYTES, Gather, Sum, sum_bytes
from distcomp.exchange import Talk as Conversation
from distcomp.layout import Layout
from distcomp.methods.base import Method, Outcome, State, Turn
from distcomp.network.fabric import Fabric
from distcomp.network.model import Excess, Host
from distcomp.payload import Part, Payload, wire_bytes
from distcomp.sync.observe import observe, timed

Step = Callable[[], object]

ROUNDS = 2
"""As most methods have."""

REPEATS = 7


@dataclass(frozen=True)
class Zeros(Method):
    """Asks for zeros, twice, and leaves every rank's ``x`` as it is: an exchange and nothing else.

    ``around``: as a sum of ``nbytes`` around a ring; else ``nbytes`` from everyone to everyone.
    """

    nbytes: int
    around: bool
    transparent = True

    def talk(self, x: Tensor, state: State, turn: Turn) -> Conversation[Outcome]:
        for _ in range(ROUNDS):
            if self.around:
                yield Sum(torch.zeros(self.nbytes // 4))
            else:
                yield Gather(self._payload())
        return Outcome(x, lambda: x, state)

    def payload_bytes(self, layout: Layout, size: int) -> int:
        if self.around:
            return ROUNDS * sum_bytes(self.nbytes // 4 * 4, size)
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
    """
    host = Host(fabric.ranks, cores)
    machine = Machine(observe(ddp, step, REPEATS, time.process_time), host, slowness=host.crowd)
    direct, around = (
        _excess([_zeros(size, around, fabric.ranks) for size in sizes], ddp, step, machine, fabric)
        for around in (False, True)
    )
    return replace(machine, host=replace(host, direct=direct, around=around))


def _excess(
    methods: Sequence[Zeros], ddp: DistributedDataParallel, step: Step, machine: Machine, fabric: Fabric
) -> Excess:
    layouts = machine.observed.layouts
    sent, late_s, core_s = [], [], []
    for method in methods:
        with attach(ddp, method=method):
            step_s, busy_s = timed(step, REPEATS)
        talks = talks_of(method, layouts, fabric.ranks)
        computed_s = machine.observed.step_s + sum(talk.work_s for talk in talks)
        sent.append(method.payload_bytes(layouts[0], fabric.ranks) / ROUNDS)
        core_s.append(max(0.0, busy_s - computed_s) / (ROUNDS * len(talks)))
        late_s.append(late(step_s, core_s[-1], talks, machine, fabric))
    return Excess(tuple(sent), tuple(late_s), tuple(core_s))


def _zeros(sent_bytes: int, around: bool, ranks: int) -> Zeros:
    """In each round of which a rank sends so many bytes; a sum is never so small that it is sent directly."""
    if around:
        return Zeros(max(DIRECT_BYTES + 4, round(sent_bytes * ranks / (2 * (ranks - 1)))), around)
    return Zeros(max(1, sent_bytes // (ranks - 1)), around)


def late(step_s: float, core_s: float, talks: Sequence[Talk], machine: Machine, fabric: Fabric) -> float:
    """Seconds per hop with which the model of a step comes to ``step_s``, by bisection; 0 where it takes
    longer without any."""
    sent_bytes = talks[0].rounds[0].ask.sent_bytes(fabric.ranks)

    def modelled_s(late_s: float) -> float:
        excess = Excess((sent_bytes,), (late_s,), (core_s,))
        host = replace(machine.host, direct=excess, around=excess)
        return gradient_step(machine.timing, talks, fabric, host, machine.slowness).step_s

    low, high = 0.0, step_s
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if modelled_s(middle) < step_s else (low, middle)
    return low
