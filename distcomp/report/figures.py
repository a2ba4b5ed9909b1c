"""From records to the figures that are shown. Nothing here knows how they will look.

Per run: what one step of one rank took and sent. Per method: mean and spread of its runs, and how much sooner
than DistributedDataParallel it reaches a fixed test loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distcomp.errors import DistcompError
from distcomp.recording import Record, Run, measured

BASELINE = "ddp"
CONTROLS = ("none",)
CURVES = ("test_loss", "test_accuracy", "pruned")
"""What is logged of an evaluation and drawn by itself."""
PHASES = ("encode", "recode", "wait", "decode")
TARGET_MARGIN = 0.05
"""The default target is the baseline's final test loss plus this share of it: room for chance."""


@dataclass(frozen=True)
class Point:
    """What an evaluation found, after so many seconds of training and bytes sent by rank 0."""

    train_s: float
    sent_bytes: float
    test_loss: float | None
    test_accuracy: float | None
    pruned: float | None = None
    """The share of pruned weights, of those that may be pruned."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Whatever else was logged as a number, by its name."""


@dataclass(frozen=True)
class Figures:
    """One run in numbers: bytes of a rank in a step, seconds of rank 0. What was not recorded is None."""

    method: str
    seed: Any
    steps: int
    payload_bytes: float | None
    """By the ledger: mean over ranks and steps."""
    wire_bytes: float | None
    """By the kernel's queue counters, headers and retransmissions included: mean over ranks and steps."""
    predicted_wire_bytes: float | None
    step_s: float | None
    """Median. Times are those of rank 0, which evaluates between steps while the others already wait in the
    next one; they leave out its first step, in which buckets are built."""
    exchange_s: float | None
    """From the first encode to the last decode: median."""
    starting_s: float | None
    """What the first step took longer than the median: buckets are built, memory is touched, kernels are
    loaded. It is left out of all seconds to a loss."""
    spent_s: dict[str, float] | None
    """Where the mean step's time went: ``compute``, and of each phase what computation did not hide."""
    curve: tuple[Point, ...]
    unread: tuple[str, ...] = ()
    """Names of what was logged and is no number."""

    @property
    def test_loss(self) -> float | None:
        """At the end. Not a number if training diverged."""
        return next((point.test_loss for point in reversed(self.curve) if point.test_loss is not None), None)

    @property
    def test_accuracy(self) -> float | None:
        """At the end."""
        accuracies = (point.test_accuracy for point in reversed(self.curve))
        return next((accuracy for accuracy in accuracies if accuracy is not None), None)

    def reached(self, target_loss: float) -> Point | None:
        """The first evaluation at or below the target; a loss that is not finite is at none."""
        below = (p for p in self.curve if p.test_loss is not None and -math.inf < p.test_loss <= target_loss)
        return next(below, None)


@dataclass(frozen=True)
class Spread:
    """The mean of a method's runs and their sample standard deviation (0 for one run)."""

    mean: float
    deviation: float = 0.0


@dataclass(frozen=True)
class MethodRow:
    """One method: all its runs in this comparison."""

    method: str
    runs: tuple[Figures, ...]
    to_target_s: Spread | None
    """None unless every run got there."""
    reached: int
    """How many runs got there."""
    speed_up: float | None
    """The baseline's mean seconds to the target over this method's."""

    def spread(self, name: str) -> Spread | None:
        """Mean and spread of a figure over the runs, None where a run lacks it."""
        return spread_of(getattr(run, name) for run in self.runs)

    def spent_s(self) -> dict[str, float] | None:
        """Where the time of the mean step went, over all runs."""
        splits = [run.spent_s for run in self.runs if run.spent_s is not None]
        if len(splits) < len(self.runs):
            return None
        return {part: statistics.fmean(split[part] for split in splits) for part in splits[0]}


@dataclass(frozen=True)
class Comparison:
    """Runs of the same script on the same network, side by side."""

    runs: tuple[Run, ...]
    rows: tuple[MethodRow, ...]
    target_loss: float | None
    target_given: bool = False

    @cached_property
    def baseline(self) -> MethodRow | None:
        """The rows' DistributedDataParallel, if it is there."""
        return next((row for row in self.rows if row.method == BASELINE), None)

    @cached_property
    def best(self) -> MethodRow | None:
        """The method that reaches the target soonest, controls left out."""
        able = [row for row in self.rows if row.to_target_s and row.method not in (*CONTROLS, BASELINE)]
        return min(able, key=lambda row: row.to_target_s.mean if row.to_target_s else math.inf, default=None)


