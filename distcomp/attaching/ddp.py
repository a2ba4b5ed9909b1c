"""Gradients, every step: a method in the place of DistributedDataParallel's all-reduce."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distcomp.attaching.record import Iteration
from distcomp.errors import DistcompError
from distcomp.layout import Layout, ParamSlice
from distcomp.methods.base import Method, State, StepContext
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import Channel
from distcomp.runtime.pipeline import Carrier, Running, Timeline, drive
from distcomp.runtime.states import States, select
from distcomp.transports.types import GradBucket


class Scaler(Protocol):
    """What is asked of a GradScaler: to multiply by its scale."""

    def scale(self, outputs: Tensor) -> Tensor:
        """``outputs`` times the loss scale."""


class Bucket:
    """A bucket on its way; DDP waits for its ``future``."""

    def __init__(self, layout: Layout, buffer: Tensor, scale: Tensor | None) -> None:
        self.layout = layout
        self.buffer = buffer
        self.scale = scale
        self.aggregation: Aggregation | None = None
        self.before: State | None = None
        self._answer: Tensor | BaseException | None = None
        devices: list[int | str | torch.device] | None = (
            None if buffer.device.type == "cpu" else [buffer.device]
        )
        self._answered: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self.future: torch.futures.Future[Tensor] = self._answered.then(self._deliver)

    def answer(self, answer: Tensor | BaseException) -> None:
        """Let DDP go on, with the new bucket or with an error. The first answer counts."""
        if self._answer is None:
            self._answer = answer
            self._answered.set_result(self.buffer if isinstance(answer, BaseException) else answer)

    def _deliver(self, answered: torch.futures.Future[Tensor]) -> Tensor:
        if isinstance(
            self._answer, BaseException
        ):  # raised here it reaches backward; set_exception garbles it
            raise self._answer
        return answered.value()


class GradientSync:
    """Carries the buckets of each backward through ``method``.

    On the CPU one thread of its own carries them, so that compression and exchange overlap with backward; on
    a GPU the hook does, on a side stream. State is committed once an iteration, after its last bucket, and
    only if every rank's gradients were finite; otherwise the iteration leaves no trace but the non-finite
    gradient itself.
    """

    def __init__(
        self, module: nn.Module, method: Method, channel: Channel, seed: int = 0, scaler: Scaler | None = None
    ) -> None:
        self.method = method
        self.channel = channel
        self.states = States(method)
        self.iterations = 0
        self.error: BaseException | None = None
        self.last: Iteration | None = None
        self._seed = seed
        self._scaler = scaler
        self._segments = slices_of(module)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._expected = 0
        self._driver: _Thread | _Stream | None = None

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Take a bucket from DDP; the future will hold the estimate of its mean."""
        if self.error is not None:
            raise self.error
        index, buffer = bucket.index(), bucket.buffer()
        if index != self._expected:
            self.error = DistcompError(
                f"bucket {index} came where bucket {self._expected} was due: an earlier backward did not "
                "finish; "
                "restart from the last checkpoint"
            )
            raise self.error
        if self._driver is None:
            self._driver = _Thread(self) if buffer.device.type == "cpu" else _Stream(self, buffer.device)
        scale = self._scaler.scale(torch.ones((), device=buffer.device)) if self._scaler is not None else None
        one = Bucket(self._layout(bucket), buffer, scale)
        self._driver.submit(one, first=index == 0, last=bucket.is_last())
        self._expected = 0 if bucket.is_last() else index + 1
        return one.future

    def idle(self) -> None:
        """Wait until nothing is under way. Raises what went wrong, with its own type."""
        if self._driver is not None:
            self._driver.idle()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def state_dict(self) -> dict[str, Any]:
        self.idle()
        return {"iterations": self.iterations, "seed": self._seed, "state": self.states.by_parameter()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.idle()
        self.iterations = int(saved["iterations"])
        self._seed = int(saved["seed"])
        self.states.load(saved["state"])

    def run(self) -> IterationRun:
        return IterationRun(self)

    def _layout(self, bucket: GradBucket) -> Layout:
        parameters = bucket.parameters()
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._layouts:
            layout = Layout(tuple(self._segments[one] for one in key))
            if layout.numel != bucket.buffer().numel():
                raise DistcompError(
                    f"a bucket of {bucket.buffer().numel()} elements holds parameters of {layout.numel}: "
                    "padded buckets are "
                    "not supported; please report the module and the torch version"
                )
            self._layouts[key] = layout
        return self._layouts[key]


class IterationRun:
    """One iteration under way: from its first bucket to the commit."""

    def __init__(self, sync: GradientSync) -> None:
        self._sync = sync
        self._buckets: list[Bucket] = []
        self._sent_before = sync.channel.ledger.total_bytes
        self.timeline = Timeline()
        self.ready_s = 0.0
        self.carrier: Carrier = drive(sync.channel, self.timeline)

    def enter(self, bucket: Bucket) -> Running:
        """Begin the bucket's exchange, in unscaled float32."""
        sync = self._sync
        self._buckets.append(bucket)
        x = bucket.buffer.float()
        if bucket.scale is not None:
            x = x / bucket.scale
        bucket.before = sync.states.of(bucket.layout, x.device)
        context = StepContext(
            sync.channel.transport.rank,
            sync.channel.transport.size,
            bucket.layout,
            sync.iterations,
            Key.of(sync._seed, sync.iterations),
        )
        bucket.aggregation = Aggregation(sync.method, x, bucket.before, context)
        return Running(bucket.aggregation, lambda: self._answer(bucket))

    def _answer(self, bucket: Bucket) -> None:
        assert bucket.aggregation is not None
        assert bucket.aggregation.result is not None
        estimate = bucket.aggregation.result.estimate
        if bucket.scale is not None:
            estimate = estimate * bucket.scale
        bucket.answer(estimate.to(bucket.buffer.dtype))

    def commit(self) -> None:
        """Keep the new states if every rank was finite in every bucket."""
        sync = self._sync
        finite = torch.tensor(True)
        for bucket in self._buckets:
            assert bucket.aggregation is not None
            finite = bucket.aggregation.finite & finite.to(bucket.aggregation.finite.device)
        for bucket in self._buckets:
            assert bucket.aggregation is not None
            assert bucket.before is not None
            result = bucket.aggregation.result
            assert result is not None
            sync.states.commit(bucket.layout, select(finite, result.state, bucket.before))
        sent = sync.channel.ledger.total_bytes - self._sent_before
        sync.last = Iteration(sync.iterations, self.timeline, self.ready_s, sent)
        sync.iterations += 1

    def fail(self, error: BaseException) -> None:
        self._sync.error = error
        for bucket in self._buckets:
            bucket.answer(error)


class _Thread:
    """Carries iterations on a thread of its own, one after the other."""

    def __init__(self, sync: GradientSync) -> None:
        self._sync = sync
        self._inbox: queue.Queue[tuple[Bucket, bool, bool] | None] = queue.Queue()
        self._ready_s = 0.0
        self._thread = threading.Thread(target=self._serve, name="distcomp-exchange", daemon=True)
        self._thread.start()

    def submit(self, bucket: Bucket, first: bool, last: bool) -> None:
        if last:
            self._ready_s = time.perf_counter()
        self._inbox.put((bucket, first, last))

    def idle(self) -> None:
        self._inbox.join()

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (item := self._inbox.get()) is not None:
            self._iterate(item)

    def _iterate(self, item: tuple[Bucket, bool, bool]) -> None:
        """Carry one iteration, of which ``item`` is the first bucket."""
        run = self._sync.run()
        taken = 1
        try:
            if self._sync.error is not None:
                raise self._sync.error
            next(run.carrier)
            while True:
                bucket, _, last = item
                run.carrier.send(run.enter(bucket))
                if last:
                    break
                following = self._inbox.get()
                if following is None:
                    return
                item = following
                taken += 1
            run.ready_s = self._ready_s
            try:
                run.carrier.send(None)
            except StopIteration:
                run.commit()
        except BaseException as error:  # whatever it is, DDP is waiting for it on another thread
            run.fail(error)
            item[0].answer(error)
        finally:
            for _ in range(taken):
                self._inbox.task_done()


class _Stream:
    """Carries an iteration inside the hook, on a side stream of a GPU; nothing waits for the device."""

    def __init__(self, sync: GradientSync, device: torch.device) -> None:
        self._sync = sync
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._run: IterationRun | None = None

    def submit(self, bucket: Bucket, first: bool, last: bool) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            bucket.buffer.record_stream(self._stream)
            try:
                self._drive(bucket, first, last)
            except BaseException as error:
                assert self._run is not None
                self._run.fail(error)
                raise

    def _drive(self, bucket: Bucket, first: bool, last: bool) -> None:
        if first or self._run is None:
            self._run = self._sync.run()
            next(self._run.carrier)
        run = self._run
        run.carrier.send(run.enter(bucket))
        if last:
            run.ready_s = time.perf_counter()
            try:
                run.carrier.send(None)
            except StopIteration:
                run.commit()

    def idle(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.idle()


NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def slices_of(module: nn.Module) -> dict[int, ParamSlice]:
    """Each parameter's segment, by identity. Tied parameters have one, under their first name."""
    roles: dict[int, str] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, NORMS):
                roles[id(parameter)] = "norm"
            elif isinstance(part, nn.Embedding | nn.EmbeddingBag):
                roles[id(parameter)] = "embedding"
    slices = {}
    for name, parameter in module.named_parameters():
        role = roles.get(id(parameter)) or ("matrix" if parameter.dim() >= 2 else "bias")
        slices[id(parameter)] = ParamSlice(name, tuple(parameter.shape), 0, parameter.numel(), role)
    return slices
