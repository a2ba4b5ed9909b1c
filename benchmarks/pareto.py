"""Test loss against bytes sent: a byte-level language model, eight workers, every method for the same steps.

    python -m benchmarks.pareto            # an hour of one core; resumes; writes results/pareto.json

The transformer of examples/bytes_lm.py (863,232 parameters) on the source of Python's standard library, two
texts of 32 bytes per worker and step; AdamW, 400 steps, every worker reads modules of its own, all in
lock-step. One learning rate for all: DDP's best of three on seed 0; up to three seeds. Periods divide 400:
the last exchange is counted like the others, and nothing is sent beside it. "model quantized" is PQASGD's
control: it quantizes the model instead of the difference.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks._common import Cells, shows_only
from benchmarks._crowd import Plan, byte_language_model, summary, train, warm_up_then_cosine
from distcomp.averaging.base import Averaging
from distcomp.averaging.periodic import Mean
from distcomp.methods import Method, identity, parse, qsgd

STEPS, SEEDS, RATES = 400, 3, (2e-3, 4e-3, 8e-3)
METHODS: dict[str, Averaging | Method] = {
    "DDP fp32": identity(),
    **{
        spec: parse(spec)
        for spec in (
            "pqasgd:period=8,bits=8", "pqasgd:period=4,bits=4", "diloco:period=50",
            "diloco:period=20,compressor=qsgd:bits=1", "sparse_loco:period=25", "pqasgd:period=2,bits=2",
        )
    },
    **{f"model quantized ({p},{b})": Mean(qsgd(bits=b), period=p) for p, b in ((2, 2), (4, 4), (8, 8))},
    **{
        spec: parse(spec)
        for spec in (
            "diloco:period=50,compressor=(topk:ratio=0.03,values=int2)", "qsgd:bits=4", "powersgd:rank=2",
            "diloco:period=50,compressor=qsgd:bits=1", "pqasgd:period=40,bits=4",
        )
    },
}  # fmt: skip


def plan(rate: float, seed: int) -> Plan:
    return Plan(
        workers=8,
        steps=STEPS,
        optimizer=lambda weights: torch.optim.AdamW(weights, rate, betas=(0.9, 0.95)),
        rate=warm_up_then_cosine(STEPS),
        seed=seed,
    )


def study(cells: Cells) -> None:
    """Fill in what is missing: DDP's spread over seeds first, then every method with one seed after the
    other."""
    task = byte_language_model(batch=2, context=32)

    def run(name: str, rate: float, seed: int) -> dict[str, Any]:
        return cells.get(_name(name, rate, seed), lambda: train(task, plan(rate, seed), METHODS[name]))

    best = min(RATES, key=lambda rate: run("DDP fp32", rate, 0)["test_loss"])
    every = [(name, seed) for seed in range(SEEDS) for name in METHODS]
    for name, seed in sorted(every, key=lambda one: one[0] != "DDP fp32"):
        run(name, best, seed)


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every method as far as it is there: its losses, what was sent, and that against DDP."""
    best = min(RATES, key=lambda rate: cells[_name("DDP fp32", rate, 0)]["test_loss"])
    rows: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        runs = [cells[key] for seed in range(SEEDS) if (key := _name(name, best, seed)) in cells]
        if not runs:
            continue
        rows[name] = {"rate": best, **summary(runs)}
        if "mean" in rows[name]:
            ddp = rows["DDP fp32"]
            paired = statistics.mean(ddp["test_loss"][: len(runs)])
            rows[name]["relative_loss"] = rows[name]["mean"] / paired
            rows[name]["times_fewer_bytes"] = ddp["sent_bytes"] / rows[name]["sent_bytes"]
    return rows


def _name(name: str, rate: float, seed: int) -> str:
    return f"{name} | rate {rate} | seed {seed}"


def main() -> None:
    show_only = shows_only(__doc__)
    torch.set_num_threads(1)
    about = {
        "task": "bytes of Python's standard library, transformer of 863,232 parameters",
        "workers": 8, "batch": "2 texts of 32 bytes per worker", "steps": STEPS, "seeds": SEEDS,
        "rates": list(RATES), "optimizer": "AdamW, betas 0.9 and 0.95, warm-up then cosine",
    }  # fmt: skip
    cells = Cells("pareto", about)
    if not show_only:
        study(cells)
    cells.document["methods"] = tabulate(cells.document["cells"])
    cells.write()
    for name, row in cells.document["methods"].items():
        print(f"{name:<72}{row.get('mean', 0):7.3f}{row.get('times_fewer_bytes', 0):9.0f} x fewer bytes")


if __name__ == "__main__":
    main()
