"""How far is the predicted step time from the measured one? Prediction first, then emulation, in one run.

    python -m benchmarks.model_error --ranks 4 --network 100mbit   # a cell; writes results/model_error.json
    python -m benchmarks.model_error --json                           # what the cells say together

A cell is a number of ranks and a network: ``10mbit``, ``100mbit``, ``1gbit``, or ``racks`` (100 Mbit/s in
two racks behind uplinks of 50 Mbit/s). What the prediction knows: the network that was asked for; of the
ranks, all at once and before any of what is predicted: how long a step computes, when its buckets are ready,
how long each method thinks between two requests (an echo answers); and what steps take, and take of a core,
in which zeros of a few sizes are sent, to all and around a ring (``distcomp.advice.calibrate``).

A step lasts from its start to the start of the next, in the mean over the ranks (what one rank is late in one
step it makes up for in the next); the median of the steps of two seconds counts. ``slowest_rank_s`` is the
median of what each step took on the rank where it took longest. Where many ranks share few cores (eight on
two: ``--turns 3``, in racks 2) two seconds are too few steps for a steady median.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, median, on_fabric, start, write
from benchmarks._places import RESULTS, ROOT
from distcomp.advice.calibrate import calibrate
from distcomp.advice.predict import predict, profile_method
from distcomp.network import Fabric, Rack, parse_rate
from distcomp.recording import surroundings

METHODS = (
    "ddp", "torch:fp16", "bf16", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=1",
    "qsgd:bits=4,pattern=all_gather",
    "powersgd:rank=4", "topk:ratio=0.01", "random_k:ratio=0.05", "dcd", "choco",
)  # fmt: skip
RESULT = RESULTS / "model_error.json"
LAYERS, BATCH = 4, 4
SIDES = {"10mbit": 512}
SIDE = 1024
SIZES = (1 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 2 << 20)
SECONDS, FEWEST, MOST = 2.0, 3, 15
CORES = len(os.sched_getaffinity(0))


def fabric_of(network: str, ranks: int) -> Fabric:
    """The network by its short name."""
    if network != "racks":
        return Fabric.uniform(ranks, network)
    half, uplink_bps = ranks // 2, parse_rate("50mbit")
    racks = (Rack(tuple(range(half)), uplink_bps), Rack(tuple(range(half, ranks)), uplink_bps))
    return Fabric((parse_rate("100mbit"),) * ranks, 0.0, racks)


def model(side: int) -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = [nn.Linear(side, side) for _ in range(LAYERS)]
    return DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=side * side * 4 / 2**20)


def stepper(ddp: DistributedDataParallel, side: int) -> Any:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    x = torch.randn(BATCH, side)

    def step() -> None:
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()

    return optimizer, step


# ------------------------------------------------------------------------------------ on the emulated ranks


def foretell(settings: dict[str, Any], ddp: DistributedDataParallel) -> dict[str, Any]:
    """All ranks at once: the machine, the network's messages, and what the model makes of it."""
    ranks = dist.get_world_size()
    fabric = fabric_of(settings["network"], ranks)
    _, step = stepper(ddp, settings["side"])
    dist.barrier()
    sizes = SIZES[:-1] if settings["network"] == "10mbit" else SIZES
    machine = calibrate(ddp, step, fabric, sizes, CORES)
    found = {}
    for method in settings["methods"]:
        dist.barrier()
        profiled = profile_method(method, machine.observed.layouts, ranks)
        found[method] = asdict(predict(profiled, machine, fabric))
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, found)
    mean = {
        method: {key: sum(one[method][key] for one in everyone) / ranks for key in found[method]}
        for method in found
    }
    told = {
        "step_s": machine.observed.step_s, "ready_s": machine.observed.ready_s, **asdict(machine.host)
    }  # fmt: skip
    return {"machine": told, "predicted": mean}


