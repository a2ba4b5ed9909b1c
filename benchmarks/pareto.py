"""Test loss against bytes sent, where compression and rare synchronization are said to win.

    python -m benchmarks.pareto            # hours of one core; resumes; writes results/pareto.json
    python -m benchmarks.pareto --show     # prints the tables as far as they are

A language model of 82,944 parameters on the bytes of Python's standard library (benchmarks/_library_lm.py),
eight workers, two texts of 64 bytes per worker and step, 4,000 steps, all in lock-step. Three regimes: from
``scratch``; ``trained``, after 800 steps of DDP; ``apart``, every worker with packages of its own.

The learning rate goes up over 100 steps, stays, and falls to 0 in a straight line over the last fifth of the
run. So a run can be ended at several lengths: rare rows within 4 % of DDP go on to 4,200 and 4,800 steps, and
the loss at those lengths says how many steps a row needs for DDP's final loss (a straight line in between).

Each row is tuned by one rule, in runs of 600 steps with a seed of their own, from scratch: the learning rate
is doubled or halved until both neighbours are worse, with the row's first setting; then its settings are
compared at that rate, in runs of 1,000 steps, which hold more exchanges for an outer momentum. Controls
are tuned alike. What is tested is the mean of all workers' models; where they differ at the end, one float32
average is counted. "no communication" tests the workers' own models, and has the mean of their losses.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks import _library_lm
from benchmarks._common import Cells, shows_only
from benchmarks._crowd import Oversubscription, Plan, Task
from benchmarks._library_lm import library_model
from benchmarks._pareto_rows import (
    ALONE,
    APART,
    DDP,
    INNER,
    ONLY_APART,
    RARE,
    ROWS,
    SEVERAL_SEEDS,
    TRAINED,
    Row,
)
from benchmarks._pareto_table import table, verdicts
from distcomp.methods.base import all_reduce_bytes

WORKERS, BATCH, STEPS, SEEDS = 8, 2, 4000, 3
QUARTER, LONGER, WITHIN = STEPS // 4, (4200, 4800), 1.04
WARM_UP, COOL_DOWN, BEGUN = 100, 0.2, STEPS // 5
TUNING_STEPS, SETTING_STEPS, TUNING_SEED, MOVES = 600, 1000, 100, 4
REGIMES = ("scratch", "trained", "apart")

Found = dict[str, Any]


@dataclass
class WarmUpStableDecay:
    """The share of the highest learning rate; ``ends_at`` may be told while training goes on, until a fifth
    of it is left.

    Source: Hu et al., "MiniCPM", 2024; Hägele et al., NeurIPS 2024.
    """

    ends_at: float = math.inf

    def __call__(self, step: int) -> float:
        left = (self.ends_at - step) / (COOL_DOWN * self.ends_at) if self.ends_at < math.inf else 1.0
        return max(0.0, min((step + 1) / WARM_UP, 1.0, left))


@cache
def task(regime: str) -> Task:
    return library_model(BATCH, heterogeneous=regime == "apart")


class Training:
    """A row's workers under way, with a learning rate that has no end yet."""

    def __init__(
        self,
        regime: str,
        row: Row,
        setting: str,
        rate: float,
        seed: int,
        after: Oversubscription | None = None,
    ) -> None:
        self.row, self.schedule = row, WarmUpStableDecay()
        make = INNER[row.inner]
        plan = Plan(WORKERS, STEPS, lambda rows: make(rows, rate), self.schedule, seed)
        self.crowd = Oversubscription(task(regime), plan, row.carrier(setting), after)

    def reach(self, step: int) -> bool:
        """Train up to a step; False where it diverges before."""
        while self.crowd.steps < step:
            if not self.crowd.step():
                return False
        return True

    def end(self, steps: int) -> Found:
        """What it is worth if it is ended after ``steps`` steps; more cannot follow."""
        self.schedule.ends_at = steps
        if not self.reach(steps):
            return {"diverged": self.crowd.steps}
        found = self.crowd.result()
        if not math.isfinite(found["test_loss"]):
            return {"diverged": self.crowd.steps}
        if self.row.spec == ALONE:
            return {**found, "test_loss": self.own_loss()}
        if not self.alike:
            found["sent_bytes"] += all_reduce_bytes(4 * self.crowd.layout.numel, WORKERS)
        return found

    @property
    def alike(self) -> bool:
        """Whether all workers hold the same model, bit for bit."""
        return bool((self.crowd.models == self.crowd.models[0]).all())

    def own_loss(self) -> float:
        """The mean test loss of the workers' own models."""
        return statistics.mean(self.crowd.test(model)[0] for model in self.crowd.models.detach())

    def ended(self, steps: int) -> Found:
        """As :meth:`end`, in a copy of this process: training may go on after it."""
        if not self.reach(round((1 - COOL_DOWN) * steps)):
            return {"diverged": self.crowd.steps}
        return in_a_fork(lambda: self.end(steps))


