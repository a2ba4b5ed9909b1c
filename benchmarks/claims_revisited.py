"""Claims of papers that our tables did not show, each put once more where it should hold, or fail.

    python -m benchmarks.claims_revisited          # half an hour of one core; resumes
    python -m benchmarks.claims_revisited --show   # prints what is there

Writes results/claims_revisited.json. Eight workers in lock-step unless a run says otherwise; rates go up over
a tenth of the steps and down in a half cosine. Two tasks:

*text*: the language model of pareto.py (82,944 parameters), from where DDP brings it in 400 steps of two
texts per worker; then 400 steps with 1 to 8 texts per worker, one seed. Is an exchange every 25 steps
worse than DDP because a worker's own batch is small? The gap to DDP with as many texts, each row at the
better of the learning rates that are there (of two, where the study went on to its end); beside it two
controls, both from one run without any exchange, and the gradient noise scale (McCandlish et al., 2018): the
batch in which noise and gradient are as large.

*digits*: the digit pairs of relatives.py and decentralized_table.py, with their optimizers and rates, where
an explanation had no experiment: more steps, fewer workers, another rate or rank. Three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import _library_lm, _pareto_rows, decentralized_table, relatives
from benchmarks._common import Cells, no_more_cells
from benchmarks._crowd import Oversubscription, Plan, Task, digit_pairs, summary, warm_up_then_cosine
from benchmarks._library_lm import library_model, loss_of, stacked
from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.periodic import Mean
from distcomp.methods import Method, parse

WORKERS, SEEDS = 8, 3
NEVER = "no exchange"
BATCHES, TEXT_STEPS, PERIOD = (1, 2, 4, 8), 400, 25
BEGUN, BEGUN_BATCH, BEGUN_RATE = 400, 2, 8e-3
OUTER = "outer_lr=0.8,outer_momentum=0.6"
DDP, DILOCO = "identity", f"diloco:period={PERIOD},{OUTER}"
ONE_BIT, DEMO = f"{DILOCO},compressor=qsgd:bits=1", "demo:k=16,values=onebit,decay=0.99"
TEXT_RATES = {DDP: (8e-3, 4e-3), DEMO: (4e-3, 2e-3)}
"""The first is the rate that pareto.py found with two texts per worker; (0.004, 0.008) for all others."""
NOISE_AT, NOISE_BATCH, NOISE_DRAWS = (400, 600, 800), 8, 16

Found = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. ``batch`` texts per worker; 0: digits. ``before``: steps of DDP that it begins from, at
    ``before_rate``."""

    carrier: str
    inner: str
    rate: float
    steps: int
    batch: int = 0
    workers: int = WORKERS
    before: int = 0
    before_rate: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        of = f"text, batch {self.batch}" if self.batch else "digits"
        after = f", after {self.before} steps" if self.before else ""
        told = f"{self.inner}, rate {self.rate:g}, {self.workers} workers, {self.steps} steps{after}"
        return f"{of} | {self.carrier} | {told}, seed {self.seed}"


def text(carrier: str, batch: int) -> tuple[Run, ...]:
    """A row of the study of batches, at both rates."""
    inner = "SGD" if carrier == DEMO else "AdamW"
    return tuple(
        Run(carrier, inner, rate, TEXT_STEPS, batch, before=BEGUN, before_rate=BEGUN_RATE)
        for rate in TEXT_RATES.get(carrier, (4e-3, 8e-3))
    )


def adamw(carrier: str, steps: int, workers: int = WORKERS) -> Run:
    """As in relatives.py."""
    return Run(carrier, "AdamW", 0.03, steps, workers=workers)


def muon(carrier: str, steps: int) -> Run:
    return Run(carrier, "Muon", 0.1, steps)


def gossip(carrier: str, steps: int, rate: float = 0.2) -> Run:
    """As in decentralized_table.py."""
    return Run(carrier, "SGD 0.9", rate, steps)


def tuned_on(rate: float, carrier: str) -> Run:
    """A hundred steps at a small rate, after 200 at the usual one."""
    return Run(carrier, "AdamW", rate, 100, before=200, before_rate=0.03)


LONG, LONGER = 1000, 1600
EAGER = "eager_diloco:period=10"
QUARTER = "outer_lr=0.2,outer_momentum=0"
FINE = (1e-3, 1e-4, 1e-5)
HALF = "outer_momentum=0.5"
DION_RATES = (0.1, 0.3)

