"""What does exchanging predictions save, and what does it lose? Pairs of digits, several workers, five seeds.

    python -m benchmarks.codistill                 # writes results/codistill.json; goes on where it stopped
    python -m benchmarks.codistill --seconds 60    # some cells of it
    python -m benchmarks.codistill --show

Each worker draws pairs from labelled images of its own; 2,000 pairs of other images, without labels, are
shared. Workers run in lock-step in one process (``distcomp simulate``): real numerics and bytes; seconds are
those of the network model at 1 Mbit/s and 50 ms, with 20 ms for the computing of a batch, the agreement
term's included. Codistilled networks are tested one by one and averaged; all others are one model. "alone"
does not communicate; "one worker" has all workers' images and as many samples as one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distcomp
from benchmarks._common import Cells, no_more_cells
from distcomp.advice import Scenario, Setting, Simulation, TrainingTask
from distcomp.network import Fabric

SEEDS, STEPS, BATCH, EVERY = 5, 300, 64, 50
WORKERS = (2, 4, 8)
LOSSES = (1.0, 0.8)
SHARED, SHARED_IMAGES, TEST = 2000, 300, 2000
ALONE = "codistill:period=1000000,weight=0"
METHODS = {
    "DDP (identity)": "identity",
    "qsgd, 4 bits": "qsgd:bits=4",
    "pqasgd": "pqasgd",
    "DiLoCo, every 50": "diloco:period=50",
    "codistill, 8 bits": "codistill:period=50,values=(qsgd:bits=8)",
    "codistill, 4 bits": "codistill:period=50,values=(qsgd:bits=4)",
    "alone": ALONE,
    "one worker, all images": "one worker",
}
PLAN = {
    "seeds": SEEDS, "steps": STEPS, "batch": BATCH, "workers": WORKERS, "methods": METHODS, "shared": SHARED,
    "shared_images": SHARED_IMAGES, "test_pairs": TEST, "hidden": 96, "rate": "1mbit", "delay": "50ms",
}  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels = (pixels[order].float() - pixels.float().mean(0)) / pixels.float().std()
    return pixels, labels[order]


def pairs(pixels: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    left, right = torch.randint(len(pixels), (2, count), generator=torch.Generator().manual_seed(seed))
    return torch.cat([pixels[left], pixels[right]], dim=1), (labels[left] + labels[right]) % 10


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def task(seed: int) -> TrainingTask:
    """397 images for the test, 300 for what is shared, the others labelled and dealt out to the workers."""
    pixels, labels = images()
    test = pairs(pixels[:397], labels[:397], TEST, 0)
    unlabelled, _ = pairs(pixels[397:][:SHARED_IMAGES], labels[397:][:SHARED_IMAGES], SHARED, 1)
    own = pixels[397 + SHARED_IMAGES :], labels[397 + SHARED_IMAGES :]

    def batch(worker: int, workers: int, step: int) -> tuple[Tensor, Tensor]:
        mine = own[0][worker::workers], own[1][worker::workers]
        return pairs(*mine, BATCH, (seed * 64 + worker) * 1_000_003 + step + 2)

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        scores = model(test[0])
        accuracy = (scores.argmax(1) == test[1]).float().mean().item()
        return {"test_loss": cross_entropy(scores, test[1]).item(), "test_accuracy": accuracy}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    return TrainingTask(network(seed), batch, cross_entropy, optimizer, evaluate, shared=unlabelled)


def cell(method: str, workers: int, seed: int) -> dict[str, Any]:
    """The last metrics, bytes per worker and a curve of (step, seconds, loss, accuracy)."""
    if method == "one worker":
        method, workers = ALONE, 1
    return simulated(task(seed), method, workers, seed, STEPS)


def simulated(training: TrainingTask, method: str, workers: int, seed: int, steps: int) -> dict[str, Any]:
    """A run in lock-step on the emulated network: the last metrics, and a curve."""
    setting = Setting(Fabric.uniform(workers, "1mbit", "50ms"), Scenario(0.020), seed=seed)
    simulation = Simulation(training, distcomp.parse(method), setting)
    curve = []
    for step in range(1, steps + 1):
        simulation.step()
        if step % EVERY == 0:
            found = simulation.evaluate()
            metrics = [found[name] for name in ("test_loss", "test_accuracy") if name in found]
            curve.append([step, found["seconds"], *metrics])
    return {**found, "curve": curve}


def complete_seeds(cells: Mapping[str, Any], workers: int) -> list[int]:
    """The seeds of which every cell of a table is there."""
    keys = [
        f"{name} | {WORKERS[0] if method == 'one worker' else workers}" for name, method in METHODS.items()
    ]
    return [seed for seed in range(SEEDS) if all(f"{key} | {seed}" in cells for key in keys)]


def seconds_to(curve: list[list[float]], loss: float) -> float:
    """When a test loss was first reached; infinity where it was not."""
    return next((seconds for _, seconds, reached, *_ in curve if reached <= loss), math.inf)


def table(cells: Mapping[str, Any], workers: int) -> str:
    """Markdown: what was reached, by the bytes of one worker."""
    seeds = complete_seeds(cells, workers)
    head = [
        f"{workers} workers, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        "test accuracy",
        "test loss",
        "Mbit sent by a worker",
    ]
    head += [f"seconds to loss {loss}" for loss in LOSSES]
    lines = [head, ["---"] * len(head)]
    for name, method in METHODS.items() if seeds else ():
        counted = WORKERS[0] if method == "one worker" else workers
        found = [cells[f"{name} | {counted} | {seed}"] for seed in seeds]
        accuracy, loss, sent_bytes = (
            torch.tensor([row[field] for row in found], dtype=torch.float64)
            for field in ("test_accuracy", "test_loss", "sent_bytes")
        )
        spread = f" ± {100 * accuracy.std():.1f}" if len(seeds) > 1 else ""
        when = [sum(seconds_to(row["curve"], wanted) for row in found) / len(found) for wanted in LOSSES]
        cells_ = [name, f"{100 * accuracy.mean():.1f}{spread} %", f"{loss.mean():.2f}"]
        cells_ += [f"{8 * sent_bytes.mean() / 1e6:,.2f}"]
        lines.append([*cells_, *(f"{at:,.1f}" if at < math.inf else "not in every seed" for at in when)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    over = no_more_cells(__doc__)
    torch.set_num_threads(1)
    study = Cells("codistill", PLAN)
    for seed, workers, (name, method) in itertools.product(range(SEEDS), WORKERS, METHODS.items()):
        if over():
            break
        if method == "one worker" and workers != WORKERS[0]:
            continue  # it is the same one
        study.get(f"{name} | {workers} | {seed}", lambda: cell(method, workers, seed))  # noqa: B023
    for workers in WORKERS:
        print(table(study.document["cells"], workers), end="\n\n")


if __name__ == "__main__":
    main()
