"""A step of an FSDP2 model without communication: what is gathered and reduced, in what order, and when.

Observed on one rank, where FSDP sends nothing. What it would gather or reduce on any number of ranks follows
from the whole parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.attaching.fsdp_rows import padded_shard
from distcomp.attaching.observe import WARM_UP, only_rank
from distcomp.attaching.slices import slice_in
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.reduce_scatter import owned_layout
from distcomp.private_torch import NO_BACKWARD, FSDPExchange, backward_number, fsdp_exchanges


@dataclass(frozen=True)
class ShardedCall:
    """FSDP gathers or reduces a flat buffer: ``kind`` is ``gather`` or ``reduce``."""

    kind: str
    layout: Layout
    """Whole parameters, in the order of the buffer."""
    dtype: torch.dtype
    in_backward: bool
    device: str

    @property
    def name(self) -> str:
        """That of the buffer's first parameter."""
        return self.layout.names[0]

    def shard(self, shards: int) -> Layout:
        """What one of ``shards`` ranks has of the buffer: each parameter's rows, padded to the most that a
        rank has."""
        return padded_shard(self.layout, shards)

    def owned(self, shards: int) -> Layout:
        """The whole buffer, padded: a nameless piece for each rank."""
        return owned_layout(self.name, shards * self.shard(shards).numel, shards)


@dataclass(frozen=True)
class ObservedShardedSteps:
    """What FSDP calls in a step and when, in seconds of computing after the step's start, of which the
    optimizer's are ``optimizer_s``: on one rank it steps on all weights, on ``n`` each on a part."""

    calls: tuple[ShardedCall, ...]
    begin_s: tuple[float, ...]
    step_s: float
    optimizer_s: float

    def __post_init__(self) -> None:
        if not any(call.kind == "reduce" for call in self.calls):
            raise DistcompError(
                "no gradient of an FSDP2 model was reduced in a step; let every step be a forward, a "
                "backward and the optimizer"
            )

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """What is reduced."""
        return tuple(call.layout for call in self.calls if call.kind == "reduce")

    @cached_property
    def ready_s(self) -> tuple[float, ...]:
        """When each of it was there."""
        pairs = zip(self.calls, self.begin_s, strict=True)
        return tuple(moment_s for call, moment_s in pairs if call.kind == "reduce")

    @property
    def overlaps(self) -> bool:
        """Whether FSDP's streams let collectives pass beside computing: on a GPU, not on the CPU."""
        return any(call.device != "cpu" for call in self.calls)

    def on(self, shards: int) -> ObservedShardedSteps:
        """As a step computes on one of ``shards`` ranks."""
        spared_s = self.optimizer_s * (1 - 1 / shards)
        return replace(self, step_s=self.step_s - spared_s, optimizer_s=self.optimizer_s - spared_s)


class ShardWatcher:
    """Notes what FSDP calls, and when."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seen: list[tuple[ShardedCall, float]] = []

    def __call__(self, exchange: FSDPExchange) -> None:
        slices = (slice_in(one.module, one.name, one.shape) for one in exchange.parameters)
        in_backward = backward_number() != NO_BACKWARD
        call = ShardedCall(
            exchange.kind, Layout(tuple(slices)), exchange.dtype, in_backward, exchange.device.type
        )
        self.seen.append((call, self._clock()))


@dataclass(frozen=True)
class WatchedStep:
    """One step: what was called after how many seconds, and how long the step and its optimizer took."""

    seen: tuple[tuple[ShardedCall, float], ...]
    step_s: float
    optimizer_s: float


def observed_shards(steps: Sequence[WatchedStep]) -> ObservedShardedSteps:
    """The mean of some steps. Raises DistcompError where they do not call the same."""
    calls = tuple(call for call, _ in steps[0].seen)
    if any(tuple(call for call, _ in step.seen) != calls for step in steps):
        raise DistcompError(
            "FSDP does not gather and reduce the same in each step, so that there is no step to predict; let "
            "every step be one forward and one backward through the whole model"
        )
    begin_s = zip(*([moment_s for _, moment_s in step.seen] for step in steps), strict=True)
    return ObservedShardedSteps(
        calls,
        tuple(map(statistics.fmean, begin_s)),
        statistics.fmean(step.step_s for step in steps),
        statistics.fmean(step.optimizer_s for step in steps),
    )


def observe_shards_alone(
    module: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> ObservedShardedSteps:
    """Means over ``repeats`` steps of a copy of a plain module, in a process that is no rank of anything.
    Every part that has parameters of its own is wrapped by ``fully_shard``, and so is the whole.

    Raises DistcompError where there is a process group already.
    """
    with only_rank(), fsdp_exchanges(watcher := ShardWatcher(clock)):
        model = _wrapped(deepcopy(module))
        stepper, (inputs, targets) = optimizer(model.parameters()), batch
        steps = []
        for _ in range(WARM_UP + repeats):
            watcher.seen.clear()
            begin_s = clock()
            stepper.zero_grad()
            loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            stepping_s = clock()
            stepper.step()
            end_s = clock()
            seen = tuple((call, moment_s - begin_s) for call, moment_s in watcher.seen)
            steps.append(WatchedStep(seen, end_s - begin_s, end_s - stepping_s))
    return observed_shards(steps[WARM_UP:])


def _wrapped(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (1,))
    parts = [part for part in model.modules() if part is not model and list(part.parameters(recurse=False))]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model
