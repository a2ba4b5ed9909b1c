"""PQASGD's claims: the loss of full SGD with 3.1 % of the data, and a linear speed-up.

    python -m benchmarks.pqasgd            # some minutes; resumes; writes results/pqasgd.json

*Loss*: digit pairs, and the transformer of examples/bytes_lm.py (863,232 parameters) on two texts of 32
bytes per worker and step; eight workers in lock-step, momentum 0.9; one learning rate for all rows, full
SGD's best of two on seed 0; three seeds. The control quantizes the *model* instead of the difference. (The
same language model with AdamW: benchmarks/pareto.py.)

*Speed-up*: steps to a fixed error against the number of workers, where the variance of gradients dominates.
Quadratics of different curvatures and optima, 64 in all, dealt out to the workers: the objective is the
same for any number of them. Each point's learning rate is the one of a grid that gets there first; one
seed (the error is a mean over 512 parameters: another seed differs by a few per cent).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._common import Cells, shows_only
from benchmarks._crowd import (
    Plan,
    Task,
    byte_language_model,
    digit_pairs,
    summary,
    train,
    warm_up_then_cosine,
)
from distcomp.averaging.base import Averaging
from distcomp.averaging.periodic import Mean, Periodic
from distcomp.averaging.recipes import local_sgd, pqasgd
from distcomp.averaging.workers import Workers
from distcomp.methods import Method, identity, qsgd
from distcomp.schedule import whole

STEPS, SEEDS = 400, 3
RATES = {"loss": (0.1, 0.2), "language": (0.1, 0.2, 0.3)}
TASKS: dict[str, Callable[[], Task]] = {
    "loss": digit_pairs,
    "language": lambda: byte_language_model(batch=2, context=32),
}
PAIRS = ((2, 2), (4, 4), (8, 8))
LOSS: dict[str, Averaging | Method] = {
    "full SGD": identity(),
    **{f"PQASGD ({p},{b})": pqasgd(period=p, bits=b) for p, b in PAIRS},
    **{f"model quantized ({p},{b})": Mean(qsgd(bits=b), period=p) for p, b in PAIRS},
}

NUMEL, SHARDS, NOISE, TARGET, MOST = 512, 64, 4.0, 0.02, 3000
CROWDS = (1, 2, 4, 8, 16, 32, 64)
DESCENTS = (2**-9, 2**-8, 2**-10, 2**-11)
"""Learning rates, times the number of workers: the noise of their mean allows that."""
SPEED: dict[str, Averaging] = {
    "full SGD": local_sgd(period=1),
    "PQASGD (8,8)": pqasgd(period=8, bits=8, pattern="all_gather"),
    "period 64, 8 bits": Periodic(qsgd(bits=8, pattern="all_gather"), period=64),
}


def plan(rate: float, seed: int) -> Plan:
    return Plan(
        workers=8,
        steps=STEPS,
        optimizer=lambda weights: torch.optim.SGD(weights, rate, momentum=0.9),
        rate=warm_up_then_cosine(STEPS),
        seed=seed,
    )


def losses(cells: Cells, kind: str) -> None:
    """Fill in what is missing."""
    task = TASKS[kind]()

    def run(name: str, rate: float, seed: int) -> dict[str, Any]:
        return cells.get(_name(kind, name, rate, seed), lambda: train(task, plan(rate, seed), LOSS[name]))

    best = min(RATES[kind], key=lambda rate: run("full SGD", rate, 0).get("test_loss", math.inf))
    for seed in range(SEEDS):
        for name in LOSS:
            run(name, best, seed)


def tabulate(cells: dict[str, dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Every row as far as it is there."""
    tuned = {rate: cells.get(_name(kind, "full SGD", rate, 0)) for rate in RATES[kind]}
    if None in tuned.values():
        return {}
    best = min(RATES[kind], key=lambda rate: tuned[rate].get("test_loss", math.inf))
    rows: dict[str, dict[str, Any]] = {}
    for name in LOSS:
        keys = [_name(kind, name, best, seed) for seed in range(SEEDS)]
        runs = [cells[key] for key in keys if key in cells]
        if runs:
            rows[name] = {"rate": best, **summary(runs)}
    return rows