def measure(
    settings: dict[str, Any], ddp: DistributedDataParallel, predicted: dict[str, Any]
) -> dict[str, Any]:
    """Step times of every method, in turns, from the start of one step to the start of the next, by rank;
    of so many steps as may take two seconds."""
    mine: dict[str, list[float]] = {method: [] for method in settings["methods"]}
    phases: dict[str, dict[str, float]] = {}
    optimizer, step = stepper(ddp, settings["side"])
    for _ in range(settings["turns"]):
        for method in settings["methods"]:
            with distcomp.attach(ddp, optimizer, method) as handle:
                for _ in range(2):  # gossip begins by sending whole models
                    step()
                dist.barrier()  # otherwise one who was late there is felt far away, steps later
                starts_s = []
                steps = math.ceil(SECONDS / predicted[method]["step_s"])
                for _ in range(1 + min(max(steps, FEWEST), MOST)):
                    starts_s.append(time.perf_counter())
                    step()
                phases[method] = handle.stats()["last"]["phases"]
            mine[method] += [b - a for a, b in itertools.pairwise(starts_s)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    steps_s = {method: [one[method] for one in everyone] for method in settings["methods"]}
    return {"steps_s": steps_s, "phases": phases}


def rank_main(settings: Any) -> dict[str, Any]:
    ddp = model(settings["side"])
    found = foretell(settings, ddp)
    found |= measure(settings, ddp, found["predicted"])
    return found


# ----------------------------------------------------------------------------------------------- in one place


def cell(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict, then measure."""
    settings = {
        "network": arguments.network, "side": SIDES.get(arguments.network, SIDE),
        "methods": list(arguments.methods), "turns": arguments.turns,
    }  # fmt: skip

    fabric = fabric_of(arguments.network, arguments.ranks)
    found = on_fabric("model_error", fabric, settings)
    rows = {}
    for method, predicted in found["predicted"].items():
        together = list(zip(*found["steps_s"][method], strict=True))
        steps_s = [statistics.fmean(one) for one in together]
        took_s = median(steps_s)
        rows[method] = {
            "predicted_s": predicted["step_s"], "measured_s": took_s,
            "error": predicted["step_s"] / took_s - 1, "steps_s": steps_s, "prediction": predicted,
            "slowest_rank_s": median([max(one) for one in together]),
            "phases_of_rank_0": found["phases"][method],
        }  # fmt: skip
    return {
        "ranks": arguments.ranks, "network": arguments.network, "described": found["network"],
        "turns": arguments.turns,
        "gradient_bytes": 4 * LAYERS * settings["side"] * (settings["side"] + 1),
        "commit": surroundings(ROOT)["commit"], "machine": found["machine"], "methods": rows,
    }  # fmt: skip


def judge(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error, and pairs whose order is wrong though they differ by more than 15 %."""
    errors = {
        f"{one['ranks']} x {one['network']} {method}": row["error"]
        for one in cells
        for method, row in one["methods"].items()
    }
    worst = max(errors, key=lambda one: abs(errors[one]))
    wrong, pairs = [], 0
    for one in cells:
        rows = list(one["methods"].items())
        for index, (a, row) in enumerate(rows):
            for b, other in rows[index + 1 :]:
                slow, fast = sorted((row["measured_s"], other["measured_s"]), reverse=True)
                if slow <= 1.15 * fast:
                    continue
                pairs += 1
                if (row["measured_s"] < other["measured_s"]) != (row["predicted_s"] < other["predicted_s"]):
                    wrong.append(f"{one['ranks']} x {one['network']}: {a} and {b}")
    return {
        "predictions": len(errors), "median_error": median([abs(e) for e in errors.values()]),
        "worst_error": abs(errors[worst]), "worst": worst,
        "pairs_apart_by_15_percent": pairs, "pairs_in_the_wrong_order": wrong,
    }  # fmt: skip


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--network", help="measure this cell; without it, judge those that were")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cells = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    if arguments.network:
        new = cell(arguments)
        key = (arguments.ranks, arguments.network)
        cells = [one for one in cells if (one["ranks"], one["network"]) != key] + [new]
        for method, row in new["methods"].items():
            print(f"{method:<28}{row['predicted_s']:>9.4f}{row['measured_s']:>9.4f} s{row['error']:>+8.1%}")
    judged = [one for one in cells if one["network"] != "1gbit"]
    verdict = judge(judged) if judged else {}
    write("model_error", {"what": __doc__.splitlines()[0], "verdict": verdict, "cells": cells})
    print(json.dumps(verdict, indent=1), file=sys.stdout if arguments.json else sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
