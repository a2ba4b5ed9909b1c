"""Which method, on this network, for this model? Or none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from distcomp.advice.buckets import BucketAdvice, advise_buckets
from distcomp.advice.memory import NotFitting, format_size, state_bytes
from distcomp.advice.overlap import EXCHANGE_CORE_S
from distcomp.advice.predict import Machine, Prediction, SharedCost, exchanges_buckets, predict
from distcomp.advice.profile import clock
from distcomp.advice.scale import Rehearsals, ShardedRehearsals
from distcomp.advice.script import ObservedTwice
from distcomp.advice.sharded import ACROSS, PLAIN, SETTINGS, Placement
from distcomp.advice.task import TrainingTask
from distcomp.advice.words import WORTH, milliseconds
from distcomp.attaching.observe import ObservedSteps, observe_alone
from distcomp.attaching.observe_shards import ObservedShardedSteps, observe_shards_alone
from distcomp.errors import DistcompError
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.network.units import format_rate
from distcomp.process_memory import peak_bytes

METHODS = (
    "ddp", "bf16", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=1", "powersgd:rank=4", "topk:ratio=0.01",
    "lossless:inner=(qsgd:bits=4)",
)  # fmt: skip
BASELINES = {"ddp": "plain DDP", PLAIN: "plain FSDP2"}

SLOWEST_BPS, FASTEST_BPS, PER_DECADE = 1e6, 1e12, 10
SCALES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class AdviceRow:
    """What is predicted of a method. ``break_even_bps``: the rate of every link from which on it is slower
    than plain DDP; inf where it never is, 0 where it always is. ``efficiency``: computing's share of a step,
    by number of ranks."""

    method: str
    prediction: Prediction
    speed_up: float
    break_even_bps: float
    efficiency: dict[int, float]


@dataclass(frozen=True)
class Advice:
    """The methods, fastest first, and a sentence."""

    rows: tuple[AdviceRow, ...]
    fabric: Fabric
    compute_s: float
    parameters: int
    curves: dict[str, list[tuple[float, float]]]
    """Method -> (rate of every link, seconds of a step)."""
    noise: float = 0.0
    """By what share two measurements on this machine disagree about how much faster a method is: the most."""
    baseline: str = "ddp"
    refused: tuple[NotFitting, ...] = ()
    """What does not fit in the memory that was given."""
    buckets: BucketAdvice | None = None
    """In which buckets the recommended method would exchange; None where it has none."""

    @property
    def best(self) -> AdviceRow:
        """The fastest, or the baseline where nothing is faster by 5 % and by more than the noise."""
        baseline = next(row for row in self.rows if row.method == self.baseline)
        return self.rows[0] if self.rows[0].speed_up >= max(WORTH, 1 + self.noise) else baseline

    @property
    def sentence(self) -> str:
        """The recommendation."""
        step, fastest = milliseconds(self.best.prediction.step_s), self.rows[0]
        plain = BASELINES[self.baseline]
        if self.best.method == self.baseline and fastest.speed_up >= WORTH:
            return (
                f"Nothing is recommended: {fastest.method} is predicted {fastest.speed_up:.2f} times as fast "
                f"as {plain}, and two measurements on this machine differ by {self.noise:.0%}. Try again "
                "when nothing else runs on it."
            )
        if self.best.method == self.baseline:
            return (
                f"Do not compress: {plain} takes {step} a step, and nothing here is faster by "
                f"{WORTH - 1:.0%}."
            )
        even = self.best.break_even_bps
        until = f"below {_rate(even)} per link" if even < math.inf else "at any rate"
        return (
            f"Use {self.best.method}: {step} a step, {self.best.speed_up:.3g} times {plain}'s speed, give "
            f"or take {self.noise:.0%}; it wins {until}. Compare test losses before you trust it: distcomp "
            "emulate."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values; infinite rates as null."""
        rows = [{**asdict(row), "break_even_bps": _finite(row.break_even_bps)} for row in self.rows]
        return {
            "recommended": self.best.method, "sentence": self.sentence, "fabric": self.fabric.to_toml(),
            "compute_s": self.compute_s, "parameters": self.parameters, "methods": rows,
            "curves": self.curves, "noise": self.noise,
            "refused": [{**asdict(one), "sentence": one.sentence} for one in self.refused],
            "buckets": self.buckets.as_json() if self.buckets is not None else None,
        }  # fmt: skip


