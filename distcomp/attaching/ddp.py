"""Gradients, every step: a method in the place of DistributedDataParallel's all-reduce."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from distcomp.active import NOTHING_OBSERVED, Observed
from distcomp.attaching.bucket import Bucket, Scaler, scale_of
from distcomp.attaching.buffers import FirstsBuffers
from distcomp.attaching.details import looked_at
from distcomp.attaching.observed import observer
from distcomp.attaching.protocol import Sync
from distcomp.attaching.record import Iteration
from distcomp.attaching.session import Session
from distcomp.attaching.slices import slices_of
from distcomp.attaching.target import ignored_by
from distcomp.attaching.unused import UnusedParameters
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.active_only import UNUSED_HERE, UsedOnly
from distcomp.methods.base import ByParameter, Method
from distcomp.private_torch import NO_BACKWARD, at_backward_end, backward_number
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import commit, context_of
from distcomp.runtime.pipeline import Drive
from distcomp.runtime.states import States
from distcomp.training import TrainingClock
from distcomp.transports.types import GradBucket

SHOWN = 8  # names of parameters in an error

LOOK_S = 5.0


class GradientSync(Sync):
    """Carries the buckets of each backward through ``method``.

    On the CPU one thread of its own carries them, so that compression and exchange overlap with backward; on
    a GPU the hook does, on a side stream. State is committed once an iteration, after its last bucket, and
    only if every rank's gradients were finite; otherwise the iteration leaves no trace but the non-finite
    gradient itself.

    Every wait ends: an iteration whose last bucket is there ends with its exchanges, which have a timeout;
    one that ended short of buckets (a parameter had no gradient) is recognised at the optimizer's step or at
    the next forward, and named on every rank.
    Where DDP looks for unused parameters (``find_unused_parameters=True``), those that no rank used in an
    iteration are not sent, and their state stays as it was (:class:`distcomp.methods.active_only.UsedOnly`).
    """

    source = "outputs"

    def __init__(
        self,
        ddp: DistributedDataParallel,
        method: Method,
        session: Session,
        clock: TrainingClock,
        seed: int = 0,
        scaler: Scaler | None = None,
    ) -> None:
        super().__init__(method, session, clock)
        self.channel = session.channel
        parameters = dict(ddp.module.named_parameters())
        find_unused = ddp.find_unused_parameters
        self._unused = UnusedParameters(parameters) if find_unused else None
        self.exchanged = UsedOnly(method) if find_unused else method
        self.states: States = States(method)
        self.seed = seed
        self._scaler = scaler
        self._ddp = ddp
        self._segments = slices_of(ddp.module)
        self._observe = observer(method, parameters)
        self._observed: Observed = NOTHING_OBSERVED
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._expected = 0
        self._came: list[Layout] = []
        self._ended = False
        self._watched = False
        self._buffers = FirstsBuffers(ddp, session)
        self._driver: _Thread | _Stream | None = None

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Take a bucket from DDP; the future will hold the estimate of its mean."""
        index, buffer = bucket.index(), bucket.buffer()
        if index == 0:
            self._watch_backward()
        if self.error is not None:
            return self._not_reduced(buffer)
        if index != self._expected:
            raise self._stop(
                DistcompError(
                    f"bucket {index} came where bucket {self._expected} was due: an earlier backward did not "
                    "finish; restart from the last checkpoint"
                )
            )
        if self._driver is None:
            self._driver = _Thread(self) if buffer.device.type == "cpu" else _Stream(self, buffer.device)
        scale = scale_of(self._scaler, buffer.device)
        if index == 0:
            self._observed = self._observe()
        layout, observed = self._layout(bucket), self._observed
        if self._unused is not None:
            observed = {**observed, UNUSED_HERE: self._unused.take(layout)}
        one = Bucket(layout, buffer, scale, observed, raises=not self._watched)
        self.clock.exchange_begins()
        self._came = [*self._came, one.layout] if index else [one.layout]
        self._ended = False
        self._driver.submit(one, first=index == 0, last=bucket.is_last())
        self._expected = 0 if bucket.is_last() else index + 1
        return one.future

    def _watch_backward(self) -> None:
        """Raise what goes wrong from this backward, with its own type: what a future of DDP raises
        becomes a RuntimeError.

        A callback that is queued now is called before DDP's own, which waits for the buckets; one that it
        queues comes after. Where DDP looks for unused parameters it also waits for an exchange of its own,
        with no bound of ours: there we wait before.
        """
        self._watched = backward_number() != NO_BACKWARD
        if not self._watched:  # a rank that has joined reduces outside any backward
            return
        if self._unused is None:
            at_backward_end(lambda: at_backward_end(self._raise))
        else:
            at_backward_end(self._raise)

    def _raise(self) -> None:
        if self._driver is not None and not self.under_way:
            self._driver.idle()
        if self.error is not None:
            raise self.error

    def _not_reduced(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """The bucket as it is, in a backward that will raise."""
        if not self._watched:
            assert self.error is not None
            raise self.error
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.is_cuda else None
        )
        future.set_result(buffer)
        return future

    @property
    def under_way(self) -> bool:
        return self._expected != 0

    def forward_begins(self) -> None:
        """The last iteration is over, or it never will be."""
        if self.error is not None:
            raise self.error
        if self.under_way:
            raise self._stop(self._short())
        self._ended, self._came = False, []
        self._take_buffers()

    def evaluation_begins(self) -> None:
        self._take_buffers()

    def _take_buffers(self) -> None:
        try:
            self._buffers.take()
        except DistcompError as error:
            self.error = error
            raise

    def backward_ended(self) -> None:
        self._ended = True

    def gradients_used(self, optimizer: Optimizer) -> None:
        """Gradients that were not exchanged are not used."""
        if self.error is not None:
            raise self.error
        if self.under_way:
            raise self._stop(self._short())
        if self._ended and not self._came and self._without_gradient():
            raise self._stop(self._short())

    def idle(self) -> None:
        """Wait for the last iteration, if all of it is there. Raises what went wrong, with its own type.

        Within a backward, or where one broke off, nothing is waited for: the rest may never come.
        """
        if self._driver is not None and not self.under_way and backward_number() == NO_BACKWARD:
            self._driver.idle()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        super().close()
        self._buffers.close()
        if self._unused is not None:
            self._unused.close()
        if self._driver is None:
            return
        driver, self._driver = self._driver, None
        if self.under_way:
            early = DistcompError("the method was detached before the backward had ended")
            driver.abandon(early)
            if self.error is None:  # else the others know why
                self.session.leave_note(str(early))
        driver.close()

    def _stop(self, error: DistcompError) -> DistcompError:
        """Nothing is exchanged any more, and whoever waits for this rank learns why. Returns the error."""
        self.error = error
        if self._driver is not None:
            self._driver.abandon(error)
        self.session.leave_note(str(error))
        return error

    def _short(self) -> DistcompError:
        """A backward is over, and some of the buckets did not come."""
        if not self._ended:
            return DistcompError(
                f"the backward of iteration {self.iterations} did not finish (it raised, or was interrupted)"
                "; restart from the last checkpoint"
            )
        names = self._without_gradient() or self._missing()
        shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        return DistcompError(
            f"the backward of iteration {self.iterations} ended without a gradient for {len(names)} of "
            f"{len(self._trained())} parameters ({shown}), for which every rank would wait; let all "
            "parameters take part in the loss, or wrap the model with DistributedDataParallel(..., "
            "find_unused_parameters=True), and restart from the last checkpoint"
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients DDP reduces, by name."""
        ignored = ignored_by(self._ddp)
        parameters = self._ddp.module.named_parameters()
        return {name: one for name, one in parameters if one.requires_grad and name not in ignored}

    def _missing(self) -> list[str]:
        came = {name for layout in self._came for name in layout.names}
        return [name for name in self._trained() if name not in came]

    def _without_gradient(self) -> list[str]:
        """Those of no bucket that came, and that hold no gradient (a zero, where it is kept and not set to
        None)."""
        trained = self._trained()
        held = {name: trained[name].grad for name in self._missing()}
        return [name for name, one in held.items() if one is None or (self._came and not one.any())]

    def state_dict(self) -> dict[str, Any]:
        self.idle()
        return {"iterations": self.iterations, "seed": self.seed, "state": self.states.by_parameter()}

    def expected_state(self, saved: Mapping[str, Any]) -> ByParameter:
        trained = [self._segments[id(parameter)] for parameter in self._trained().values()]
        return self.states.expected(Layout(tuple(trained)), saved["state"])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.idle()
        self.iterations, self.seed = saved["iterations"], saved["seed"]
        self.states.load(saved["state"])

    def _layout(self, bucket: GradBucket) -> Layout:
        parameters = bucket.parameters()
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._layouts:
            layout = Layout(tuple(self._segments[one] for one in key))
            if layout.numel != bucket.buffer().numel():
                raise DistcompError(
                    f"a bucket of {bucket.buffer().numel()} elements holds parameters of {layout.numel}: "
                    "padded buckets are not supported; please report the module and the torch version"
                )
            self._layouts[key] = layout
        return self._layouts[key]


class IterationRun:
    """One iteration under way: from its first bucket to the commit."""

    def __init__(self, sync: GradientSync) -> None:
        self._sync = sync
        self._buckets: list[Bucket] = []
        self._sent_before = sync.channel.ledger.total_bytes
        self._drive = Drive(sync.channel)
        sync.detail = {}

    def enter(self, bucket: Bucket) -> None:
        """Begin the bucket's exchange, in unscaled float32."""
        sync = self._sync
        self._buckets.append(bucket)
        x = bucket.buffer.float()
        if bucket.scale is not None:
            x = x / bucket.scale
        context = context_of(sync.channel, bucket.layout, sync.iterations, sync.seed, bucket.observed)
        if sync.exchanged.may_overwrite and not sync.looks_closer:
            context = replace(context, out=x)
        aggregation = Aggregation(sync.exchanged, x, sync.states.of(bucket.layout, x.device), context)

        def done() -> None:
            if sync.looks_closer:  # before DDP writes the estimate over what was sent
                sync.detail |= looked_at(aggregation, x, sync.method, sync.session.size)
            bucket.answer_with(aggregation.finished().estimate)

        self._drive.add(aggregation, done)

    def end(self, ready_s: float) -> None:
        """The last bucket was there at ``ready_s``: carry all to their ends and keep what they came to."""
        sync = self._sync
        self._drive.end()
        commit(sync.states, self._drive.aggregations)
        sent = sync.channel.ledger.total_bytes - self._sent_before
        sync.last = Iteration(sync.iterations, self._drive.timeline, ready_s, sent)
        sync.iterations += 1

    def fail(self, error: BaseException) -> None:
        """Let DDP raise it."""
        for bucket in self._buckets:
            bucket.answer(error)


class _Thread:
    """Carries iterations on a thread of its own, one after the other."""

    def __init__(self, sync: GradientSync) -> None:
        self._sync = sync
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._whole = 0  # iterations whose last bucket is there, and which are not over
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="distcomp-exchange", daemon=True)
        self._thread.start()
        atexit.register(self._end_at_exit)

    def submit(self, bucket: Bucket, first: bool, last: bool) -> None:
        if last:
            with self._changed:
                self._whole += 1
        self._inbox.put((bucket, time.perf_counter() if last else None))

    def abandon(self, error: BaseException) -> None:
        """The iteration under way gets no more buckets: it ends with ``error``."""
        self._inbox.put(error)

    def idle(self) -> None:
        """Wait until all iterations that are whole are over: their exchanges have timeouts of their own."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._whole == 0, LOOK_S):
                if not self._thread.is_alive():
                    raise RuntimeError("the thread that carries exchanges has ended; attach again")

    def _end_at_exit(self) -> None:
        """Of a script that ends attached: a thread that frees a tensor meanwhile would abort it."""
        self._inbox.put(None)
        self._thread.join(LOOK_S)

    def close(self) -> None:
        """End the thread. Its exchange under way ends within the timeout."""
        atexit.unregister(self._end_at_exit)
        self._inbox.put(None)
        patience_s = self._sync.session.timeout_s + LOOK_S
        self._thread.join(patience_s)
        if self._thread.is_alive():
            raise DistcompError(
                f"an exchange did not end within {patience_s:g} s of detaching, although its timeout is "
                f"{self._sync.session.timeout_s:g} s; end this process"
            )

    def _serve(self) -> None:
        run: IterationRun | None = None
        while (item := self._inbox.get()) is not None:
            if isinstance(item, BaseException):
                if run is not None:
                    run.fail(item)
                run = None
            else:
                run = self._take(run, *item)

    def _take(self, run: IterationRun | None, bucket: Bucket, ready_s: float | None) -> IterationRun | None:
        """Carry one bucket more; ``ready_s`` comes with the last one. Returns the iteration if it goes on."""
        try:
            if self._sync.error is not None:
                raise self._sync.error
            run = run or IterationRun(self._sync)
            run.enter(bucket)
            if ready_s is not None:
                run.end(ready_s)
        except BaseException as error:  # whatever it is, DDP is waiting for it on another thread
            self._sync.error = self._sync.error or error
            if run is not None:
                run.fail(error)
            bucket.answer(error)
            run = None
        if ready_s is None:
            return run
        with self._changed:
            self._whole -= 1
            self._changed.notify_all()
        return None


_Item = tuple[Bucket, float | None] | BaseException | None
"""A bucket, and when it was there if it is the last; why no more will come; or the end."""


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
                self._sync.error = error
                if self._run is not None:
                    self._run.fail(error)
                raise

    def _drive(self, bucket: Bucket, first: bool, last: bool) -> None:
        if first or self._run is None:
            self._run = IterationRun(self._sync)
        self._run.enter(bucket)
        if last:
            self._run.end(time.perf_counter())

    def abandon(self, error: BaseException) -> None:
        """The iteration under way gets no more buckets: it ends with ``error``."""
        if self._run is not None:
            self._run.fail(error)
        self._run = None

    def idle(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.idle()
