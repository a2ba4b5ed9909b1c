"""Looks at each step of the training loop: raises what went wrong in the exchange, and tells what it did."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from distcomp.attaching.builtin_hooks import BuiltinHookSync
from distcomp.attaching.ddp import GradientSync
from distcomp.attaching.fsdp import FSDPSync
from distcomp.attaching.parameters import ParameterSync
from distcomp.attaching.session import Session
from distcomp.attaching.target import uncompiled
from distcomp.errors import DistcompError
from distcomp.network.qdisc import read_qdisc_bytes

Sync = GradientSync | BuiltinHookSync | ParameterSync | FSDPSync

Sink = Callable[[Mapping[str, Any]], object]
"""What takes records: a function, or an object with a ``close`` of its own."""

PHASES = ("encode", "recode", "wait", "decode")


class Watch:
    """Looks at each optimizer step: raises what went wrong on the exchange's thread, verifies that the
    exchange ran, records."""

    def __init__(self, model: nn.Module, sync: Sync, session: Session) -> None:
        self._sync = sync
        self._session = session
        # weakly, since an id alone may come back as another model's parameter once this model is gone
        self._parameters = {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}
        self._recorded = 0
        self._begin_s = 0.0
        self.sinks: list[Sink] = []
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
            model.register_forward_pre_hook(uncompiled(self._before_forward)),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for sink in self.sinks:
            getattr(sink, "close", lambda: None)()
        self.sinks.clear()

    def totals(self) -> dict[str, Any]:
        last = self._sync.last
        fields: dict[str, Any] = {"payload_bytes": self._sent(), "payload_by_kind": self._by_kind()}
        if last is not None:
            fields["last"] = _describe(last)
        return fields

    def log(self, fields: Mapping[str, Any]) -> None:
        if self._session.recorder is not None:
            self._session.recorder.metric(**fields)
        for sink in self.sinks:
            sink({"kind": "metric", **fields})

    def _before_forward(self, module: nn.Module, arguments: object) -> None:
        self.record()
        if self._sync.iterations == self._recorded and torch.is_grad_enabled() and not self._begin_s:
            self._begin_s = time.perf_counter()

    def _before_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if not _closure(*arguments, **options):
            self._look(optimizer)

    def _after_step(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if _closure(*arguments, **options):  # inside which the backward was
            self._look(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        if not any(self._watches(p) for group in optimizer.param_groups for p in group["params"]):
            return
        self._sync.idle()
        if self._sync.iterations == 0 and _has_gradient(optimizer):
            raise DistcompError(
                "the optimizer steps but no gradient went through the attached method: call the attached "
                "model itself "
                "(not model.module), outside no_sync(), before optimizer.step()"
            )
        self.record()

    def _watches(self, parameter: Tensor) -> bool:
        known = self._parameters.get(id(parameter))
        return known is not None and known() is parameter

    def record(self) -> None:
        """Write down the last iteration, once."""
        last = self._sync.last
        if last is None or last.index < self._recorded:
            return
        self._recorded = last.index + 1
        step_s = time.perf_counter() - self._begin_s if self._begin_s else None
        self._begin_s = 0.0
        if self._session.recorder is None and not self.sinks:
            return
        counted = {"payload_by_kind": self._by_kind(), "qdisc_bytes": _qdisc_bytes()}
        fields = {"step_s": step_s, **_describe(last), **counted}
        if self._session.recorder is not None:
            self._session.recorder.step(**fields)
        for sink in self.sinks:
            sink({"kind": "step", **fields})

    def _sent(self) -> int:
        return (
            self._sync.sent_bytes
            if isinstance(self._sync, BuiltinHookSync)
            else self._session.ledger.total_bytes
        )

    def _by_kind(self) -> dict[str, int]:
        if isinstance(self._sync, BuiltinHookSync):
            return {"values": self._sync.sent_bytes}
        return dict(self._session.ledger.sent_bytes)


def _has_gradient(optimizer: Optimizer) -> bool:
    """Whether it steps for real: torch.distributed.checkpoint steps on zeros, to make its state."""
    held = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return any((one.to_local() if hasattr(one, "to_local") else one).any() for one in held)


def _closure(optimizer: Optimizer, closure: object = None, **options: object) -> bool:
    """Whether ``optimizer.step`` was given one, as Lightning does."""
    return closure is not None


def _qdisc_bytes() -> int | None:
    """What the kernel's queue has counted for this rank, where the emulator says which queue it is."""
    device = os.environ.get("DISTCOMP_DEVICE")
    return read_qdisc_bytes(device) if device else None


def _describe(last: Any) -> dict[str, Any]:
    timeline = last.timeline
    return {
        "step": last.index,
        "payload_bytes": last.payload_bytes,
        "exchange_s": timeline.exchange_s,
        "phases": {f"{phase}_s": timeline.seconds(phase) for phase in PHASES},
        "exposed": {f"{phase}_s": timeline.seconds(phase, last.ready_s) for phase in PHASES},
        "wire_idle_s": timeline.wire_idle_s,
    }
