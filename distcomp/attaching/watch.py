"""Looks at each step of the training loop: raises what went wrong in the exchange, and tells what it did."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim.optimizer import Optimizer

from distcomp.attaching.details import cadence, spans_of
from distcomp.attaching.elapsed import TrainingTime
from distcomp.attaching.protocol import Sync
from distcomp.attaching.record import Iteration
from distcomp.attaching.session import Session
from distcomp.errors import DistcompError
from distcomp.process_memory import peak_bytes
from distcomp.training import Listener

Sink = Callable[[Mapping[str, Any]], object]
"""What takes records: a function, or an object with a ``close`` of its own."""

PHASES = ("encode", "recode", "wait", "decode")


class Watch(Listener):
    """Looks at each optimizer step: raises what went wrong on the exchange's thread, verifies that the
    exchange ran, records."""

    def __init__(self, sync: Sync, session: Session) -> None:
        self._sync = sync
        self._session = session
        self._recorded = 0
        self._begin_s = 0.0
        self._trained = TrainingTime()
        self._counted: dict[str, int] = {}
        self.sinks: list[Sink] = []
        sync.detail_every = cadence() if session.recorder is not None else 0

    def close(self) -> None:
        self._sync.clock.leave(self)
        for sink in self.sinks:
            getattr(sink, "close", lambda: None)()
        self.sinks.clear()

    def totals(self) -> dict[str, Any]:
        last, sent = self._sync.last, self._sync.sent_bytes
        fields: dict[str, Any] = {"payload_bytes": sum(sent.values()), "payload_by_kind": dict(sent)}
        if last is not None:
            fields["last"] = _describe(last)
        return fields

    def log(self, fields: Mapping[str, Any]) -> None:
        """Write a line of metrics; ``step`` and ``train_s`` are filled in where they are not given."""
        self._trained.interrupt()
        fields = {"step": self._sync.iterations, "train_s": self._trained.seconds, **fields}
        if self._session.recorder is not None:
            self._session.recorder.metric(**fields)
        self._tell_sinks({"kind": "metric", **fields})

    def _tell_sinks(self, record: Mapping[str, Any]) -> None:
        """A sink that cannot write (a full disk) is left out from then on: telemetry stops no training."""
        for sink in list(self.sinks):
            try:
                sink(record)
            except OSError as error:
                self.sinks.remove(sink)
                name = type(sink).__name__
                warnings.warn(
                    f"{name} cannot write ({error}); training goes on without it: make room, or leave it out",
                    stacklevel=3,
                )

    def forward_begins(self) -> None:
        self.record()
        self._trained.forward()
        if self._sync.iterations == self._recorded and not self._begin_s:
            self._begin_s = time.perf_counter()

    def evaluation_begins(self) -> None:
        self.record()
        self._trained.interrupt()

    def after_step(self, optimizer: Optimizer) -> None:
        self._trained.stepped()

    def gradients_used(self, optimizer: Optimizer) -> None:
        self._sync.idle()
        if self._sync.iterations == 0 and _has_gradient(optimizer):
            raise DistcompError(
                "the optimizer steps but no gradient went through the attached method: call the attached "
                "model itself (not model.module), outside no_sync(), before optimizer.step()"
            )
        self.record()

    def record(self) -> None:
        """Write down the last iteration, once."""
        last = self._sync.last
        if last is None or last.index < self._recorded:
            return
        self._recorded = last.index + 1
        step_s = time.perf_counter() - self._begin_s if self._begin_s else None
        self._begin_s = 0.0
        before, self._counted = self._counted, dict(self._sync.sent_bytes)
        by_kind = {kind: sent - before.get(kind, 0) for kind, sent in self._counted.items()}
        if self._session.recorder is None and not self.sinks:
            return
        counted = {"payload_by_kind": by_kind, "qdisc_bytes": _qdisc_bytes()}
        fields = {"step_s": step_s, **_describe(last), **counted}
        if self._session.recorder is not None:
            self._session.recorder.step(**fields)
            if self._sync.detail_every and last.index % self._sync.detail_every == 0:
                self._session.recorder.detail(**self._detail(last))
        self._tell_sinks({"kind": "step", **fields})

    def _detail(self, last: Iteration) -> dict[str, Any]:
        """A closer look at an iteration: memory on every rank, the rest on rank 0."""
        memory = {"peak_bytes": peak_bytes(), "state_bytes": self._sync.report().get("state_bytes", 0)}
        detail: dict[str, Any] = {"step": last.index, "memory": memory}
        if self._session.rank == 0:
            detail |= {"parameters": self._sync.detail, **spans_of(last.timeline, last.ready_s)}
        return detail


def _has_gradient(optimizer: Optimizer) -> bool:
    """Whether it steps for real: torch.distributed.checkpoint steps on zeros, to make its state."""
    held = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return any((one.to_local() if hasattr(one, "to_local") else one).any() for one in held)


def _qdisc_bytes() -> int | None:
    """What the kernel's queue has counted for this rank, where the emulator says which queue it is."""
    device = os.environ.get("DISTCOMP_DEVICE")
    if not device:
        return None
    from distcomp.network.qdisc import read_qdisc_bytes  # only on an emulated network, not with every import

    return read_qdisc_bytes(device)


def _describe(last: Any) -> dict[str, Any]:
    timeline = last.timeline
    return {
        "step": last.index,
        "payload_bytes": last.payload_bytes,
        "exchange_s": timeline.exchange_s,
        "phases": {f"{phase}_s": timeline.seconds(phase) for phase in PHASES},
        "exposed": {f"{phase}_s": timeline.seconds(phase, last.ready_s) for phase in PHASES},
    }
