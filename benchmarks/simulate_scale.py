"""How long do a thousand workers take in one process, and does it grow with their number?

    python -m benchmarks.simulate_scale --method dcd --workers 1024 --steps 200   # a cell
    python -m benchmarks.simulate_scale                                            # the fits over all cells

Pairs of digits, 27,674 parameters, each worker with a model and data of its own (drawn with replacement).
A cell is a process: its seconds of training and its peak memory, the interpreter's own included. The fit is
``a + b n`` by least squares over all cells of a method.
Where all must agree they gather: cut into a piece for each worker, as ``pattern=reduce_scatter`` does, a
round of a thousand is a million messages, here as on a network.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import numpy as np

from benchmarks._common import arguments_of, call, rank_command, write
from benchmarks._places import EXAMPLES, RESULTS, ROOT

RESULT = RESULTS / "simulate_scale.json"
SCRIPT = EXAMPLES / "digits.py"
METHODS = ("dcd", "choco", "pqasgd:pattern=all_gather", "qsgd:pattern=all_gather")
WORKERS = (16, 64, 256, 1024)
WIDTH, BATCH = 112, 16


def cell(method: str, workers: int, steps: int) -> dict[str, Any]:
    """Train; what it took."""
    import torch

    from distcomp.advice import Scenario, Setting, Simulation, task_of
    from distcomp.methods import parse
    from distcomp.network import Fabric

    given = ["--width", str(WIDTH), "--batch", str(BATCH), "--steps", str(steps)]
    training_task = task_of(SCRIPT, given)
    fabric = Fabric.uniform(workers, "200mbit", "40ms")
    simulation = Simulation(training_task, parse(method), Setting(fabric, Scenario(compute_s=0.02)))
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(steps):
        simulation.step()
    taken_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    return {
        "method": method, "workers": workers, "steps": steps, "parameters": simulation.layout.numel,
        "seconds": taken_s, "cpu_seconds": cpu_s, "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "batched": simulation.batched, "simulated": simulation.evaluate(),
    }  # fmt: skip


def fit(workers: list[int], values: list[float]) -> dict[str, float]:
    """``a + b n`` and how much of the variance it explains."""
    slope, intercept = np.polyfit(workers, values, 1)
    rest = np.array(values) - (intercept + slope * np.array(workers))
    return {"a": intercept, "b": slope, "r_squared": 1 - float(rest.var() / np.var(values))}


def fits(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: CPU seconds of a step, and peak memory, against workers."""
    found = {}
    for method in dict.fromkeys(one["method"] for one in cells):
        mine = sorted((one for one in cells if one["method"] == method), key=lambda one: one["workers"])
        if len(mine) < 3:
            continue
        workers = [one["workers"] for one in mine]
        found[method] = {
            "cpu_seconds_per_step": fit(workers, [one["cpu_seconds"] / one["steps"] for one in mine]),
            "peak_bytes": fit(workers, [one["peak_bytes"] for one in mine]),
        }
    return found


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--workers", type=int, nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", action="store_true", help="print one cell (used by this script itself)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(cell(arguments.method, arguments.workers[0], arguments.steps)))
        return
    kept = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    cells = [one for one in kept if one["method"] in METHODS]
    for workers in arguments.workers:
        command = [
            *rank_command("simulate_scale"), "--one", "--method", arguments.method,
            "--workers", str(workers), "--steps", str(arguments.steps),
        ]  # fmt: skip
        new = json.loads(call(command, cwd=ROOT).splitlines()[-1])
        cells = [one for one in cells if (one["method"], one["workers"]) != (new["method"], workers)] + [new]
        result = {"what": (__doc__ or "").splitlines()[0], "fits": fits(cells), "cells": cells}
        write("simulate_scale", result)
        print(
            {key: new[key] for key in ("method", "workers", "steps", "seconds", "cpu_seconds", "peak_bytes")}
        )
    print(json.dumps(fits(cells), indent=1), file=sys.stdout if arguments.json else sys.stderr)


if __name__ == "__main__":
    main()
