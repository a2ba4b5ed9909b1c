"""Which bucket size? DistributedDataParallel's buckets, predicted for every size that makes others.

Smaller buckets leave earlier, so that more of an exchange hides behind backward; larger ones are fewer
messages, each with its hops' delay and what it takes of a core. Where the two meet depends on the network,
the method and the model. The size is an argument of DistributedDataParallel's constructor, ``bucket_cap_mb``,
and nothing public changes it afterwards: it is advised and not set.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from distcomp.advice.predict import Machine, exchanges_buckets, predict
from distcomp.advice.scale import Rehearsals
from distcomp.advice.words import WORTH, milliseconds
from distcomp.attaching.observe import ObservedGradient, ObservedSteps
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.network.fabric import Fabric

MIB = 2**20
CAPS_MB = (0.5, 1, 2, 4, 8, 16, 25, 50, 100, 200)
"""The sizes that are compared, besides one bucket for all."""
DEFAULT_MB, DEFAULT_FIRST_MB = 25, 1
"""Of DistributedDataParallel without ``bucket_cap_mb``; with it, the first bucket has that size, too."""
ALIKE = 1.01
"""Of predictions that lie no further apart, the one of fewer buckets is taken."""


@dataclass(frozen=True)
class BucketPlan:
    """The buckets of a size and the moments they are ready, in seconds from a step's start. ``cap_mb`` is
    what DistributedDataParallel is given, in MiB; None: nothing."""

    cap_mb: float | None
    layouts: tuple[Layout, ...]
    ready_s: tuple[float, ...]


@dataclass(frozen=True)
class BucketRow:
    """What is predicted of a size."""

    cap_mb: float | None
    buckets: int
    step_s: float


@dataclass(frozen=True)
class BucketAdvice:
    """The sizes that make different buckets, smallest first, and a sentence."""

    method: str
    rows: tuple[BucketRow, ...]
    """The first with DistributedDataParallel's default, the last with one bucket for all."""
    now: BucketRow
    """With the buckets that the model has."""
    default: bool
    """Whether those are the default's."""
    noise: float = 0.0
    """By what share two predictions of them differ, whose exchanges were timed apart."""

    @property
    def best(self) -> BucketRow:
        """The fastest, of several alike that of the fewest buckets, of these the default's; what the model
        has, where nothing is faster by 5 % and by more than the noise."""
        fastest_s = min(row.step_s for row in self.rows)
        alike = [row for row in self.rows if row.step_s <= ALIKE * fastest_s]
        best = min(alike, key=lambda row: (row.buckets, row.cap_mb is not None, row.step_s))
        worth = max(WORTH, 1 + self.noise)
        return best if self.now.step_s >= worth * best.step_s else self.now

    @property
    def first_step_s(self) -> float:
        """DistributedDataParallel's first step has one bucket, whatever it is given, and is over after
        backward."""
        return self.rows[-1].step_s

    @property
    def sentence(self) -> str:
        """The recommendation."""
        now, best = self.now, self.best
        whose = "by default" if self.default else "now"
        if best is now:
            return (
                f"Leave bucket_cap_mb as it is: {self.method} takes {milliseconds(now.step_s)} a step in "
                f"{_buckets(now)}, and no other size is predicted to be faster by "
                f"{max(WORTH - 1, self.noise):.0%}."
            )
        told = "no bucket_cap_mb" if best.cap_mb is None else f"bucket_cap_mb={best.cap_mb:g}"
        return (
            f"Give DistributedDataParallel {told}: with {self.method} predicted {milliseconds(best.step_s)} "
            f"a step in {_buckets(best)}, instead of {milliseconds(now.step_s)} in {now.buckets} {whose}."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values; a cap of null is what the model has, among ``sizes`` the default."""
        return {
            "method": self.method, "sentence": self.sentence, "bucket_cap_mb": self.best.cap_mb,
            "now": asdict(self.now), "default": self.default, "best": asdict(self.best),
            "first_step_s": self.first_step_s, "noise": self.noise,
            "sizes": [asdict(row) for row in self.rows],
        }  # fmt: skip


def _buckets(row: BucketRow) -> str:
    return f"{row.buckets} bucket{'s' if row.buckets > 1 else ''}"


def advise_buckets(method: str, machine: Machine, fabric: Fabric, now_s: float | None = None) -> BucketAdvice:
    """Predict ``method`` with buckets of every size, timing its exchanges of each here.

    ``machine``: as :func:`~distcomp.advice.calibrate` measured it among these ranks, or another with what an
    exchange takes of a core (``Host.exchange_s``): without, many small buckets would seem to be free.
    ``now_s``: what was predicted of the buckets that the model has, where that is known. They are timed again
    in any case: by what the two differ is the noise.

    Raises DistcompError for a sharded model, for steps that were not watched gradient by gradient, and for a
    method that exchanges whole models.
    """
    observed = machine.observed
    if not isinstance(observed, ObservedSteps):
        raise DistcompError("a sharded model has no buckets; FSDP2 exchanges what fully_shard was called on")
    if not exchanges_buckets(method):
        raise DistcompError(f"{method} exchanges models after a step, and no buckets; leave it out")

    def step_s(plan: BucketPlan) -> float:
        there = replace(machine, observed=replace(observed, layouts=plan.layouts, ready_s=plan.ready_s))
        return predict(Rehearsals(method, plan.layouts).among(fabric.ranks), there, fabric).step_s

    plans, own = bucket_plans(observed), BucketPlan(None, observed.layouts, observed.ready_s)
    again_s = step_s(own)
    now = BucketRow(None, len(own.layouts), step_s(own) if now_s is None else now_s)
    rows = tuple(
        BucketRow(plan.cap_mb, len(plan.layouts), now.step_s if plan.layouts == own.layouts else step_s(plan))
        for plan in plans
    )
    noise = abs(again_s / now.step_s - 1)
    return BucketAdvice(method, rows, now, own.layouts == plans[0].layouts, noise)


def bucket_plans(observed: ObservedSteps) -> tuple[BucketPlan, ...]:
    """The default's buckets, then those of every size of :data:`CAPS_MB` that makes others than the one
    before it, up to one bucket for all (of each type of gradient)."""
    gradients = observed.gradients
    if not gradients:
        raise DistcompError("gradients were not watched one by one; use distcomp.attaching.observe.observe")
    whole_mb = math.ceil(sum(one.nbytes for one in gradients) / MIB)
    plans = [_plan(observed, None)]
    for cap_mb in (*(cap_mb for cap_mb in CAPS_MB if cap_mb < whole_mb), whole_mb):
        plan = _plan(observed, cap_mb)
        if len(plans) == 1 or plan.layouts != plans[-1].layouts:
            plans.append(plan)
    return tuple(plans)


def _plan(observed: ObservedSteps, cap_mb: float | None) -> BucketPlan:
    caps_mb = (DEFAULT_FIRST_MB, DEFAULT_MB) if cap_mb is None else (cap_mb,)
    buckets = cut(observed.gradients, [int(one * MIB) for one in caps_mb])
    layouts, ready_s, last_s = [], [], 0.0
    for bucket in buckets:  # which leave in order
        layouts.append(Layout(tuple(one.param for one in bucket)))
        last_s = max(last_s, *(one.ready_s for one in bucket))
        ready_s.append(last_s)
    # The model's own last bucket was there when all of backward was over.
    return BucketPlan(cap_mb, tuple(layouts), (*ready_s[:-1], max(last_s, observed.ready_s[-1])))


def cut(gradients: Sequence[ObservedGradient], caps_bytes: Sequence[int]) -> list[list[ObservedGradient]]:
    """Gradients in the order in which they are ready, cut as DistributedDataParallel cuts them when it
    rebuilds its buckets after the first step.

    A bucket is full as soon as it holds its cap: the first of its type ``caps_bytes[0]``, the next the next,
    and so on with the last. Gradients of different types never share one. (With
    ``find_unused_parameters=True`` it rebuilds nothing, and cuts in the order of the parameters.)
    """
    full: list[list[ObservedGradient]] = []
    filling: dict[torch.dtype, list[ObservedGradient]] = defaultdict(list)
    held_bytes, filled = defaultdict[torch.dtype, int](int), defaultdict[torch.dtype, int](int)
    for one in gradients:
        filling[one.dtype].append(one)
        held_bytes[one.dtype] += one.nbytes
        if held_bytes[one.dtype] >= caps_bytes[min(filled[one.dtype], len(caps_bytes) - 1)]:
            full.append(filling.pop(one.dtype))
            held_bytes[one.dtype] = 0
            filled[one.dtype] += 1
    return full + list(filling.values())
