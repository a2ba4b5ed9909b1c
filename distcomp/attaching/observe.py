"""How long does a step take without communication, and when is each bucket ready?"""

# No "from __future__ import annotations" here: DDP compares the hook's annotations with the types themselves.

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from distcomp.layout import Layout, ParamSlice
from distcomp.transports.types import GradBucket

Clock = Callable[[], float]

WARM_UP = 3  # the first step's buckets are not those of later ones


@dataclass(frozen=True)
class ObservedGradient:
    """A parameter, its gradient's type, and the moment that was there, in seconds from a step's start."""

    param: ParamSlice
    dtype: torch.dtype
    ready_s: float

    @property
    def nbytes(self) -> int:
        """As DistributedDataParallel counts it towards a bucket."""
        return self.param.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ObservedSteps:
    """Each bucket's layout and the moment it was ready, in seconds from a step's start; and when the step was
    over. ``gradients``: one by one, in the order in which they lie in the buckets."""

    layouts: tuple[Layout, ...]
    ready_s: tuple[float, ...]
    step_s: float
    gradients: tuple[ObservedGradient, ...] = ()


@dataclass(frozen=True)
class WatchedBuckets:
    """What was seen in one step: its seconds, the buckets with their moments, and those of gradients by
    name."""

    step_s: float
    buckets: tuple[tuple[Layout, float], ...]
    gradients: dict[str, float]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The buckets, in order."""
        return tuple(layout for layout, _ in self.buckets)


class Watcher:
    """Gives every bucket back as it is, and notes the time; also when each gradient is there, until
    :meth:`close`."""

    def __init__(self, ddp: DistributedDataParallel, clock: Clock) -> None:
        self._clock = clock
        self._segments = slices_of(ddp.module)
        self._seen: list[tuple[Layout, float]] = []
        self._moments: dict[str, float] = {}
        trained = [one for one in ddp.module.parameters() if one.requires_grad]
        self._dtypes = {self._segments[id(one)].name: one.dtype for one in trained}
        self._hooks = [one.register_post_accumulate_grad_hook(self._note) for one in trained]

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        layout = Layout(tuple(self._segments[id(parameter)] for parameter in bucket.parameters()))
        self._seen.append((layout, self._clock()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def _note(self, parameter: Tensor) -> None:
        self._moments[self._segments[id(parameter)].name] = self._clock()

    def take(self, begin_s: float, end_s: float) -> WatchedBuckets:
        """What was seen of a step between these moments; nothing of it is seen again."""
        buckets = tuple((layout, moment_s - begin_s) for layout, moment_s in self._seen)
        gradients = {name: moment_s - begin_s for name, moment_s in self._moments.items()}
        self._seen.clear()
        self._moments.clear()
        return WatchedBuckets(end_s - begin_s, buckets, gradients)

    def means(self, steps: Sequence[WatchedBuckets]) -> ObservedSteps:
        """Over steps whose buckets are the same."""
        layouts = steps[0].layouts
        ready_s = zip(*([moment_s for _, moment_s in one.buckets] for one in steps), strict=True)
        gradients = tuple(
            ObservedGradient(
                param,
                self._dtypes[param.name],
                # What a step does not use has no gradient, and is there with its bucket.
                statistics.fmean(one.gradients.get(param.name, one.buckets[index][1]) for one in steps),
            )
            for index, layout in enumerate(layouts)
            for param in layout.slices
        )
        step_s = statistics.fmean(one.step_s for one in steps)
        return ObservedSteps(layouts, tuple(map(statistics.fmean, ready_s)), step_s, gradients)

    def close(self) -> None:
        """Gradients are not watched any more."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def silenced(ddp: DistributedDataParallel, clock: Clock = time.perf_counter) -> Iterator[Watcher]:
    """Until it ends, ``ddp`` sends nothing: every rank keeps its own gradients."""
    dispatcher = dispatcher_of(ddp)
    before, dispatcher.attached = dispatcher.attached, Watcher(ddp, clock)
    try:
        yield dispatcher.attached
    finally:
        dispatcher.attached.close()
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
    steps: list[WatchedBuckets] = []
    with silenced(ddp, clock) as watcher:
        for _ in range(WARM_UP + repeats):
            begin_s = clock()
            step()
            steps.append(watcher.take(begin_s, clock()))
            if not steps[-1].buckets:
                raise DistcompError("no gradient came out of a step; let it call the model and backward()")
    return watcher.means(steps[WARM_UP:])


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