STUDY: dict[str, tuple[Run, ...]] = {
    "batch": (
        *(text(carrier, batch)[0] for batch in (1, 8) for carrier in (DDP, DILOCO, NEVER)),
        text(DILOCO, 8)[1], text(DILOCO, 1)[1],
    ),
    "eager": (
        adamw(DDP, 200), adamw(f"diloco:period=10,{HALF}", 200), adamw(f"{EAGER},{HALF}", 200),
        adamw(f"{EAGER},{QUARTER}", 200), adamw(f"diloco:period=10,{QUARTER}", 200),
        adamw(DDP, 200, 2), adamw(f"diloco:period=10,{HALF}", 200, 2), adamw(f"{EAGER},{HALF}", 200, 2),
    ),
    "dcd": (
        gossip(DDP, 400, 0.02), *(gossip("DCD | random 10%", 400, rate) for rate in (0.2, 0.6, 2.0)),
    ),
    "pulse": tuple(
        tuned_on(rate, carrier)
        for rate in FINE
        for carrier in (f"diloco:period=10,{HALF}", f"pulseloco:period=10,{HALF}", NEVER)
    ),
    "dion": (
        muon(DDP, 200),
        *(Run(f"dion:rank={rank}", "SGD 0", rate, 200) for rank in (4, 16, 64) for rate in DION_RATES),
    ),
    "long": (
        adamw(DDP, LONG), adamw(f"diloco:period=10,{HALF}", LONG), adamw("diloco:period=10", LONG),
        adamw("noloco:period=10", LONG), adamw(NEVER, LONG), adamw(f"{EAGER},{HALF}", LONG),
    ),
    "muon": (
        muon(DDP, LONG), muon(f"muloco:period=10,{HALF}", LONG), muon(f"diloco:period=10,{HALF}", LONG),
    ),
    "pqasgd": (
        gossip(DDP, LONGER), gossip("pqasgd:period=2,bits=2", LONGER),
        gossip("pqasgd:period=8,bits=8", LONGER),
    ),
    "choco": (
        gossip("CHOCO | top 1%", LONGER), gossip("CHOCO | random 10%", LONGER),
        gossip("CHOCO | 2 bits, L2", LONGER), gossip("D-PSGD | fp32", LONGER),
    ),
    "ecd": (gossip("ECD | 8 bits, max", LONGER), gossip("ECD | absolute grid", LONGER)),
    "batch, between": tuple(text(carrier, batch)[0] for batch in (4, 2) for carrier in (DDP, DILOCO, NEVER)),
    "batch, other rates": tuple(
        text(carrier, batch)[1] for batch in BATCHES for carrier in (DDP, DILOCO, NEVER)
    ),
    "batch, compressed": tuple(text(carrier, batch)[0] for carrier in (ONE_BIT, DEMO) for batch in BATCHES),
}  # fmt: skip
"""By claim, what is trained for it; the first ones are worth most."""


@cache
def task(batch: int) -> Task:
    return library_model(batch) if batch else digit_pairs()


@cache
def gossips() -> dict[str, Averaging | Method]:
    return decentralized_table.all_cells()


def carrier_of(name: str) -> Averaging | MultiLevel | Method:
    if name == NEVER:
        return Mean(period=1 << 40)
    if name in gossips():
        return gossips()[name]
    made: Averaging | MultiLevel | Method = parse(name)
    return made


def crowd_of(run: Run) -> Oversubscription:
    """Its workers, before the first step or after those of averaged gradients."""
    inner: dict[str, Callable[[Any, float], torch.optim.Optimizer]]
    inner = _pareto_rows.INNER if run.batch else {name: make for name, (make, _) in relatives.INNER.items()}
    after = None
    if run.before:
        batch = min(run.batch, 1) * BEGUN_BATCH
        after = begun(Run(DDP, "AdamW", run.before_rate, run.before, batch, run.workers, seed=run.seed))
    rate = warm_up_then_cosine(run.steps)
    plan = Plan(
        run.workers,
        run.steps + run.before,
        lambda rows: inner[run.inner](rows, run.rate),
        lambda step: rate(step - run.before),
        run.seed,
    )
    return Oversubscription(task(run.batch), plan, carrier_of(run.carrier), after)


def trained(run: Run) -> Oversubscription:
    """Its workers after the last step; fewer steps than asked for where it diverges."""
    crowd = crowd_of(run)
    while crowd.steps < run.steps + run.before and crowd.step():
        pass
    return crowd


@cache
def begun(run: Run) -> Oversubscription:
    """Workers that others go on from; they are not trained on."""
    return trained(run)


def found(run: Run) -> Found:
    """One cell: what the mean of all models is worth, and where nothing is exchanged, the workers' own."""
    crowd = trained(run)
    result = crowd.result()
    if not math.isfinite(result["test_loss"]):
        return {"diverged": crowd.steps}
    if run.carrier == NEVER:
        result["own_loss"] = statistics.mean(crowd.test(model)[0] for model in crowd.models.detach())
    return result


