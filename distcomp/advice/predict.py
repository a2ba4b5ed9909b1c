"""From a method, a machine and a network to the seconds of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distcomp.advice.overlap import StepTime, Timing, averaging_step, gradient_step, sharded_step
from distcomp.advice.profile import ProfiledExchange, ProfiledRound, clock, exchanges_of, profiles_of
from distcomp.attaching.observe import ObservedSteps
from distcomp.attaching.observe_shards import ObservedShardedSteps
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.codistill import Codistillation, predictions_layout
from distcomp.builtin_hooks import BUILTIN_HOOKS
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.network.request_sizes import RequestSizes

PREDICTED_HOOKS = {
    hook.name: hook.bytes_per_value for hook in BUILTIN_HOOKS.values() if hook.bytes_per_value is not None
}
"""PyTorch's own reductions that are predicted, and the bytes they send of each value."""


@dataclass(frozen=True)
class Machine:
    """What was measured of a model on a machine, and what its ranks share. ``slowness``: of computing,
    against when it was measured."""

    observed: ObservedSteps | ObservedShardedSteps
    host: Host = ALONE
    slowness: float = 1.0

    @property
    def timing(self) -> Timing:
        """A step without communication."""
        return Timing(self.observed.ready_s, self.observed.step_s).times(self.slowness)


@dataclass(frozen=True)
class SharedCost:
    """Of ``count`` shared examples, as they were measured: the ``outputs`` of one, ``[1, ..., classes]``, and
    the seconds of a row in a forward, and in a forward with its backward."""

    outputs: Tensor
    count: int
    forward_s: float
    step_s: float


@dataclass(frozen=True)
class ProfiledMethod:
    """A method as it was profiled among ``ranks``, on this machine alone."""

    method: str
    ranks: int
    profiles: tuple[ProfiledExchange, ...]
    averages: bool = False
    shards: int = 1
    """Of how many ranks each holds a part of the model."""


@dataclass(frozen=True)
class Prediction(StepTime):
    """Seconds of a step, and the bytes each rank sends in one."""

    sent_bytes: float = field(default=0.0)


def exchanges_buckets(method: str) -> bool:
    """Whether a method exchanges gradients, bucket by bucket, and not models after a step."""
    return method in PREDICTED_HOOKS or isinstance(parse(method), Method)


def profile_method(
    method: str, layouts: Sequence[Layout], ranks: int, shared: SharedCost | None = None
) -> ProfiledMethod:
    """Run the method's exchanges of these buckets on this machine, timed.

    ``shared``: what shared examples cost, for codistillation, whose exchange is about them.

    Raises DistcompError for codistillation without it.
    """
    if method in PREDICTED_HOOKS:
        return ProfiledMethod(method, ranks, tuple(_hook_exchange(method, layout) for layout in layouts))
    parsed = parse(method)
    if isinstance(parsed, Codistillation):
        return ProfiledMethod(method, ranks, _codistillation(parsed, ranks, shared), averages=True)
    if isinstance(parsed, Averaging | MultiLevel):
        model = Layout(tuple(param for layout in reversed(layouts) for param in layout.slices))
        return ProfiledMethod(method, ranks, exchanges_of(parsed, model, ranks), averages=True)
    assert isinstance(parsed, Method)
    return ProfiledMethod(method, ranks, profiles_of(parsed, layouts, ranks))


def predict(profiled: ProfiledMethod, machine: Machine, fabric: Fabric) -> Prediction:
    """The step time of a method that was profiled among as many ranks as the fabric has."""
    profiles, observed = profiled.profiles, machine.observed
    if isinstance(observed, ObservedShardedSteps):
        time_ = sharded_step(observed.on(profiled.shards), profiles, fabric, machine.host, machine.slowness)
    elif profiled.averages:
        time_ = averaging_step(machine.timing, profiles, fabric, machine.host, machine.slowness)
    else:
        if profiled.method in PREDICTED_HOOKS:
            profiles = around_a_ring(profiles)
        time_ = gradient_step(machine.timing, profiles, fabric, machine.host, machine.slowness)
    sent = sum(
        profile.share * round_.ask.sent_bytes(fabric.ranks)
        for profile in profiles
        for round_ in profile.rounds
    )
    return Prediction(**vars(time_), sent_bytes=sent)


def _codistillation(
    parsed: Codistillation, ranks: int, shared: SharedCost | None
) -> tuple[ProfiledExchange, ...]:
    """The exchange of predictions, with the forward that makes them; and in every step the agreement term's
    forward and backward."""
    if shared is None or not parsed.own_models:
        raise DistcompError(
            "what codistill sends and computes depends on the shared examples; let the script define "
            "training_task(arguments) that returns a TrainingTask with shared=examples "
            "(exchanged=checkpoints is not predicted)"
        )
    rows = parsed.check_rows(shared.count)
    (exchange,) = exchanges_of(parsed, predictions_layout(rows, shared.outputs), ranks)
    exchange = replace(exchange, last_s=exchange.last_s + rows * shared.forward_s)
    batch = min(parsed.batch, rows)
    return exchange, ProfiledExchange((), batch * shared.step_s)


def around_a_ring(profiles: Sequence[ProfiledExchange]) -> tuple[ProfiledExchange, ...]:
    """The exchanges with every sum around a ring, however small: PyTorch's own know no other way."""
    return tuple(
        replace(
            profile,
            rounds=tuple(
                replace(round_, ask=replace(round_.ask, kind="ring_all_reduce")) for round_ in profile.rounds
            ),
        )
        for profile in profiles
    )


def _hook_exchange(method: str, layout: Layout) -> ProfiledExchange:
    """One sum of a bucket, multiplied by 1/n, and cast where that is what the hook does."""
    bucket, times_s = torch.randn(layout.numel, dtype=torch.float32), []
    for _ in range(7):
        begin_s = clock()
        sent = bucket.half() if method == "torch:fp16" else bucket
        sent.mul_(0.5)
        times_s.append(clock() - begin_s)
    return ProfiledExchange(
        (
            ProfiledRound(
                statistics.median(times_s),
                RequestSizes("all_reduce", (PREDICTED_HOOKS[method] * layout.numel,)),
            ),
        ),
        0.0,
    )