def compare(runs: Sequence[Run], target_loss: float | None = None) -> Comparison:
    """Group the runs by method, in the order given, and hold each against the baseline.

    ``target_loss=None`` takes the baseline's mean final test loss plus 5 %.

    Raises DistcompError where there is no run, or where runs are not comparable: another script, network or
    number of ranks.
    """
    if not runs:
        raise DistcompError("there is no run to report; name the directory of one")
    _check_comparable(runs)
    grouped: dict[str, list[Figures]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(figures(run))
    target = _default_target(grouped.get(BASELINE, [])) if target_loss is None else target_loss
    baseline_s = _to_target(grouped.get(BASELINE, []), target)
    rows = tuple(_row(method, tuple(group), target, baseline_s) for method, group in grouped.items())
    return Comparison(tuple(runs), rows, target, target_loss is not None)


def figures(run: Run) -> Figures:
    """What one run comes to."""
    steps = [run.of_kind("step", rank) for rank in run.ranks]
    first, *rest = run.of_kind("step", 0) or [{}]
    later = rest or [first]
    starting_s = _starting_s(first, rest)
    metrics = run.of_kind("metric")
    return Figures(
        method=run.method,
        seed=run.about.get("seed"),
        steps=max((len(rank) for rank in steps), default=0),
        payload_bytes=mean_of_known(step.get("payload_bytes") for rank in steps for step in rank),
        wire_bytes=mean_of_known(mean_of_known(_counted(rank)) for rank in steps),
        predicted_wire_bytes=mean_of_known(
            step.get("predicted_wire_bytes") for rank in steps for step in rank
        ),
        step_s=median(step.get("step_s") for step in later),
        exchange_s=median(step.get("exchange_s") for step in later),
        starting_s=starting_s,
        spent_s=_spent(later),
        curve=tuple(_curve(run.ranks.get(0, ()), starting_s or 0.0, first.get("step_s") or 0.0)),
        unread=tuple(
            dict.fromkeys(
                name
                for record in metrics
                for name, value in record.items()
                if name != "kind" and value is not None and measured(value) is None
            )
        ),
    )


def _starting_s(first: Record, later: Sequence[Record]) -> float | None:
    usual_s = median(step.get("step_s") for step in later)
    if usual_s is None or first.get("step_s") is None:
        return None
    return max(0.0, float(first["step_s"]) - usual_s)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Of the values that were recorded, or None where none was."""
    there = [value for value in values if value is not None]
    return _fmean(there) if there else None


def _fmean(values: Sequence[float]) -> float:
    """As statistics.fmean, which refuses to add infinities of both signs: no number comes of that."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def median(values: Iterable[float | None]) -> float | None:
    """Of the values that were recorded, or None where none was."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation, None where a value is missing or there is none."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    if not known:
        return None
    centre = _fmean(known)
    if len(known) == 1 or not all(math.isfinite(value) for value in known):
        return Spread(centre)
    return Spread(centre, statistics.stdev(known))


def _counted(steps: Sequence[Record]) -> Iterator[float]:
    """What the queue counted from one step to the next. A counter that began anew is skipped."""
    for before, after in itertools.pairwise(steps):
        first, second = before.get("qdisc_bytes"), after.get("qdisc_bytes")
        if (
            after["step"] == before["step"] + 1
            and first is not None
            and second is not None
            and second >= first
        ):
            yield second - first


def _spent(steps: Sequence[Record]) -> dict[str, float] | None:
    """Compute is what remains of the step. None where a phase was not timed."""
    timed = [step for step in steps if step.get("step_s") is not None and step.get("exposed")]
    if not timed:
        return None
    parts = {
        phase: statistics.fmean(step["exposed"].get(f"{phase}_s") or 0.0 for step in timed)
        for phase in PHASES
    }
    compute = statistics.fmean(step["step_s"] for step in timed) - sum(parts.values())
    return {"compute": compute, **parts} if compute >= 0 else None


def _curve(records: Iterable[Record], starting_s: float, first_s: float) -> Iterator[Point]:
    """Evaluations in order; what the first step took longer than usual is taken off their seconds. Where the
    script logged no ``train_s``, the seconds of the steps so far stand for it."""
    sent_bytes = steps_s = 0.0
    for record in records:
        if record["kind"] == "step":
            sent_bytes += record.get("payload_bytes") or 0
            steps_s += record.get("step_s") or 0.0
        if record["kind"] != "metric":
            continue
        train_s = measured(record.get("train_s"))
        if train_s is None or not 0 <= train_s < math.inf:
            train_s = steps_s
        named = {name: value for name, logged in record.items() if (value := measured(logged)) is not None}
        others = {name: named[name] for name in named if name not in ("step", "train_s", *CURVES)}
        yield Point(
            train_s - (starting_s if train_s >= first_s else 0.0),
            sent_bytes,
            named.get("test_loss"),
            named.get("test_accuracy"),
            named.get("pruned"),
            others,
        )


def _default_target(baseline: Sequence[Figures]) -> float | None:
    final = mean_of_known(run.test_loss for run in baseline)
    return None if final is None or not math.isfinite(final) else final + TARGET_MARGIN * abs(final)


def _to_target(group: Sequence[Figures], target_loss: float | None) -> Spread | None:
    if target_loss is None:
        return None
    points = [run.reached(target_loss) for run in group]
    return spread_of(None if point is None else point.train_s for point in points)


def _row(
    method: str, runs: tuple[Figures, ...], target: float | None, baseline_s: Spread | None
) -> MethodRow:
    mine = _to_target(runs, target)
    reached = 0 if target is None else sum(run.reached(target) is not None for run in runs)
    faster = baseline_s.mean / mine.mean if mine and baseline_s and mine.mean > 0 else None
    return MethodRow(method, runs, mine, reached, faster)


def _check_comparable(runs: Sequence[Run]) -> None:
    for what, read in (
        ("number of ranks", _ranks),
        ("script", _script),
        ("network", network_asked),
        ("fabric", _fabric),
    ):
        first = read(runs[0])
        for run in runs:
            if read(run) != first:
                raise DistcompError(
                    f"{runs[0].directory} and {run.directory} differ in their {what} ({first}; {read(run)}), "
                    "so their figures cannot stand side by side; report them one by one"
                )


def _ranks(run: Run) -> object:
    return run.about.get("ranks")


def _script(run: Run) -> object:
    return Path((run.about.get("argv") or ["unknown"])[0]).name


def _fabric(run: Run) -> object:
    return (run.about.get("network") or {}).get("fabric")


def network_asked(run: Run) -> object:
    """The network that was asked for, and whether packets really crossed it."""
    network = run.about.get("network") or {}
    kind = "" if network.get("real", True) else ", not real packets"
    return f"{network.get('asked', 'as it is')}{kind}"
