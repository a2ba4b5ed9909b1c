"""How long until a loss is there, by real packets at 1 Mbit/s and 50 ms? Pairs of digits, 2 and 4 workers.

    python -m benchmarks.codistill_network                 # writes results/codistill_network.json; resumes
    python -m benchmarks.codistill_network --seconds 60    # some cells of it
    python -m benchmarks.codistill_network --show

The task of :mod:`benchmarks.codistill`, as many processes as workers on an emulated network, each method in
a run of its own. Every 25 steps a rank writes its network down; its clock stands still meanwhile. After the
run the networks of a step are one, averaged, or tested one by one and their losses averaged where they are
each worker's own. The seconds of a step are those of the slowest rank. Computing takes what it takes on this
machine: milliseconds a step. Where all ranks are stopped from outside for a while (another measurement has
the machine), a thread that wakes every 50 ms notices, and the clock leaves those seconds out.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import threading
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import distcomp
from benchmarks import codistill
from benchmarks._common import Cells, gathered, no_more_cells, on_network, start
from benchmarks._tables import markdown
from distcomp.averaging.codistill import Codistillation

SEEDS, STEPS, EVERY, WORKERS = 2, 250, 25, (2, 4)
LOSSES = (1.0, 0.8)
RATE, DELAY = "1mbit", "50ms"
METHODS = {name: spec for name, spec in codistill.METHODS.items() if spec != "one worker"}
PLAN = {
    "seeds": SEEDS, "steps": STEPS, "every": EVERY, "workers": WORKERS, "methods": METHODS, "rate": RATE,
    "delay": DELAY, "batch": codistill.BATCH, "shared": codistill.SHARED,
}  # fmt: skip


class RunningClock:
    """Seconds during which this process was not stopped: a gap of more than a second between two wakings of a
    thread is left out."""

    TICK_S, GAP_S = 0.05, 1.0

    def __init__(self) -> None:
        self.stopped_s = 0.0
        self._woke_s = time.perf_counter()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now_s(self) -> float:
        """Seconds since anything, without those that were left out."""
        with self._lock:
            return self._seen() - self.stopped_s

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _seen(self) -> float:
        """The time now; a gap before it is counted. Under the lock."""
        now_s = time.perf_counter()
        gap_s = now_s - self._woke_s
        self.stopped_s += gap_s if gap_s > self.GAP_S else 0.0
        self._woke_s = now_s
        return now_s

    def _watch(self) -> None:
        while not self._over.wait(self.TICK_S):
            with self._lock:
                self._seen()


def rank_main(settings: Any) -> dict[str, Any]:
    """Train; the networks of each step go to a folder that all ranks see."""
    rank, size, seed = dist.get_rank(), dist.get_world_size(), settings["seed"]
    task = codistill.task(seed)
    model = DistributedDataParallel(task.model)
    optimizer = task.optimizer(model.parameters())
    kept, clock_s, spent_s, clock = [], [], 0.0, RunningClock()
    with distcomp.attach(model, optimizer, settings["method"], shared=task.shared, seed=seed) as handle:
        dist.barrier()
        for step in range(STEPS):
            inputs, targets = task.batch(rank, size, step)
            begin_s = clock.now_s()
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            spent_s += clock.now_s() - begin_s
            if (step + 1) % EVERY == 0:
                kept.append(parameters_to_vector(task.model.parameters()).detach().clone())
                clock_s.append(spent_s)
        sent_bytes = handle.stats()["payload_bytes"]
    clock.close()
    torch.save(torch.stack(kept), Path(settings["folder"]) / f"{rank}.pt")
    told = gathered({"clock_s": clock_s, "sent_bytes": sent_bytes, "stopped_s": clock.stopped_s})
    return {
        "clock_s": [max(each) for each in zip(*(one["clock_s"] for one in told), strict=True)],
        "sent_bytes": sum(one["sent_bytes"] for one in told) / size,
        "stopped_s": max(one["stopped_s"] for one in told),
    }


def cell(method: str, workers: int, seed: int) -> dict[str, Any]:
    """One run: bytes per worker, and a curve of (step, seconds, loss, accuracy)."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"method": method, "seed": seed, "folder": folder}
        found = on_network("codistill_network", workers, RATE, settings, DELAY)
        networks = torch.stack(
            [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(workers)], dim=1
        )
    apart = isinstance(distcomp.parse(method), Codistillation)
    curve = []
    for at, (seconds, each) in enumerate(zip(found.pop("clock_s"), networks, strict=True), 1):
        tested = [_tested(one, seed) for one in (each if apart else each.mean(0, keepdim=True))]
        loss, accuracy = (sum(row[i] for row in tested) / len(tested) for i in (0, 1))
        curve.append([at * EVERY, seconds, loss, accuracy])
    return {**found, "test_loss": curve[-1][2], "test_accuracy": curve[-1][3], "curve": curve}


def _tested(weights: Tensor, seed: int) -> tuple[float, float]:
    """(loss, accuracy) of a network on the test's pairs."""
    task = codistill.task(seed)
    model: nn.Module = deepcopy(task.model)
    vector_to_parameters(weights, model.parameters())
    assert task.evaluate is not None
    with torch.no_grad():
        found = task.evaluate(model)
    return found["test_loss"], found["test_accuracy"]


def complete_seeds(cells: Mapping[str, Any], workers: int) -> list[int]:
    """The seeds of which every cell of a table is there."""
    return [s for s in range(SEEDS) if all(f"{name} | {workers} | {s}" in cells for name in METHODS)]


def table(cells: Mapping[str, Any], workers: int) -> str:
    """Markdown: seconds until a loss was there, by the clock."""
    seeds = complete_seeds(cells, workers)
    head = [f"{workers} workers, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"]
    head += [*(f"seconds to loss {loss}" for loss in LOSSES), f"seconds for {STEPS} steps"]
    head += ["test loss then", "Mbit sent by a worker"]
    rows = []
    for name in METHODS if seeds else ():
        found = [cells[f"{name} | {workers} | {seed}"] for seed in seeds]
        when = [[codistill.seconds_to(row["curve"], loss) for row in found] for loss in LOSSES]
        told = [_told(each) for each in when]
        whole = _told([row["curve"][-1][1] for row in found])
        loss, sent_bytes = (sum(row[f] for row in found) / len(found) for f in ("test_loss", "sent_bytes"))
        rows.append([name, *told, whole, f"{loss:.2f}", f"{8 * sent_bytes / 1e6:,.2f}"])
    return markdown(head, rows)


def _told(seconds: list[float]) -> str:
    """Of each seed, so that a mean hides nothing."""
    return ", ".join(f"{s:,.1f}" if s < math.inf else "not reached" for s in seconds)


def main() -> None:
    over = no_more_cells(__doc__)
    torch.set_num_threads(1)
    study = Cells("codistill_network", PLAN)
    for seed, workers, (name, method) in itertools.product(range(SEEDS), WORKERS, METHODS.items()):
        if over():
            break
        study.get(f"{name} | {workers} | {seed}", lambda: cell(method, workers, seed))  # noqa: B023
    for workers in WORKERS:
        print(table(study.document["cells"], workers), end="\n\n")


if __name__ == "__main__":
    start(main, rank_main)