def in_a_fork(make: Callable[[], Found]) -> Found:
    """What ``make`` returns, made by a copy of this process, whose own state stays as it is."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                json.dump(make(), out)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"the copy that was to end a run failed (status {status}); see its message above")
    found: Found = json.loads(told)
    return found


def trained(training: Training, row: Row, target: float | None) -> Found:
    """One cell: the row at 4,000 steps; beyond, where it is rare and near ``target``, DDP's final loss."""
    before = _cpu_s()
    shorter = {"quarter": training.ended(QUARTER)} if row == DDP else {}
    found = {**training.ended(STEPS), **shorter}
    if row.family == RARE and target and _loss(found) <= WITHIN * target:
        found["longer"] = {str(steps): training.ended(steps) for steps in LONGER}
    return {**found, "parameters": training.crowd.layout.numel, "cpu_s": round(_cpu_s() - before, 1)}


@cache
def begun(rate: float, seed: int) -> Oversubscription:
    """Workers that DDP has trained for a fifth of the steps."""
    training = Training("scratch", DDP, "", rate, seed)
    if not training.reach(BEGUN):
        raise RuntimeError(f"DDP diverges before step {BEGUN}; lower its learning rate of {rate:g}")
    return training.crowd


def tune(row: Row, loss: Callable[[int, float, str], float]) -> tuple[float, str]:
    """Learning rate and setting by the rule above; ``loss`` is asked for what so many steps reach."""
    first, rate = row.settings[0], row.rate
    for _ in range(MOVES):
        best = min((rate, rate / 2, rate * 2), key=lambda one: loss(TUNING_STEPS, one, first))
        if best == rate:
            break
        rate = best
    if len(row.settings) == 1:
        return rate, first
    return rate, min(row.settings, key=lambda one: loss(SETTING_STEPS, rate, one))


def study(cells: Cells) -> None:
    """Fill in what is missing, what is worth most first."""

    def tuned(row: Row) -> tuple[float, str]:
        def loss(steps: int, rate: float, setting: str) -> float:
            def make() -> Found:
                return Training("scratch", row, setting, rate, TUNING_SEED).end(steps)

            return _loss(cells.get(tuning_name(row, setting, rate, steps), make))

        return tune(row, loss)

    def run(regime: str, row: Row, seed: int) -> None:
        (rate, setting), (ddp_rate, _) = tuned(row), tuned(DDP)
        ddp = cells.document["cells"].get(_name(parent_of(regime), DDP, "", ddp_rate, seed), {})

        def make() -> Found:
            after = begun(ddp_rate, seed) if regime == "trained" else None
            return trained(Training(regime, row, setting, rate, seed, after), row, ddp.get("test_loss"))

        cells.get(_name(regime, row, setting, rate, seed), make)

    for regime, row, seed in plan():
        run(regime, row, seed)
        tables = tabulate(cells.document["cells"])
        cells.document |= {"tables": tables, "met": verdicts(tables)}
        cells.write()


