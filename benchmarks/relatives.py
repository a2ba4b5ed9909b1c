"""The relatives of DiLoCo and of gossip, each beside its parent and beside doing nothing.

    python -m benchmarks.relatives       # ten minutes of one core; resumes; writes results/relatives.json

Digit pairs (17,440 parameters), eight workers with images of their own, 200 steps, three seeds, all in lock-
step. One learning rate for all rows of an inner optimizer: the best of three for averaged gradients, on seed
0. What is tested is the mean of all workers' models. Two controls under each inner optimizer: "one average at
the end" exchanges nothing until then, and "no communication" tests the workers' own models instead (the mean
of their losses). Equal periods of ``des_loc`` are Local Adam. Dion's step is the method's own; its parent is
Muon with averaged gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import Cells, shows_only
from benchmarks._crowd import Oversubscription, Plan, Task, digit_pairs, summary, warm_up_then_cosine
from distcomp.averaging.periodic import Mean
from distcomp.methods import parse

WORKERS, STEPS, SEEDS = 8, 200, 3
NEVER = "one average at the end"
ALONE = "no communication"
SHAPES = ((80, 128), (80, 80), (10, 80))
"""The task's matrices; it has nothing else."""


class Muon(torch.optim.Optimizer):
    """Muon for workers whose models are the rows of one tensor: ``torch.optim.Muon`` takes matrices alone.

    Source: Jordan et al., "Muon", 2024: Nesterov momentum 0.95, five steps of its quintic iteration, a step
    scaled by ``sqrt(max(1, a/b))``.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for rows in group["params"]:
                momentum = self.state[rows].setdefault("momentum_buffer", torch.zeros_like(rows))
                momentum.lerp_(rows.grad, 0.05)
                direction = torch.lerp(rows.grad, momentum, 0.95)
                sizes = [a * b for a, b in SHAPES]
                for (a, b), piece, to in zip(
                    SHAPES, direction.split(sizes, 1), rows.split(sizes, 1), strict=True
                ):
                    scale = group["lr"] * max(1.0, a / b) ** 0.5
                    to.sub_(orthonormalized(piece.view(-1, a, b)).reshape(len(to), -1), alpha=scale)


def orthonormalized(x: Tensor) -> Tensor:
    """Each matrix with singular values near 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


Rows = list[Tensor]
INNER: dict[str, tuple[Callable[[Rows, float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "AdamW": (lambda rows, rate: torch.optim.AdamW(rows, rate, betas=(0.9, 0.99)), (3e-3, 1e-2, 3e-2)),
    "Muon": (Muon, (0.01, 0.03, 0.1)),
    "SGD 0.9": (lambda rows, rate: torch.optim.SGD(rows, rate, momentum=0.9), (0.02, 0.06, 0.2)),
    "SGD 0": (torch.optim.SGD, (0.01, 0.03, 0.1)),
}
"""Inner optimizer -> what makes it, and the learning rates that are tried."""
BASE = "identity"
ROWS: dict[str, tuple[str, ...]] = {
    "AdamW": (
        BASE, "local_sgd:period=10", "des_loc:period=10,first_period=10,second_period=10",
        "des_loc:period=10", "diloco:period=10", "eager_diloco:period=10", "pulseloco:period=10",
        "diloco:period=10,outer_momentum=0.5", "eager_diloco:period=10,outer_momentum=0.5",
        "pulseloco:period=10,outer_momentum=0.5", "noloco:period=10", NEVER,
    ),
    "Muon": (
        BASE, "diloco:period=10,outer_momentum=0.5", "muloco:period=10,outer_momentum=0.5",
        NEVER,
    ),
    "SGD 0": ("dion:rank=4",),
    "SGD 0.9": (BASE, "dpsgd:topology=one_peer_exponential", "sgp", "ad_psgd", NEVER),
}  # fmt: skip
"""What is compared; the first row of each tunes the learning rate of all."""


@cache
def task() -> Task:
    """The digits are read once."""
    return digit_pairs()


def trained(inner: str, row: str, rate: float, seed: int) -> dict[str, Any]:
    """One run; of workers that exchange nothing also what they are worth each ``alone``, on average."""
    make = INNER[inner][0]
    plan = Plan(
        workers=WORKERS,
        steps=STEPS,
        optimizer=lambda rows: make(rows, rate),
        rate=warm_up_then_cosine(STEPS),
        seed=seed,
    )
    carrier = Mean(period=STEPS + 1) if row == NEVER else parse(row)
    crowd = Oversubscription(task(), plan, carrier)
    for step in range(1, STEPS + 1):
        if not crowd.step():
            return {"diverged": step}
    if row != NEVER:
        return crowd.result()
    own = [crowd.test(model.detach()) for model in crowd.models]
    losses, accuracies = zip(*own, strict=True)
    alone = {"test_loss": statistics.mean(losses), "test_accuracy": statistics.mean(accuracies)}
    return {**crowd.result(), "alone": alone}


def study(cells: Cells) -> None:
    """Fill in what is missing."""
    for inner, (first, *others) in ROWS.items():

        def run(row: str, rate: float, seed: int, inner: str = inner) -> dict[str, Any]:
            return cells.get(_name(inner, row, rate, seed), lambda: trained(inner, row, rate, seed))

        best = min(INNER[inner][1], key=lambda rate: run(first, rate, 0).get("test_loss", float("inf")))
        for row in (first, *others):
            for seed in range(SEEDS):
                run(row, best, seed)


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``inner | row`` -> losses, bytes, and both against averaged gradients with the same inner optimizer and
    seeds, as far as it is there."""
    table: dict[str, dict[str, Any]] = {}
    for inner, rows in ROWS.items():
        tuned = {rate: cells.get(_name(inner, rows[0], rate, 0)) for rate in INNER[inner][1]}
        if None in tuned.values():
            continue
        best = min(tuned, key=lambda rate: (tuned[rate] or {}).get("test_loss", float("inf")))
        for row in rows:
            runs = [cells.get(_name(inner, row, best, seed)) for seed in range(SEEDS)]
            found = [one for one in runs if one is not None]
            if found:
                table[f"{inner} | {row}"] = {"rate": best, **summary(found)}
            if found and row == NEVER:
                apart = [{**one, **one.get("alone", {})} for one in found]
                table[f"{inner} | {ALONE}"] = {"rate": best, **summary(apart)}
    for key, row in table.items():
        parent = table.get(f"{'Muon' if key.startswith('SGD 0 |') else key.partition(' | ')[0]} | {BASE}")
        if parent is not None and "mean" in row and "mean" in parent:
            paired = statistics.mean(parent["test_loss"][: row["seeds"]])
            row["relative_loss"] = row["mean"] / paired
            row["times_fewer_bytes"] = parent["sent_bytes"] / row["sent_bytes"] if row["sent_bytes"] else None
    return table


def _name(inner: str, row: str, rate: float, seed: int) -> str:
    return f"{inner} | {row} | rate {rate} | seed {seed}"


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    about = {
        "task": "digit pairs, 17,440 parameters, batch 32 per worker", "workers": WORKERS, "steps": STEPS,
        "seeds": SEEDS, "rates": {inner: list(rates) for inner, (_, rates) in INNER.items()},
        "tuned_on": "seed 0, averaged gradients",
    }  # fmt: skip
    cells = Cells("relatives", about)
    if not show_only:
        study(cells)
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for key, row in cells.document["table"].items():
        fewer = row.get("times_fewer_bytes") or float("inf")
        print(f"{key:<60}{row.get('mean', float('nan')):7.3f}{fewer:9.1f} x fewer bytes")


if __name__ == "__main__":
    main()
