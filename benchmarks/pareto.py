"""Test loss against bytes sent: a byte-level language model, eight workers, every method for the same steps.

    python benchmarks/pareto.py            # half an hour of one core; resumes; writes results/pareto.json

A transformer of 83,008 parameters (examples/bytes_lm.py made smaller: width 48, 2 layers, texts of 32
bytes, so that a run of eight workers takes half a minute of one core) on the source of Python's standard
library; AdamW, 600 steps, every worker reads modules of its own, all in lock-step. Every row's learning
rate is the best of two on seed 0; then two more seeds. Periods divide 600: the last exchange is counted
like the others, and nothing is sent beside it. "model quantized" is PQASGD's control: it quantizes the
model instead of the difference.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from _crowd import Cells, Plan, byte_language_model, train, warm_up_then_cosine

from distcomp.methods import Method, identity, parse, qsgd
from distcomp.sync.averaging import Averaging
from distcomp.sync.periodic import Mean

STEPS, SEEDS, RATES = 600, 3, (5e-3, 1.5e-2)
METHODS: dict[str, Averaging | Method] = {
    "DDP fp32": identity(),
    **{
        spec: parse(spec)
        for spec in (
            "pqasgd:period=8,bits=8", "pqasgd:period=4,bits=4", "pqasgd:period=2,bits=2",
            "diloco:period=50", "sparse_loco:period=30",
            "diloco:period=50,compressor=(topk:ratio=0.03,values=int2)",
            "diloco:period=50,compressor=qsgd:bits=1", "diloco:period=20,compressor=qsgd:bits=1",
        )
    },
    **{f"model quantized ({p},{b})": Mean(qsgd(bits=b), period=p) for p, b in ((8, 8), (4, 4), (2, 2))},
    **{
        spec: parse(spec)
        for spec in (
            "qsgd:bits=4", "powersgd:rank=2", "sparse_loco:period=15,outer_momentum=0.9,outer_lr=0.7",
            "diloco:period=50,compressor=qsgd:bits=4", "pqasgd:period=30,bits=4",
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
        watch_every=50,
    )


def study(cells: Cells) -> None:
    """Every method: its learning rate, its losses, what was sent, and that against DDP."""
    task = byte_language_model()
    rows: dict[str, dict[str, Any]] = {}
    for name, carrier in METHODS.items():

        def run(rate: float, seed: int, name: str = name, carrier: Any = carrier) -> dict[str, Any]:
            key = f"{name} | rate {rate} | seed {seed}"
            return cells.get(key, lambda: train(task, plan(rate, seed), carrier))

        rate = min(RATES, key=lambda rate: run(rate, 0).get("test_loss", float("inf")))
        runs = [run(rate, seed) for seed in range(SEEDS)]
        through = [one for one in runs if "diverged" not in one]
        rows[name] = {"rate": rate, "diverged": len(runs) - len(through)}
        if not through:
            continue
        losses = [one["test_loss"] for one in through]
        ddp = rows["DDP fp32"]
        rows[name] |= {
            "test_loss": losses,
            "mean": statistics.mean(losses),
            "range": [min(losses), max(losses)],
            "test_accuracy": statistics.mean(one["test_accuracy"] for one in through),
            "sent_bytes": through[0]["sent_bytes"],
        }
        rows[name]["relative_loss"] = rows[name]["mean"] / ddp["mean"]
        rows[name]["times_fewer_bytes"] = ddp["sent_bytes"] / rows[name]["sent_bytes"]
        cells.document["methods"] = rows


def main() -> None:
    torch.set_num_threads(1)
    about = {
        "task": "bytes of Python's standard library, transformer of 83,008 parameters",
        "reduced": "a twelfth of the example's size and half its context, for one core",
        "workers": 8, "batch": "4 texts of 32 bytes per worker", "steps": STEPS, "seeds": SEEDS,
        "rates": list(RATES), "optimizer": "AdamW, betas 0.9 and 0.95, warm-up then cosine",
    }  # fmt: skip
    cells = Cells("pareto", about)
    study(cells)
    cells.write()
    for name, row in cells.document["methods"].items():
        print(f"{name:<72}{row.get('mean', 0):7.3f}{row.get('times_fewer_bytes', 0):9.0f} x fewer bytes")


if __name__ == "__main__":
    main()
