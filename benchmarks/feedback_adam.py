"""Why does one bit without a residual do better than with one, where Adam steps and text is read?

    python -m benchmarks.feedback_adam            # half an hour of one core; resumes
    python -m benchmarks.feedback_adam --show     # prints the table of what is there

The byte-level language model of examples/bytes_lm.py, two workers with texts of their own, 300 steps, two
seeds, in lock-step. Gradients in float32 and in one bit, with the residual and without, under AdamW and
under SGD with momentum, each at three learning rates. *second moment*: the mean of the square root of
AdamW's at the end over that of float32, by which every step is divided. Writes results/feedback_adam.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import Cells, shows_only
from benchmarks._crowd import Oversubscription, Plan, Task, byte_language_model, warm_up_then_cosine
from distcomp.methods import Method, parse

WORKERS, STEPS, SEEDS, TEXTS, CONTEXT = 2, 300, 2, 8, 64
EXACT, OWED, FORGOTTEN = "identity", "qsgd:bits=1", "qsgd:bits=1,error_feedback=False"
OPTIMIZERS: dict[str, tuple[Callable[[list[Tensor], float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "AdamW": (lambda rows, rate: torch.optim.AdamW(rows, rate, betas=(0.9, 0.95)), (1e-3, 2e-3, 4e-3)),
    "SGD": (lambda rows, rate: torch.optim.SGD(rows, rate, momentum=0.9), (0.03, 0.1, 0.3)),
}
"""Optimizer -> what makes it, and its learning rates."""


@cache
def task() -> Task:
    """The texts are read once."""
    return byte_language_model(TEXTS, CONTEXT)


def trained(optimizer: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    """The test loss of one run, and what AdamW divides by."""
    make = OPTIMIZERS[optimizer][0]
    plan = Plan(WORKERS, STEPS, lambda rows: make(rows, rate), warm_up_then_cosine(STEPS), seed)
    carrier = parse(method)
    assert isinstance(carrier, Method)
    crowd = Oversubscription(task(), plan, carrier)
    for step in range(1, STEPS + 1):
        if not crowd.step():
            return {"diverged": step}
    moments = crowd.optimizer.state[crowd.models].get("exp_avg_sq")
    return {
        "test_loss": crowd.test()[0],
        "root_second_moment": None if moments is None else float(moments.sqrt().mean()),
    }


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``optimizer | method``: the loss at the best rate, and beside float32 at its best."""
    table: dict[str, dict[str, Any]] = {}
    for optimizer, (_, rates) in OPTIMIZERS.items():
        exact = None
        for method in (EXACT, OWED, FORGOTTEN):
            by_rate = {rate: _losses(cells, optimizer, method, rate) for rate in rates}
            by_rate = {rate: losses for rate, losses in by_rate.items() if losses}
            if not by_rate:
                continue
            best = min(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))
            mean = statistics.mean(by_rate[best])
            exact = mean if exact is None else exact
            table[f"{optimizer} | {method}"] = {
                "rate": best, "seeds": len(by_rate[best]), "mean": mean, "relative": mean / exact,
                "by_rate": {str(rate): statistics.mean(losses) for rate, losses in by_rate.items()},
                "second_moment": _second_moment(cells, optimizer, method, rates[-1]),
            }  # fmt: skip
    return table


def _losses(cells: dict[str, dict[str, Any]], optimizer: str, method: str, rate: float) -> list[float]:
    runs = [cells.get(_name(optimizer, method, rate, seed), {}) for seed in range(SEEDS)]
    return [one["test_loss"] for one in runs if "test_loss" in one]


def _second_moment(
    cells: dict[str, dict[str, Any]], optimizer: str, method: str, rate: float
) -> float | None:
    """Over float32's, at the same rate and on the same seeds."""
    if optimizer != "AdamW":
        return None
    pairs = [
        (cells[_name(optimizer, method, rate, seed)], cells[_name(optimizer, EXACT, rate, seed)])
        for seed in range(SEEDS)
        if _name(optimizer, method, rate, seed) in cells
    ]
    ratios = [
        ours["root_second_moment"] / exact["root_second_moment"]
        for ours, exact in pairs
        if "test_loss" in ours and "test_loss" in exact
    ]
    return statistics.mean(ratios) if ratios else None


def _name(optimizer: str, method: str, rate: float, seed: int) -> str:
    return f"{optimizer} | {method} | rate {rate} | seed {seed}"


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    about = {"workers": WORKERS, "steps": STEPS, "seeds": SEEDS, "texts": TEXTS, "context": CONTEXT}
    cells = Cells("feedback_adam", about)
    for seed in range(0 if show_only else SEEDS):
        for optimizer, (_, rates) in OPTIMIZERS.items():
            for method in (EXACT, OWED, FORGOTTEN):
                for rate in rates:
                    name = _name(optimizer, method, rate, seed)
                    cells.get(name, lambda told=(optimizer, method, rate, seed): trained(*told))
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for key, row in cells.document["table"].items():
        print(f"{key:<50}{row['mean']:8.3f}{row['relative']:8.3f}  {row['second_moment']}  {row['by_rate']}")


if __name__ == "__main__":
    main()
