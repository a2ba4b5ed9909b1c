"""A pytest plug-in: under mpirun, the exchanges of the tests are carried by MPI as well.

Every process steps all workers in lock-step, as the tests do alone; besides, it asks what the worker of its
own rank asks over MPI, of the processes that do the same. The answer must be that of lock-step, bit for bit,
and the worker goes on with MPI's. So each assertion of a test holds for what MPI brought.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from distcomp.collectives import AllReduce, Request
from distcomp.payload import Payload
from distcomp.runtime import lockstep
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Answer, Channel
from distcomp.runtime.ledger import Ledger
from distcomp.transports.mpi.transport import MPITransport

WORLD = MPI.COMM_WORLD
PATIENCE_S = 30.0
CARRIED: Counter[str] = Counter()


class Here:
    """Who is asked when something is not done: nobody can tell, so the test fails as it is."""

    diagnosis_s = 0.0

    def diagnose(self, error: RuntimeError) -> RuntimeError:
        return error


for name in ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"):
    os.environ.pop(name, None)  # a test has a world of its own size, not mpirun's

arrived = WORLD.Ibarrier()
while not arrived.Test():  # MPI itself would wait by spinning
    time.sleep(0.01)
COMMUNICATORS = [WORLD.Split(int(WORLD.rank >= size)) for size in range(WORLD.size + 1)]
"""The first n ranks; made beforehand, for all ranks make each together."""


class Mirrored(lockstep.Lockstep):
    """Lock-step, with this process's worker over MPI."""

    def __init__(self, size: int, fingerprint: int = 0) -> None:
        super().__init__(size, fingerprint)
        assert size <= WORLD.size, f"a test asks for {size} workers; start mpirun with as many"
        self.own = Ledger()
        self.channel = Channel(MPITransport(COMMUNICATORS[size], Here(), PATIENCE_S), fingerprint, self.own)  # type: ignore[arg-type]

    def run(self, running: Sequence[Aggregation]) -> None:
        if WORLD.rank >= self.size:
            super().run(running)
            return
        mine = running[WORLD.rank]
        over_mpi = Asked(mine, self.channel)
        aggregations = list(running)
        aggregations[WORLD.rank] = over_mpi  # type: ignore[call-overload]
        super().run(aggregations)
        assert self.own.sent_bytes == self.ledgers[WORLD.rank].sent_bytes


class Asked:
    """A exchange that asks over MPI, too."""

    def __init__(self, aggregation: Aggregation, channel: Channel) -> None:
        self._talk = aggregation
        self._channel = channel
        self._open: Any = None

    @property
    def finite(self) -> Tensor:
        return self._talk.finite

    @property
    def watch(self) -> bool:
        return self._talk.watch

    def ask(self, answer: Answer | None) -> Request | None:
        if answer is not None:
            self._open.wait()
            brought = self._open.open(self._talk.watch)
            assert same(brought, answer), f"MPI answered {brought}, lock-step {answer}"
            answer = brought
        request = self._talk.ask(answer)
        if request is not None:
            CARRIED[type(request).__name__] += 1
            self._open = self._channel.prepare(own_copy(request), self._talk.finite)
            self._open.start()
        return request


def own_copy(request: Request) -> Request:
    """The same request with buffers of its own: a transport may use them."""
    if isinstance(request, AllReduce):
        return replace(request, x=request.x.clone())
    if hasattr(request, "payloads"):
        return replace(request, payloads=tuple(map(copied, request.payloads)))
    return replace(request, payload=copied(request.payload))


def copied(payload: Payload) -> Payload:
    return Payload(payload.wire.clone(), payload.parts)


def same(one: Answer, other: Answer) -> bool:
    if bool(one.finite) != bool(other.finite):
        return False
    if isinstance(one.value, Tensor):
        return bits(one.value, other.value)
    ours, theirs = (list(v) if isinstance(v, list | tuple) else [v] for v in (one.value, other.value))
    return len(ours) == len(theirs) and all(
        a.parts == b.parts and all(bits(a[part.kind], b[part.kind]) for part in a.parts)
        for a, b in zip(ours, theirs, strict=True)
    )


def bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def pytest_configure(config: pytest.Config) -> None:
    """In the place of lock-step, wherever the conformance tests makes one."""
    lockstep.Lockstep = Mirrored  # type: ignore[misc]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what was carried: a run in which nothing was would prove nothing."""
    terminalreporter.write_line(f"carried {sum(CARRIED.values())}: {' '.join(sorted(CARRIED))}")
