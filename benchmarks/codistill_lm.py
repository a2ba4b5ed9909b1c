"""Exchanged predictions of a language model: loss against bytes, several workers, five seeds.

    python -m benchmarks.codistill_lm                 # writes results/codistill_lm.json; resumes
    python -m benchmarks.codistill_lm --seconds 60    # some cells of it
    python -m benchmarks.codistill_lm --show

Bytes of Python's standard library (:mod:`benchmarks._library_lm`, its transformer of 82,944 parameters), each
worker with packages of its own: 16 KiB of them, which it reads six times; or an equal share of everything,
of which it reads little. Every tenth module is for the test, every tenth of the others is shared: text that
no worker has among its own. Lock-step and clock as in :mod:`benchmarks.codistill`.

A prediction of one text is 64 rows of 256 logits: 16 texts, drawn anew for each exchange, are three times as
many numbers as the model has, four are fewer. Text is its own label: "alone, reads the shared text" trains on
as many shared texts per step as the agreement term looks at, and sends nothing. "one worker" has all workers'
text and reads as much as one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import Cells, no_more_cells
from benchmarks._library_lm import Draws, Reader, apart, fingerprint, library, loss_of
from benchmarks.codistill import ALONE, seconds_to, simulated
from distcomp.advice import TrainingTask

SEEDS, STEPS, BATCH = 5, 200, 8
LOSSES = (2.7, 2.55)
SHARED, AGREEING, TEST = 512, 4, 128
RATE = 3e-3
OWN = {"16 KiB each": ((2, 4, 8), 16 * 1024), "an equal share of everything": ((2,), None)}
"""How much text a worker has: among how many workers, and bytes of each."""
READS_SHARED, ONE = "alone, reads the shared text", "one worker, all text"
METHODS = {
    "DDP (identity)": "identity",
    "qsgd, 4 bits": "qsgd:bits=4",
    "pqasgd": "pqasgd",
    "DiLoCo, every 50": "diloco:period=50",
    "codistill, 16 texts in 8 bits": f"codistill:period=50,rows=16,batch={AGREEING},values=(qsgd:bits=8)",
    "codistill, 4 texts in 4 bits": f"codistill:period=50,rows=4,batch={AGREEING},values=(qsgd:bits=4)",
    "alone": ALONE,
    READS_SHARED: ALONE,
    ONE: ALONE,
}
PLAN = {
    "seeds": SEEDS, "steps": STEPS, "batch": BATCH, "own": OWN, "methods": METHODS, "shared": SHARED,
    "test_texts": TEST, "adam": RATE, "rate": "1mbit", "delay": "50ms", "text": fingerprint(),
}  # fmt: skip


def texts() -> tuple[list[Tensor], Tensor, Tensor]:
    """The modules that workers train on, the text that is shared, and the test's."""
    modules = list(library())
    test = torch.cat(modules[::10])
    del modules[::10]
    shared = torch.cat(modules[5::10])
    del modules[5::10]
    return modules, shared, test


class Batches:
    """``batch(worker, workers, step)`` of a task: texts of its own, and of what is shared if it ``reads``."""

    def __init__(self, own: list[Tensor], shared: Tensor, seed: int, reads: bool) -> None:
        self._own = Draws(own, BATCH, seed)
        self._shared = Draws([shared] * len(own), AGREEING, seed) if reads else None
        self._drawn = -1, next(self._own)

    def __call__(self, worker: int, workers: int, step: int) -> tuple[Tensor, Tensor]:
        if step != self._drawn[0]:  # every worker's at once
            self._drawn = step, self._of(step)
        inputs, targets = self._drawn[1]
        return inputs[worker], targets[worker]

    def _of(self, step: int) -> tuple[Tensor, Tensor]:
        self._own.step = step
        inputs, targets = next(self._own)
        if self._shared is None:
            return inputs, targets
        self._shared.step = step
        more = next(self._shared)
        return torch.cat([inputs, more[0]], 1), torch.cat([targets, more[1]], 1)


def own_texts(own: str, workers: int) -> list[Tensor]:
    """Each worker's."""
    return [text[: OWN[own][1]] for text in apart(texts()[0], workers)]


def task(own: list[Tensor], seed: int, reads_shared: bool) -> TrainingTask:
    """Workers with the text of their ``own``."""
    _, shared, test = texts()
    inputs, targets = (part[0] for part in next(Draws([test], TEST, 0)))

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        return {"test_loss": loss_of(model(inputs), targets).item()}

    def optimizer(weights: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(weights, RATE)

    unlabelled = next(Draws([shared], SHARED, 1))[0][0]
    torch.manual_seed(seed)
    batches = Batches(own, shared, seed, reads_shared)
    return TrainingTask(Reader(), batches, loss_of, optimizer, evaluate, shared=unlabelled)


def cell(own: str, name: str, workers: int, seed: int) -> dict[str, Any]:
    """The last metrics, bytes per worker and a curve of (step, seconds, loss)."""
    parts = own_texts(own, workers)
    if name == ONE:
        parts, workers = [torch.cat(parts)], 1
    return simulated(task(parts, seed, name == READS_SHARED), METHODS[name], workers, seed, STEPS)


def complete_seeds(cells: Mapping[str, Any], own: str, workers: int) -> list[int]:
    """The seeds of which every cell of a table is there."""
    return [
        seed
        for seed in range(SEEDS)
        if all(f"{own} | {name} | {workers} | {seed}" in cells for name in METHODS)
    ]


def table(cells: Mapping[str, Any], own: str, workers: int) -> str:
    """Markdown: the loss that was reached, by the bytes of one worker."""
    seeds = complete_seeds(cells, own, workers)
    head = [f"{workers} workers, {own}; {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"]
    head += ["test loss (nats per byte)", "Mbit sent by a worker"]
    head += [f"seconds to loss {loss}" for loss in LOSSES]
    lines = [head, ["---"] * len(head)]
    for name in METHODS if seeds else ():
        found = [cells[f"{own} | {name} | {workers} | {seed}"] for seed in seeds]
        loss, sent_bytes = (
            torch.tensor([row[field] for row in found], dtype=torch.float64)
            for field in ("test_loss", "sent_bytes")
        )
        spread = f" ± {loss.std():.3f}" if len(seeds) > 1 else ""
        when = [sum(seconds_to(row["curve"], wanted) for row in found) / len(found) for wanted in LOSSES]
        line = [name, f"{loss.mean():.3f}{spread}", f"{8 * sent_bytes.mean() / 1e6:,.2f}"]
        lines.append([*line, *(f"{at:,.1f}" if at < math.inf else "not in every seed" for at in when)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    over = no_more_cells(__doc__)
    torch.set_num_threads(1)
    study = Cells("codistill_lm", PLAN)
    groups = [(own, workers) for own, (counts, _) in OWN.items() for workers in counts]
    for own, (counts, _) in OWN.items():
        for seed, workers, name in itertools.product(range(SEEDS), counts, METHODS):
            if over():
                break
            study.get(f"{own} | {name} | {workers} | {seed}", lambda: cell(own, name, workers, seed))  # noqa: B023
    for own, workers in groups:
        print(table(study.document["cells"], own, workers), end="\n\n")


if __name__ == "__main__":
    main()