def plan() -> Iterator[tuple[str, Row, int]]:
    """Every cell but those of tuning, in order: a seed of the first rows, then another, then of all others; a
    row from scratch and, where it is asked for, from a trained model and with packages of each worker's
    own."""
    for rows in (ROWS[:SEVERAL_SEEDS], (*ROWS[SEVERAL_SEEDS:], *ONLY_APART)):
        for seed in range(SEEDS):
            for row in rows:
                yield from ((regime, row, seed) for regime in REGIMES if row in rows_of(regime))


def parent_of(regime: str) -> str:
    """Where DDP is that a regime is held against: it trains on from a trained model as it does from none."""
    return "apart" if regime == "apart" else "scratch"


def rows_of(regime: str) -> tuple[Row, ...]:
    """A regime's rows, in the order of :data:`ROWS`."""
    if regime == "scratch":
        return ROWS
    named, besides = (APART, ONLY_APART) if regime == "apart" else (TRAINED, ())
    return (*(row for row in ROWS if row.name in named), *besides)


def tabulate(cells: dict[str, Found]) -> dict[str, dict[str, Found]]:
    """Every regime's table, as far as its cells are there."""

    def chosen(row: Row) -> tuple[float, str] | None:
        try:
            return tune(
                row, lambda steps, rate, setting: _loss(cells[tuning_name(row, setting, rate, steps)])
            )
        except KeyError:
            return None

    def runs(regime: str, row: Row) -> dict[int, Found]:
        choice = chosen(row)
        if choice is None:
            return {}
        rate, setting = choice
        named = {seed: _name(regime, row, setting, rate, seed) for seed in range(SEEDS)}
        return {seed: cells[name] for seed, name in named.items() if name in cells}

    tables = {}
    for regime in REGIMES:
        rows = {row.name: (row, runs(regime, row)) for row in rows_of(regime)}
        found = table(rows, runs(parent_of(regime), DDP), STEPS, BEGUN if regime == "trained" else 0)
        for name in found.keys() & rows.keys():
            row = rows[name][0]
            rate, setting = chosen(row) or (row.rate, "")
            found[name] |= {"spec": row.text(setting), "inner": row.inner, "rate": rate}
        tables[regime] = found
    return tables


def tuning_name(row: Row, setting: str, rate: float, steps: int) -> str:
    """The cell of a run that tunes a row."""
    regime = "tuning" if steps == TUNING_STEPS else f"tuning, {steps} steps"
    return _name(regime, row, setting, rate, TUNING_SEED)


def _name(regime: str, row: Row, setting: str, rate: float, seed: int) -> str:
    return f"{regime} | {row.inner} | {row.text(setting)} | rate {rate:g} | seed {seed}"


def _loss(found: Found) -> float:
    return float(found.get("test_loss", math.inf))


def _cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    about = {
        "task": "bytes of Python's standard library, transformer of 82,944 parameters",
        "text": _library_lm.fingerprint(), "workers": WORKERS, "steps": STEPS, "seeds": SEEDS,
        "batch": f"{BATCH} texts of {_library_lm.CONTEXT} bytes per worker",
        "tuning": f"{TUNING_STEPS} steps, seed {TUNING_SEED}, rates by factors of 2, then settings",
        "longer": list(LONGER), "begun": BEGUN,
    }  # fmt: skip
    cells = Cells("pareto", about)
    if not show_only:
        study(cells)
    for regime, rows in tabulate(cells.document["cells"]).items():
        for name, row in rows.items():
            fewer, off = row.get("times_fewer_bytes") or math.inf, 100 * (row.get("relative_loss", 0) - 1)
            more = row.get("more_steps", "")
            print(f"{regime:<8}{name:<50}{row['seeds']}{off:+8.2f} %{fewer:10,.0f} x fewer bytes  {more}")


if __name__ == "__main__":
    main()
