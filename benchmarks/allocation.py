"""A budget of bytes, spent layer by layer or alike: which reaches the lower test loss?

    python -m benchmarks.allocation        # resumes; writes results/allocation.json

Four workers in lock-step on pairs of digits, SGD with momentum, error feedback throughout. ``allocate``
against uniform settings of its own ladder's kinds that fit the same budget: the largest width of the
quantizer that fits, and top-k with 8-bit and with 4-bit values at the largest ratio that fits. Budgets are
parts of float32's bytes and a little more, for the scales of 4 bits and of 1 bit. Bytes are what one rank
sends in payloads, the plans' errors included.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks._common import Cells, arguments_of
from benchmarks._crowd import Plan, Task, digit_pairs, train, warm_up_then_cosine
from distcomp.attaching.weights import Weights
from distcomp.compressors import Compressor, Identity, Quantize, TopK
from distcomp.compressors.topk import with_values
from distcomp.layout import Layout
from distcomp.methods import Allocate, ErrorFeedback, Method, from_compressor, identity
from distcomp.payload import body_bytes

WORKERS, STEPS, SEEDS, PERIOD, RATE = 4, 150, 3, 25, 0.4
BUDGETS = {"1/8": 1.02 / 8, "1/32": 1.07 / 32, "1/128": 1.02 / 128}
"""With what the scales of 4 bits and of 1 bit need, so that these fit."""

LADDER: tuple[Compressor, ...] = (
    Identity(),
    *(Quantize(bits, rounding="nearest") for bits in (8, 4, 3, 2, 1)),
    *(with_values(TopK(ratio), "int4") for ratio in (1 / 6, 1 / 10, 1 / 20, 1 / 40, 1 / 80, 1 / 160)),
    *(with_values(TopK(ratio), "int4") for ratio in (1 / 320, 1 / 1000)),
)
"""Finer among the sparse than the default, whose 8-bit values lose to a uniform top-k of 4-bit ones."""


def size_of(compressor: Compressor, layout: Layout) -> int:
    return body_bytes(compressor.parts(layout))


def uniform(budget: float, layout: Layout) -> dict[str, Compressor]:
    """The settings that spend the budget alike on all layers."""
    room = budget * 4 * layout.numel
    fitting: dict[str, Compressor] = {}
    for bits in range(8, 0, -1):
        if size_of(Quantize(bits, rounding="nearest"), layout) <= room:
            fitting[f"{bits} bits"] = Quantize(bits, rounding="nearest")
            break
    for values in ("int8", "int4"):
        ratios = [step / 2000 for step in range(1, 2001)]
        most = max(r for r in ratios if size_of(with_values(TopK(r), values), layout) <= room)
        fitting[f"top-k {most:.2%}, {values}"] = with_values(TopK(most), values)
    return fitting


def plan(seed: int) -> Plan:
    return Plan(
        workers=WORKERS,
        steps=STEPS,
        optimizer=lambda weights: torch.optim.SGD(weights, RATE, momentum=0.8, nesterov=True),
        rate=warm_up_then_cosine(STEPS),
        seed=seed,
    )


def row(cells: Cells, task: Task, name: str, method: Method) -> dict[str, Any]:
    runs = [cells.get(f"{name} | seed {s}", lambda s=s: train(task, plan(s), method)) for s in range(SEEDS)]
    losses = [run.get("test_loss", float("inf")) for run in runs]
    return {
        "test_loss": losses,
        "mean": statistics.mean(losses),
        "spread": statistics.stdev(losses),
        "sent_bytes_per_step": runs[0].get("sent_bytes", 0) / STEPS,
    }


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    task = digit_pairs()
    layout = Weights(task.network()).layout
    about = {
        "task": f"pairs of digits, {layout.numel:,} parameters in {len(layout.slices)} layers",
        "reduced": "18,000 parameters, 150 steps, three seeds, so that the whole takes minutes",
        "workers": WORKERS, "steps": STEPS, "seeds": SEEDS, "period": PERIOD, "rate": RATE,
        "budgets": BUDGETS,
    }  # fmt: skip
    cells = Cells("allocation", about)
    table: dict[str, Any] = {"float32": row(cells, task, "float32", identity())}
    won = 0
    for name, budget in BUDGETS.items():
        rivals = {
            rival: row(cells, task, f"{name} | {rival}", ErrorFeedback(from_compressor(compressor)))
            for rival, compressor in uniform(budget, layout).items()
        }
        method = ErrorFeedback(Allocate(budget, LADDER, PERIOD))
        ours = row(cells, task, f"{name} | allocate", method)
        best = min(rivals, key=lambda rival: rivals[rival]["mean"])
        paired = [a - b for a, b in zip(ours["test_loss"], rivals[best]["test_loss"], strict=True)]
        won += statistics.mean(paired) < 0
        table[name] = {
            "allocate": ours,
            "uniform": rivals,
            "best uniform": best,
            "paired_difference_mean": statistics.mean(paired),
            "paired_difference_spread": statistics.stdev(paired),
        }
        cells.document["budgets"] = table
        cells.document["lower_on"] = f"{won} of {len(BUDGETS)} budgets"
        cells.write()
    print(cells.document["lower_on"])


if __name__ == "__main__":
    main()
