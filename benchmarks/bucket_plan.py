"""Which bucket size is fastest, and does the prediction know? Every size in turn, in one run.

    python -m benchmarks.bucket_plan        # writes results/bucket_plan.json

Four ranks at 100 Mbit/s, without a delay and with one of 20 ms; 16 layers of 1 MiB and a batch that makes
backward worth overlapping. Each size is a DistributedDataParallel of its own (``default``: no
``bucket_cap_mb``), all with the same weights and batches; the methods take turns on all of them.

Two predictions, both before anything is measured of the sizes: ``predicted_s`` from what
``distcomp.advice.calibrate`` measured among the ranks with the default's buckets; ``advised_s`` from what
``distcomp advise --ranks-here 4`` knows, which sends nothing. A step lasts from its start to the start of the
next, in the mean over the ranks; medians over all turns. ``first_s`` is the first step of each model, whose
buckets DistributedDataParallel has not rebuilt yet, beside ``first_predicted_s``.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, median, on_network, start, write
from distcomp.advice import BucketAdvice, advise_buckets, calibrate
from distcomp.advice.overlap import EXCHANGE_CORE_S
from distcomp.network import Fabric
from distcomp.network.model import Host

RANKS, RATE, DELAYS = 4, "100mbit", ("0ms", "20ms")
SIDE, LAYERS, BATCH = 512, 16, 64
METHODS = ("powersgd:rank=4", "qsgd:bits=4")
SIZES: dict[str, float | None] = {"default": None, "0.5": 0.5, "2": 2, "4": 4, "8": 8, "25": 25}
"""MiB. 25 are one bucket: all gradients are 17 MB."""
CALIBRATED_BYTES = (1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
CORES = len(os.sched_getaffinity(0))


class Trained:
    """A model with buckets of a size, and its steps."""

    def __init__(self, cap_mb: float | None) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(SIDE, SIDE) for _ in range(LAYERS)]
        self.ddp = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=cap_mb)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=1e-3)
        self.x = torch.randn(BATCH, SIDE)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.ddp(self.x).square().mean().backward()
        self.optimizer.step()

    def timed(self, method: str, steps: int, warm_up: int) -> list[float]:
        """Seconds from the start of a step to the start of the next."""
        with distcomp.attach(self.ddp, self.optimizer, method):
            for _ in range(warm_up):
                self.step()
            dist.barrier()
            moments_s = [time.perf_counter()]
            for _ in range(steps):
                self.step()
                moments_s.append(time.perf_counter())
        return [later - earlier for earlier, later in itertools.pairwise(moments_s)]


def foretell(fabric: Fabric, trained: Trained) -> dict[str, Any]:
    """Of each method, with both machines: seconds by size, as rank 0 predicts them, and its advice."""
    machine = calibrate(trained.ddp, trained.step, fabric, CALIBRATED_BYTES, CORES)
    alone = replace(machine, host=Host(RANKS, CORES, exchange_s=EXCHANGE_CORE_S))
    found: dict[str, Any] = {}
    for method in METHODS:
        dist.barrier()  # all compute at once, as they do in steps
        found[method] = {
            name: told(advise_buckets(method, one, fabric))
            for name, one in (("predicted", machine), ("advised", alone))
        }
    return found


def told(advice: BucketAdvice) -> dict[str, Any]:
    """The prediction of each size that is measured: a size that is not among the advice's makes the buckets
    of the largest that is, below it."""
    by_size: dict[str, Any] = {}
    for name, cap_mb in SIZES.items():
        below = [row for row in advice.rows[1:] if cap_mb is not None and (row.cap_mb or 0) <= cap_mb]
        row = below[-1] if below else advice.rows[0]
        by_size[name] = {"cap_mb": row.cap_mb, "buckets": row.buckets, "step_s": row.step_s}
    return {
        "sizes": by_size, "sentence": advice.sentence, "cap_mb": advice.best.cap_mb,
        "first_step_s": advice.first_step_s,
    }  # fmt: skip


def rank_main(settings: Any) -> dict[str, Any]:
    fabric = Fabric.uniform(RANKS, RATE, settings["delay"])
    models = {name: Trained(cap_mb) for name, cap_mb in SIZES.items()}
    first = {name: one.timed(METHODS[0], 1, 0)[0] for name, one in models.items()}
    found = foretell(fabric, models["default"])
    mine: dict[str, list[float]] = {f"{method} {name}": [] for method in METHODS for name in SIZES}
    for _ in range(settings["turns"]):
        for method, (name, one) in itertools.product(METHODS, models.items()):
            mine[f"{method} {name}"] += one.timed(method, settings["steps"], 2)
    return {"foretold": found, "first": gathered(first), "steps": gathered(mine)}


def rows_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Of each method: predicted and measured by size, and what the advised size takes beside the default."""
    rows: dict[str, Any] = {}
    for method in METHODS:
        predicted, advised = (raw["foretold"][method][name] for name in ("predicted", "advised"))
        sizes = {}
        for name in SIZES:
            steps = zip(*(one[f"{method} {name}"] for one in raw["steps"]), strict=True)
            sizes[name] = {
                "cap_mb": predicted["sizes"][name]["cap_mb"],
                "buckets": predicted["sizes"][name]["buckets"],
                "measured_s": median([statistics.fmean(one) for one in steps]),
                "predicted_s": predicted["sizes"][name]["step_s"],
                "advised_s": advised["sizes"][name]["step_s"],
            }
        fastest = min(sizes, key=lambda name: sizes[name]["measured_s"])
        rows[method] = {
            "sizes": sizes, "fastest": fastest,
            **{
                name: {
                    "sentence": one["sentence"], "cap_mb": one["cap_mb"],
                    "over_default": chosen(one["cap_mb"], sizes),
                }
                for name, one in (("calibrated", predicted), ("advise", advised))
            },
        }  # fmt: skip
    return rows


def chosen(cap_mb: float | None, sizes: dict[str, Any]) -> float:
    """What a step in the advised buckets took, over one in the default's."""
    advised_s = next(one["measured_s"] for one in sizes.values() if one["cap_mb"] == cap_mb)
    return float(advised_s / sizes["default"]["measured_s"])


def cell(delay: str, turns: int, steps: int) -> dict[str, Any]:
    """One network."""
    raw = on_network("bucket_plan", RANKS, RATE, {"delay": delay, "turns": turns, "steps": steps}, delay)
    first = [statistics.fmean(one) for one in zip(*(each.values() for each in raw["first"]), strict=True)]
    return {
        "delay": delay, "network": raw["network"], "methods": rows_of(raw), "first_s": median(first),
        "first_predicted_s": raw["foretold"][METHODS[0]]["predicted"]["first_step_s"],
    }  # fmt: skip


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--delays", nargs="*", default=DELAYS)
    arguments = parser.parse_args()
    cells = [cell(delay, arguments.turns, arguments.steps) for delay in arguments.delays]
    about = {"ranks": RANKS, "rate": RATE, "gradient_bytes": 4 * LAYERS * SIDE * (SIDE + 1)}
    path = write("bucket_plan", {"what": __doc__.splitlines()[0], **about, "cells": cells})
    print(json.dumps(cells, indent=1))
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
