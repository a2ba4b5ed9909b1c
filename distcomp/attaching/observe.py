"""How long does a step take without communication, and when is each bucket ready?"""

# No "from __future__ import annotations" here: DDP compares the hook's annotations with the types themselves.

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from distcomp.attaching.hook_dispatcher import dispatcher_of
from distcomp.attaching.slices import slices_of
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.transports.types import GradBucket

Clock = Callable[[], float]

WARM_UP = 3  # the first step's buckets are not those of later ones


@dataclass(frozen=True)
class ObservedSteps:
    """Each bucket's layout and the moment it was ready, in seconds from a step's start; and when the step was
    over."""

    layouts: tuple[Layout, ...]
    ready_s: tuple[float, ...]
    step_s: float


class Watcher:
    """Gives every bucket back as it is, and notes the time."""

    def __init__(self, ddp: DistributedDataParallel, clock: Clock) -> None:
        self._clock = clock
        self._segments = slices_of(ddp.module)
        self.seen: list[tuple[Layout, float]] = []

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        layout = Layout(tuple(self._segments[id(parameter)] for parameter in bucket.parameters()))
        self.seen.append((layout, self._clock()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


@contextmanager
def silenced(ddp: DistributedDataParallel, clock: Clock = time.perf_counter) -> Iterator[Watcher]:
    """Until it ends, ``ddp`` sends nothing: every rank keeps its own gradients."""
    dispatcher = dispatcher_of(ddp)
    before, dispatcher.attached = dispatcher.attached, Watcher(ddp, clock)
    try:
        yield dispatcher.attached
    finally:
        dispatcher.attached = before


def observe(
    ddp: DistributedDataParallel,
    step: Callable[[], object],
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> ObservedSteps:
    """Means over ``repeats`` of ``step``: one forward, one backward and the optimizer. Nothing is sent.

    ``clock``: ``time.process_time`` where processes share cores and it is arithmetic that is asked for.

    Raises DistcompError where a step's gradients do not come in one backward.
    """
    ready_s, steps_s = [], []
    layouts: tuple[Layout, ...] = ()
    with silenced(ddp, clock) as watcher:
        for index in range(WARM_UP + repeats):
            watcher.seen.clear()
            begin_s = clock()
            step()
            end_s = clock()
            layouts = tuple(layout for layout, _ in watcher.seen)
            if not layouts:
                raise DistcompError("no gradient came out of a step; let it call the model and backward()")
            if index >= WARM_UP:
                steps_s.append(end_s - begin_s)
                ready_s.append([moment_s - begin_s for _, moment_s in watcher.seen])
    means_s = tuple(map(statistics.fmean, zip(*ready_s, strict=True)))
    return ObservedSteps(layouts, means_s, statistics.fmean(steps_s))


def timed(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    """All ranks at once: seconds from the start of a step to the start of the next, and seconds of a core
    that a rank spends in one. Means over the ranks, whose steps are equally long in the long run; of the
    former the median of ``repeats``."""
    for _ in range(WARM_UP):
        step()
    dist.barrier()
    moments_s, began_s = [time.perf_counter()], time.process_time()
    for _ in range(repeats):
        step()
        moments_s.append(time.perf_counter())
    core_s = torch.tensor((time.process_time() - began_s) / repeats, dtype=torch.float64)
    steps_s = torch.tensor(moments_s, dtype=torch.float64).diff()
    dist.all_reduce(core_s)
    dist.all_reduce(steps_s)
    ranks = dist.get_world_size()
    return float(steps_s.median()) / ranks, float(core_s) / ranks


@contextmanager
def only_rank() -> Iterator[None]:
    """This process is the only rank of a world until it ends.

    Raises DistcompError where there is a process group already.
    """
    if dist.is_initialized():
        raise DistcompError("this process is a rank already; start it without torchrun")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def observe_alone(
    module: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
) -> ObservedSteps:
    """As :func:`observe`, of a module in a process that is no rank of anything; a copy of it is trained.

    Raises DistcompError where there is a process group already.
    """
    with only_rank():
        ddp = DistributedDataParallel(deepcopy(module))
        stepper, (inputs, targets) = optimizer(ddp.parameters()), batch

        def step() -> None:
            stepper.zero_grad()
            loss(ddp(inputs), targets).backward()  # type: ignore[no-untyped-call]
            stepper.step()

        return observe(ddp, step)
