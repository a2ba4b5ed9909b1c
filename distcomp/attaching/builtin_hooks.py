"""PyTorch's own reductions behind the same handle: what distcomp is compared with, in one run and with one
clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distcomp.attaching.buffers import FirstsBuffers
from distcomp.attaching.hook_dispatcher import all_reduce_as_ddp
from distcomp.attaching.protocol import Sync
from distcomp.attaching.record import Iteration
from distcomp.attaching.session import Session
from distcomp.builtin_hooks import parse_builtin
from distcomp.errors import DistcompError
from distcomp.methods.base import ByParameter, State, StepContext
from distcomp.private_torch import NO_BACKWARD, at_backward_end, backward_number
from distcomp.runtime.aggregation import Aggregator
from distcomp.runtime.driver import Exchange
from distcomp.runtime.pipeline import PhaseSpan, Timeline
from distcomp.training import TrainingClock
from distcomp.transports.throttle import SlowLink, hold_until
from distcomp.transports.types import GradBucket

Hook = Callable[[GradBucket], torch.futures.Future[Tensor]]
Served = tuple[Hook, Callable[[GradBucket], int], Callable[[], Iterable[Tensor]]]
"""The hook, the bytes that it all-reduces for a bucket, and what it keeps between steps."""


class BuiltinHookSync(Sync):
    """``ddp`` (plain all-reduce), ``torch:fp16`` or ``torch:powersgd`` (``torch:powersgd:rank=2``), timed
    alike, and with a bound: they exchange over a group of our own, whose timeout is that of ``attach``.

    Keeps no state that could be saved: PyTorch's PowerSGD hook starts anew after a restart.
    """

    def __init__(
        self, name: str, ddp: DistributedDataParallel, session: Session, clock: TrainingClock
    ) -> None:
        super().__init__(name, session, clock)
        self._sent = 0
        self._size = session.size
        self._hook, self._bytes_of, self._kept = _hook(name, session.group)
        self._buffers = FirstsBuffers(ddp, session)
        self._under_way: list[torch.futures.Future[Tensor]] = []
        self._timeline = Timeline()
        self._begin_bytes = 0
        self._slow = SlowLink.from_env()

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if bucket.index() == 0:
            self._timeline, self._begin_bytes = Timeline(), self._sent
            self._under_way = []
            if backward_number() != NO_BACKWARD:
                at_backward_end(self._raise)
        self.session.channel.exchange += 1  # tells others how far this rank has come, should it be missed
        begin_s = time.perf_counter()
        timeline, buffer, index = self._timeline, bucket.buffer(), bucket.index()
        reduced = self._hook(bucket)
        sent_bytes = 2 * (self._size - 1) / self._size * self._bytes_of(bucket)
        arrival_s = self._slow.arrival_s(sent_bytes, 2 * (self._size - 1)) if self._slow is not None else 0.0

        def finished(future: torch.futures.Future[Tensor]) -> Tensor:
            hold_until(arrival_s)
            for phase in ("wire", "wait"):
                timeline.spans.append(PhaseSpan(phase, begin_s, time.perf_counter(), index))
            try:
                return future.value()
            except RuntimeError as error:  # DDP would raise it without a name
                self.error = self.error or self.session.diagnose(error)
                return buffer

        future: torch.futures.Future[Tensor] = reduced.then(finished)
        self._under_way.append(future)
        self._sent += round(sent_bytes)
        if bucket.is_last():
            sent = self._sent - self._begin_bytes
            self.last = Iteration(self.iterations, timeline, time.perf_counter(), sent)
            self.iterations += 1
        return future

    def _raise(self) -> None:
        """Called at the end of a backward, before DDP waits for the buckets: each ends within the timeout."""
        for future in self._under_way:
            future.wait()
        self.idle()

    def forward_begins(self) -> None:
        self.idle()
        self._buffers.take()

    def evaluation_begins(self) -> None:
        self._buffers.take()

    def close(self) -> None:
        super().close()
        self._buffers.close()

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return {"values": self._sent}

    def exchange(self, aggregator: Aggregator, x: Tensor, state: State, context: StepContext) -> Exchange:
        """There is no line of ours beside PyTorch's hooks: raises DistcompError."""
        raise DistcompError(
            f"{self.text} is PyTorch's own reduction, which carries nothing else; to exchange tensors, "
            "attach a method of distcomp's, such as 'identity'"
        )

    def report(self) -> dict[str, Any]:
        return {"state_bytes": sum(one.numel() * one.element_size() for one in self._kept())}

    def state_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "seed": 0, "state": {}}

    def expected_state(self, saved: Mapping[str, Any]) -> ByParameter:
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.iterations = saved["iterations"]


def _hook(name: str, group: dist.ProcessGroup) -> Served:
    builtin, rank = parse_builtin(name)
    if builtin.name == "ddp":
        return (
            lambda bucket: all_reduce_as_ddp(group, bucket),
            lambda bucket: bucket.buffer().numel() * bucket.buffer().element_size(),
            lambda: (),
        )
    if builtin.name == "torch:fp16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        return (
            lambda bucket: default_hooks.fp16_compress_hook(group, bucket),
            lambda bucket: bucket.buffer().numel() * 2,
            lambda: (),
        )
    return _powersgd(group, rank or 1)


def _powersgd(group: dist.ProcessGroup, rank: int) -> Served:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        process_group=group, matrix_approximation_rank=rank, start_powerSGD_iter=2
    )
    counted = 0

    def sent(bucket: GradBucket) -> int:
        nonlocal counted
        before, counted = counted, int(state.total_numel_after_compression)
        numel = counted - before if counted > before else bucket.buffer().numel()
        return numel * bucket.buffer().element_size()

    def kept() -> Iterable[Tensor]:
        each = (state.error_dict, state.p_memory_dict, state.q_memory_dict)
        return (tensor for held in each for tensor in held.values())

    return lambda bucket: powerSGD_hook.powerSGD_hook(state, bucket), sent, kept