def advise(
    trained: TrainingTask | ObservedTwice,
    fabric: Fabric,
    methods: Sequence[str] = (),
    host: Host = ALONE,
    tell: Callable[[str], object] = lambda _: None,
    shards: int | None = None,
    memory_bytes: int | None = None,
) -> Advice:
    """Some real steps of the model, and every method's exchange, timed here twice; then the model of the
    network. The figures are those of the faster time, and what the two differ by is the noise.

    ``trained`` is a training task, or what was observed of a script's own loop. ``host``: how many ranks
    share a machine like this one, and its cores. ``tell`` is called with the progress. Of FSDP2, ``methods``
    are settings (:mod:`distcomp.advice.sharded`), and ``shards`` how many ranks hold a model together, all of
    them where it is not said; a training task is sharded only where it is.

    ``memory_bytes``: of each rank. A method is refused where what a step took here at its peak (the process,
    or a GPU's memory) and the state that the method keeps are more.

    Raises DistcompError for shards of a model that is not sharded, or that do not divide the ranks; where
    plain DDP does not fit in the memory; for a memory of a sharded model.
    """
    first, again, shared = _twice(trained, fabric, shards, tell)
    if shards is not None:
        Placement.of(fabric.ranks, shards)
    shards = None if shards == fabric.ranks else shards
    compared, refused = _fitting(_compared(methods, first, shards), first, fabric.ranks, memory_bytes)
    machine, second = _machine(first, host), _machine(again, host)
    rehearsals, repeated, rows = [], [], []
    for at, method in enumerate(compared, start=1):
        tell(f"[{at}/{len(compared)}] timing {method}")
        rehearsals.append(_rehearsals(method, first, shared, shards))
        repeatedly = _rehearsals(method, again, shared, shards).among(fabric.ranks)
        repeated.append(predict(repeatedly, second, fabric).step_s)
    baseline = rehearsals[0]
    scales = SCALES if shards is None else ()
    for at, rehearsed in enumerate(rehearsals, start=1):
        tell(f"[{at}/{len(compared)}] predicting {rehearsed.method}")
        rows.append(_row(rehearsed, baseline, machine, fabric, scales))
    plain_s = repeated[0]
    noise = max(abs(plain_s / step_s / row.speed_up - 1) for row, step_s in zip(rows, repeated, strict=True))
    rates = [SLOWEST_BPS * 10 ** (i / PER_DECADE) for i in range(6 * PER_DECADE + 1)]
    curves = {
        rehearsed.method: [(bps, _at_rate(rehearsed, machine, fabric, bps)) for bps in rates]
        for rehearsed in rehearsals
    }
    advice = Advice(
        tuple(sorted(rows, key=lambda row: row.prediction.step_s)),
        fabric,
        machine.timing.step_s,
        sum(layout.numel for layout in first.layouts),
        curves,
        noise,
        baseline.method,
        refused,
    )
    return replace(advice, buckets=_buckets(advice, machine, tell))


def _machine(observed: Steps, host: Host) -> Machine:
    """What was observed on this machine, alone. What an exchange takes was not: it is known of others. (A
    sharded step counts it by itself.)"""
    if isinstance(observed, ObservedSteps):
        host = replace(host, exchange_s=EXCHANGE_CORE_S)
    return Machine(observed, host, host.oversubscription)


def _buckets(advice: Advice, machine: Machine, tell: Callable[[str], object]) -> BucketAdvice | None:
    """Of the recommended method, if gradients leave in buckets."""
    observed, best = machine.observed, advice.best
    if (
        not isinstance(observed, ObservedSteps)
        or not observed.gradients
        or not exchanges_buckets(best.method)
    ):
        return None
    tell(f"comparing bucket sizes of {best.method}")
    return advise_buckets(best.method, machine, advice.fabric, best.prediction.step_s)


Steps = ObservedSteps | ObservedShardedSteps


def _twice(
    trained: TrainingTask | ObservedTwice, fabric: Fabric, shards: int | None, tell: Callable[[str], object]
) -> tuple[Steps, Steps, SharedCost | None]:
    """Two measurements, the faster first, and what shared examples cost."""
    shared = None
    both: ObservedTwice
    if isinstance(trained, TrainingTask):
        tell("timing steps of the model")
        if shards is not None:
            both = _observed_shards(trained, fabric), _observed_shards(trained, fabric)
        else:
            shared = _shared_cost(trained)
            both = _observed(trained, fabric), _observed(trained, fabric)
    else:
        both = trained
    faster, slower = both if both[0].step_s <= both[1].step_s else both[::-1]
    if shards is not None and isinstance(faster, ObservedSteps):
        raise DistcompError(
            "shards are an FSDP2 model's, and the script's is a DistributedDataParallel; leave --shards out"
        )
    return faster, slower, shared


def _compared(methods: Sequence[str], observed: Steps, shards: int | None) -> list[str]:
    """What is compared, the baseline first."""
    if isinstance(observed, ObservedShardedSteps):
        return list(dict.fromkeys((PLAIN, *(methods or (SETTINGS if shards is None else ACROSS)))))
    for method in methods:
        if method == PLAIN or " weights=" in method:
            raise DistcompError(
                f"{method} is of an FSDP2 model, and this one is not sharded; leave it out, or give --shards"
            )
    return list(dict.fromkeys(("ddp", *(methods or METHODS))))


def _rehearsals(method: str, observed: Steps, shared: SharedCost | None, shards: int | None) -> Rehearsals:
    if isinstance(observed, ObservedShardedSteps):
        return ShardedRehearsals(method, observed, shards)
    return Rehearsals(method, observed.layouts, shared)


