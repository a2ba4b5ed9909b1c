"""Pruned in training and sent in 4 bits: what is left of DDP's bytes, loss and time, as the kernel counts?

    python -m benchmarks.pruned_wire            # writes results/pruned_wire.json

Four ranks on an emulated network of 100 Mbit/s train the net of ``examples/digits.py``, and one process
trains it on the same batches, joined. A cubic schedule prunes to 90 % in the first part of the run;
afterwards the mask is frozen. Bytes are what a rank's queue was charged (headers, acknowledgements and the
check of masks included), the mean over ranks; seconds are rank 0's, tests of the model left out.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, on_network, start, write
from benchmarks._places import example
from distcomp import pruning
from distcomp.network import read_qdisc_bytes

digits = example("digits")

RANKS, RATE, EVERY = 4, "100mbit", 10
PRUNED = "pruned "
ARMS = ("ddp", "qsgd:bits=4", "pruned identity", "pruned qsgd:bits=4")


@dataclass(frozen=True)
class Plan:
    steps: int
    frozen_from: int
    """The step from which the mask stays, a multiple of 10; pruning begins at a third of it."""
    width: int
    seeds: int
    target: float
    """The test loss whose time is taken."""

    def training_task(self, seed: int) -> Any:
        asked = {"steps": self.steps, "width": self.width, "seed": seed, "lr": 0.3}
        return digits.training_task([f"--{name}={value}" for name, value in asked.items()])

    def prune(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> pruning.Pruner:
        begin, end = self.frozen_from // 3, self.frozen_from - 1
        return pruning.gradual(model, optimizer, 0.9, begin=begin, end=end, every=5, scope="global")


def train(plan: Plan, seed: int, arm: str) -> dict[str, Any]:
    """This rank's bytes up to the frozen mask and after it, and rank 0's curve: seconds and test loss."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), os.environ["DISTCOMP_DEVICE"]
    training_task, method = plan.training_task(seed), arm.removeprefix(PRUNED)
    model = DistributedDataParallel(training_task.model)
    optimizer = training_task.optimizer(model.parameters())
    schedule = training_task.schedule(optimizer)
    masked = arm != method
    carrier = distcomp.masked(plan.prune(model, optimizer), method) if masked else method
    counts, curve, train_s = [], [], 0.0
    with distcomp.attach(model, optimizer, carrier, seed=seed) as handle:
        for step in range(plan.steps + 1):
            if step in (0, plan.frozen_from, plan.steps):
                dist.barrier()
                counts.append((read_qdisc_bytes(device), handle.stats()["payload_bytes"]))
            if rank == 0 and step % EVERY == 0:
                curve.append({"step": step, "train_s": train_s, **training_task.evaluate(model.module)})
            if step < plan.steps:
                began_s = time.perf_counter()
                inputs, targets = training_task.batch(rank, size, step)
                optimizer.zero_grad()
                training_task.loss(model(inputs), targets).backward()
                optimizer.step()
                schedule.step()
                train_s += time.perf_counter() - began_s
    return {"counts": counts, "curve": curve}


def alone(plan: Plan, seed: int) -> dict[str, float]:
    """One process that prunes alike, in float32, on the batches of all ranks."""
    training_task = plan.training_task(seed)
    model = training_task.model
    optimizer = training_task.optimizer(model.parameters())
    schedule = training_task.schedule(optimizer)
    plan.prune(model, optimizer)
    for step in range(plan.steps):
        inputs, targets = zip(*(training_task.batch(rank, RANKS, step) for rank in range(RANKS)), strict=True)
        optimizer.zero_grad()
        training_task.loss(model(torch.cat(inputs)), torch.cat(targets)).backward()
        optimizer.step()
        schedule.step()
    found: dict[str, float] = training_task.evaluate(model)
    return found


def rank_main(settings: Any) -> dict[str, Any]:
    plan = Plan(**settings)
    mine = {arm: [train(plan, seed, arm) for seed in range(plan.seeds)] for arm in ARMS}
    everyone = gathered(mine)
    return {"ranks": everyone}


def row(plan: Plan, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One arm: ``runs`` by rank and seed."""
    begin, frozen, end = (
        [statistics.mean(run["counts"][at][kind] for rank in runs for run in rank) for kind in (0, 1)]
        for at in range(3)
    )
    curves = [run["curve"] for run in runs[0]]
    hits = [next((one for one in curve if one["test_loss"] <= plan.target), {}) for curve in curves]
    late = plan.steps - plan.frozen_from
    return {
        "queue_bytes_per_step": (end[0] - begin[0]) / plan.steps,
        "queue_bytes_per_step_frozen": (end[0] - frozen[0]) / late,
        "payload_bytes_per_step_frozen": (end[1] - frozen[1]) / late,
        "step_s_frozen": statistics.mean(
            (curve[-1]["train_s"] - curve[plan.frozen_from // EVERY]["train_s"]) / late for curve in curves
        ),
        "seconds_to_target": [one.get("train_s") for one in hits],
        "steps_to_target": [one.get("step") for one in hits],
        "test_loss": [curve[-1]["test_loss"] for curve in curves],
        "test_accuracy": [curve[-1]["test_accuracy"] for curve in curves],
        "curve": curves[0],
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--frozen-from", type=int, default=120)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.5)
    plan = Plan(**vars(parser.parse_args()))
    torch.set_num_threads(1)
    single = [alone(plan, seed) for seed in range(plan.seeds)]
    raw = on_network("pruned_wire", RANKS, RATE, asdict(plan))
    arms = {arm: row(plan, [rank[arm] for rank in raw["ranks"]]) for arm in ARMS}
    for one in arms.values():
        for key in ("queue_bytes_per_step", "queue_bytes_per_step_frozen"):
            one[f"fewer_{key}"] = arms["ddp"][key] / one[key]
    arms["one process, pruned"] = {key: [one[key] for one in single] for key in single[0]}
    for arm, one in arms.items():
        print(arm, {key: value for key, value in one.items() if key != "curve"})
    write("pruned_wire", {"ranks": RANKS, "rate": RATE, "network": raw["network"],
                          "plan": asdict(plan), "arms": arms})  # fmt: skip


if __name__ == "__main__":
    start(main, rank_main)