def noise() -> Found:
    """The gradient noise scale, in texts, along DDP's training with two texts per worker."""
    run = text(DDP, BEGUN_BATCH)[0]
    crowd, draws = crowd_of(run), task(NOISE_BATCH).batches(WORKERS, run.seed + 1)
    scales = {}
    for at in NOISE_AT:
        while crowd.steps < at:
            crowd.step()
        many = []
        for _ in range(NOISE_DRAWS):
            inputs, targets = next(draws)
            scores = stacked(crowd.models, crowd.layout, inputs)
            loss = WORKERS * loss_of(scores.flatten(0, 1), targets.flatten(0, 1))
            many.append(torch.autograd.grad(loss, crowd.models)[0])
        scales[str(at)] = noise_scale(many, NOISE_BATCH)
    return {"noise_scale_texts": scales}


def noise_scale(many: list[Tensor], batch: int) -> float:
    """The batch in which the noise of a gradient is as large as the gradient.

    ``many``: gradients of ``n`` workers at one model, ``[n, numel]``, of ``batch`` examples each. With ``g``
    one of them and ``G`` their mean: ``S / |T|^2``, where ``|T|^2 = (n |G|^2 - |g|^2) / (n - 1)`` is without
    bias the true gradient's square, and ``S = batch n (|g|^2 - |G|^2) / (n - 1)`` one example's variance.

    Source: McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.
    """
    workers = len(many[0])
    one = statistics.mean(float(each.square().sum(1).mean()) for each in many)
    every = statistics.mean(float(each.mean(0).square().sum()) for each in many)
    return batch * workers * (one - every) / (workers * every - one)


NOISE = "text | gradient noise scale"


def tabulate(cells: dict[str, Found]) -> dict[str, Any]:
    """``batch``: by method and texts per worker, the gap to DDP; the other claims: their runs as they are."""
    tables: dict[str, Any] = {"batch": gaps(cells)}
    for claim, runs in STUDY.items():
        if not claim.startswith("batch"):
            tables[claim] = {run.key: over_seeds(run, cells) for run in runs if run.key in cells}
    if NOISE in cells:
        tables["noise"] = cells[NOISE]["noise_scale_texts"]
    return tables


def over_seeds(run: Run, cells: dict[str, Found]) -> Found:
    """Losses of all seeds that are there, and what the first one sent."""
    runs = [cells[key] for key in (replace(run, seed=seed).key for seed in range(SEEDS)) if key in cells]
    row = summary(runs)
    own = [one["own_loss"] for one in runs if "own_loss" in one]
    return {**row, "own_loss": statistics.mean(own)} if own else row


ALONE, AT_THE_END = "no communication", "one average at the end"


def gaps(cells: dict[str, Found]) -> dict[str, dict[str, Found]]:
    table: dict[str, dict[str, Found]] = {}
    for name, measure in (
        (DDP, "test_loss"), (DILOCO, "test_loss"), (ONE_BIT, "test_loss"), (DEMO, "test_loss"),
        (ALONE, "own_loss"), (AT_THE_END, "test_loss"),
    ):  # fmt: skip
        carrier = NEVER if name in (ALONE, AT_THE_END) else name
        for batch in BATCHES:
            runs = [(run.rate, cells.get(run.key)) for run in text(carrier, batch)]
            whole = [(one.get(measure, math.inf), rate, one) for rate, one in runs if one is not None]
            if not whole:
                continue
            loss, rate, one = min(whole, key=lambda tried: tried[0])
            row = {"test_loss": loss, "rate": rate, "of_rates": len(whole), "sent_bytes": one["sent_bytes"]}
            ddp = table.get(DDP, {}).get(str(batch))
            if ddp or name == DDP:
                row["relative_loss"] = loss / (ddp or row)["test_loss"]
                table.setdefault(name, {})[str(batch)] = row
    return table


def main() -> None:
    over = no_more_cells(__doc__)
    torch.set_num_threads(1)
    about = {
        "workers": WORKERS, "text": _library_lm.fingerprint(),
        "begun": f"{BEGUN} steps of {BEGUN_BATCH} texts per worker, rate {BEGUN_RATE:g}",
    }  # fmt: skip
    cells = Cells("claims_revisited", about)
    for run in (replace(run, seed=seed) for seed in range(SEEDS) for runs in STUDY.values() for run in runs):
        if not over() and not (run.batch and run.seed):
            cells.get(run.key, lambda run=run: found(run))  # type: ignore[misc]
            if run == STUDY["batch"][-1]:
                cells.get(NOISE, noise)
    cells.document["tables"] = tabulate(cells.document["cells"])
    cells.write()
    for name, by_batch in cells.document["tables"]["batch"].items():
        told = (f"{batch}: {100 * row['relative_loss'] - 100:+.1f} %" for batch, row in by_batch.items())
        print(f"{name:<70}{', '.join(told)}")
    for key, cell in cells.document["cells"].items():
        print(key, {one: value for one, value in cell.items() if one != "spread"})


if __name__ == "__main__":
    main()