def _name(kind: str, name: str, rate: float, seed: int) -> str:
    return f"{kind} | {name} | rate {rate} | seed {seed}"


class Shards:
    """The mean of 64 noisy quadratics ``a (x - c)^2 / 2``, dealt out to any number of workers."""

    def __init__(self, workers: int, seed: int) -> None:
        of_task, self.noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        curvatures = 0.1 + 1.8 * torch.rand(SHARDS, NUMEL, generator=of_task)
        optima = 0.5 * torch.randn(SHARDS, NUMEL, generator=of_task)
        self.optimum = (curvatures * optima).sum(0) / curvatures.sum(0)
        self.curvatures = torch.stack([curvatures[i::workers].mean(0) for i in range(workers)])
        pulls = torch.stack([(curvatures * optima)[i::workers].mean(0) for i in range(workers)])
        self.centres = pulls / self.curvatures

    def descend(self, models: torch.Tensor, rate: float) -> None:
        noise = NOISE * torch.randn(models.shape, generator=self.noise)
        models -= rate * (self.curvatures * (models - self.centres) + noise)


def steps_to_target(averaging: Averaging, workers: int, rate: float, seed: int, most: int) -> int | None:
    """Steps until the average model's mean squared error is at most the target; None where ``most`` are too
    few."""
    task = Shards(workers, seed)
    oversubscription = Workers(averaging, torch.ones(NUMEL), workers, seed=seed)
    models = torch.ones(workers, NUMEL)
    oversubscription.models = list(models.unbind())
    for step in range(1, most + 1):
        task.descend(models, rate)
        oversubscription.step()
        if step % whole(averaging.period, step):
            continue  # nobody holds the average model now
        error = float((models.mean(0) - task.optimum).square().mean())
        if error <= TARGET:
            return step
        if not error < 1e3:
            return None
    return None


def fastest(averaging: Averaging, workers: int) -> dict[str, Any]:
    """The steps with the best learning rate of the grid; one is given up when another was faster."""
    best: dict[str, Any] = {"steps": None}
    for rate in (workers * one for one in DESCENTS):
        most = best["steps"] or max(MOST // workers, 320)
        found = steps_to_target(averaging, workers, rate, 0, most)
        if found is not None and found < (best["steps"] or most + 1):
            best = {"steps": found, "rate": rate}
    return best


def speed(cells: Cells) -> None:
    """Fill in what is missing."""
    for workers in CROWDS:
        for name, averaging in SPEED.items():
            cells.get(_point(name, workers), lambda a=averaging, w=workers: fastest(a, w))


def tabulate_speed(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Steps to the target by number of workers, as far as they are there."""
    there = [workers for workers in CROWDS if all(_point(name, workers) in cells for name in SPEED)]
    return {name: {str(workers): cells[_point(name, workers)] for workers in there} for name in SPEED}


def _point(name: str, workers: int) -> str:
    return f"speed | {name} | {workers} workers"


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    about = {
        "loss": {"task": "digit pairs, 17,440 parameters", "workers": 8, "steps": STEPS, "seeds": SEEDS,
                 "rates": list(RATES["loss"])},
        "language": {"task": "bytes of Python's standard library, transformer of 863,232 parameters",
                     "workers": 8, "steps": STEPS, "seeds": SEEDS, "rates": list(RATES["language"])},
        "speed": {"task": f"{SHARDS} quadratics, {NUMEL} parameters, noise {NOISE}", "target": TARGET,
                  "workers": list(CROWDS), "rates": list(DESCENTS)},
    }  # fmt: skip
    cells = Cells("pqasgd", about)
    if not show_only:
        for kind in TASKS:
            losses(cells, kind)
        speed(cells)
    for kind in TASKS:
        cells.document[kind] = tabulate(cells.document["cells"], kind)
    cells.document["speed"] = tabulate_speed(cells.document["cells"])
    cells.write()
    for kind in TASKS:
        for name, row in cells.document[kind].items():
            print(f"{kind:<10}{name:<24}{row}")
    for name, points in cells.document["speed"].items():
        print(f"{name:<24}{ {workers: point['steps'] for workers, point in points.items()} }")


if __name__ == "__main__":
    main()