def _observed_shards(training_task: TrainingTask, fabric: Fabric) -> ObservedShardedSteps:
    batch = training_task.batch(0, fabric.ranks, 0)
    return observe_shards_alone(training_task.model, batch, training_task.loss, training_task.optimizer)


def _fitting(
    methods: list[str], observed: Steps, ranks: int, memory_bytes: int | None
) -> tuple[list[str], tuple[NotFitting, ...]]:
    """The methods that fit, and those that do not. A step was measured with gradients in place, so that what
    a method adds is its state."""
    if memory_bytes is None:
        return methods, ()
    if isinstance(observed, ObservedShardedSteps):
        raise DistcompError("what a sharded model's ranks keep is not predicted; leave --memory out")
    step_bytes = peak_bytes()
    needs = {
        method: sum(state_bytes(method, layout, ranks) for layout in observed.layouts) for method in methods
    }
    refused = tuple(
        NotFitting(method, step_bytes, kept, memory_bytes)
        for method, kept in needs.items()
        if step_bytes + kept > memory_bytes
    )
    if any(one.method == methods[0] for one in refused):
        raise DistcompError(
            f"not even plain DDP fits: a step takes {format_size(step_bytes)} here, and there are "
            f"{format_size(memory_bytes)}; make the batch smaller, or shard the model (fully_shard)"
        )
    gone = {one.method for one in refused}
    return [method for method in methods if method not in gone], refused


def _observed(training_task: TrainingTask, fabric: Fabric) -> ObservedSteps:
    batch = training_task.batch(0, fabric.ranks, 0)
    return observe_alone(training_task.model, batch, training_task.loss, training_task.optimizer)


def _shared_cost(training_task: TrainingTask, repeats: int = 5) -> SharedCost | None:
    """What the shared examples of a task cost, if it has any: the medians of some forwards and backwards."""
    if training_task.shared is None:
        return None
    model, examples = deepcopy(training_task.model), training_task.shared[:64]
    forwards_s, steps_s = [], []
    for _ in range(repeats + 2):
        begin_s = clock()
        with torch.no_grad():
            outputs = model(examples)
        middle_s = clock()
        model(examples).float().square().mean().backward()
        forwards_s.append((middle_s - begin_s) / len(examples))
        steps_s.append((clock() - middle_s) / len(examples))
    forward_s, step_s = (statistics.median(times_s[2:]) for times_s in (forwards_s, steps_s))
    return SharedCost(outputs[:1], len(training_task.shared), forward_s, step_s)


def _row(
    rehearsed: Rehearsals,
    baseline: Rehearsals,
    machine: Machine,
    fabric: Fabric,
    scales: Sequence[int] = SCALES,
) -> AdviceRow:
    prediction = predict(rehearsed.among(fabric.ranks), machine, fabric)
    plain = predict(baseline.among(fabric.ranks), machine, fabric)
    efficiency = {}
    for ranks in scales:
        try:
            there, profiled = fabric.of(ranks), rehearsed.among(ranks)
        except DistcompError:  # ranks that are not alike, or all exchange with all: nothing is said of more
            break
        efficiency[ranks] = machine.timing.step_s / predict(profiled, machine, there).step_s
    even = math.inf if rehearsed is baseline else break_even_bps(rehearsed, baseline, machine, fabric)
    return AdviceRow(rehearsed.method, prediction, plain.step_s / prediction.step_s, even, efficiency)


def break_even_bps(rehearsed: Rehearsals, baseline: Rehearsals, machine: Machine, fabric: Fabric) -> float:
    """The highest rate of every link (uplinks in proportion) at which the method is faster; to 1 %.

    0 where it is slower at 1 Mbit/s, too; inf where it is faster at 1 Tbit/s, still.
    """

    def faster(bps: float) -> bool:
        return _at_rate(rehearsed, machine, fabric, bps) < _at_rate(baseline, machine, fabric, bps)

    if faster(FASTEST_BPS):
        return math.inf
    rates = [SLOWEST_BPS * 10 ** (i / 2) for i in range(13)]
    below = [bps for bps in rates if faster(bps)]
    if not below:
        return 0.0
    low, high = below[-1], below[-1] * 10**0.5
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if faster(middle) else (low, middle)
    return low


def _at_rate(rehearsed: Rehearsals, machine: Machine, fabric: Fabric, bps: float) -> float:
    return predict(rehearsed.among(fabric.ranks), machine, at_rate(fabric, bps)).step_s


def at_rate(fabric: Fabric, bps: float) -> Fabric:
    """The fabric with its fastest link at ``bps`` and all others in proportion; unshaped ones stay so."""
    finite = [rate for rate in fabric.rates_bps if rate < math.inf]
    factor = bps / max(finite) if finite else 1.0
    rates = tuple(bps if rate == math.inf else rate * factor for rate in fabric.rates_bps)
    racks = tuple(replace(rack, uplink_bps=rack.uplink_bps * factor) for rack in fabric.racks)
    return Fabric(rates, fabric.delay_s, racks)


def _rate(bps: float) -> str:
    return format_rate(float(f"{bps:.2g}"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
