"""Stochastic depth with shared coins: bytes, time and accuracy beside constant nets.

    python -m benchmarks.conditional_depth --wire       # bytes and time at 100 Mbit/s, by the interface
    python -m benchmarks.conditional_depth --accuracy   # five seeds, in one process
    python -m benchmarks.conditional_depth --replicas   # 1,000 steps on two ranks

Eight residual blocks of two layers on pairs of digits. All parameters are in one bucket, and coordinates are
cut out of it, or each block has a bucket of its own, which is dropped whole. Controls: coins of each rank's
own, and a constant net of six blocks, near the mean depth of 5.75.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, on_network, start
from benchmarks._conditional_tasks import Batches, pairs
from distcomp.conditional import LayerSwitch, stochastic_depth
from distcomp.network import read_qdisc_bytes

WIDTH, BLOCKS, LAST, BATCH, LR = 256, 8, 0.5, 128, 0.1
STEPS, WARM_UP = 80, 5
ACCURACY_STEPS, ACCURACY_WIDTH, SEEDS = 800, 96, 5
METHODS = ("identity", "qsgd:bits=4")
WIRE = {  # blocks, coins, megabytes of a bucket
    "constant, 8 blocks": (8, "", 25.0),
    "constant, 6 blocks": (6, "", 25.0),
    "shared coins, one bucket": (8, "shared", 25.0),
    "constant, 8 blocks, a bucket each": (8, "", 0.5),
    "shared coins, a bucket for each block": (8, "shared", 0.5),
    "private coins": (8, "private", 25.0),
}
ACCURACY = {"constant, 8 blocks": (8, 1.0), "constant, 6 blocks": (6, 1.0), "stochastic depth": (8, LAST)}
PLAN = {
    "width": WIDTH, "blocks": BLOCKS, "last": LAST, "batch": BATCH, "lr": LR, "steps": STEPS,
    "accuracy_steps": ACCURACY_STEPS, "accuracy_width": ACCURACY_WIDTH,
    "ranks": 2, "rate": "100mbit", "seeds": SEEDS,
}  # fmt: skip


class Block(nn.Module):
    """``x + W_2 relu(W_1 x)``, normalized first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        nn.init.zeros_(self.branch[-1].weight)  # a block begins as the identity: eight of them train

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


class Net(nn.Module):
    def __init__(self, blocks: int, inputs: int, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


def switch_of(model: nn.Module, coins: str, seed: int = 0) -> LayerSwitch | None:
    return stochastic_depth(model, "blocks.*", last=LAST, seed=seed, coins=coins) if coins else None


def trained(
    model: nn.Module, task: Batches, steps: int, draw: torch.Generator, batch: int = BATCH
) -> tuple[list[float], torch.optim.Optimizer]:
    """Seconds of each step."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times = []
    for _ in range(steps):
        inputs, labels = task(batch, draw)
        began_s = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        rates.step()
        times.append(time.perf_counter() - began_s)
    return times, optimizer


def wire_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """What one rank sends and how long its steps take."""
    blocks, coins, bucket_mb = WIRE[settings["name"]]
    task = pairs()
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(blocks, task.inputs, task.classes), bucket_cap_mb=bucket_mb)
    depth = switch_of(model, coins)
    method = depth.active_only(settings["method"]) if depth and coins == "shared" else settings["method"]
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    draw = torch.Generator().manual_seed(dist.get_rank())
    device = os.environ["DISTCOMP_DEVICE"]
    with distcomp.attach(model, optimizer, method) as handle:
        for step in range(WARM_UP + settings["steps"]):
            if step == WARM_UP:
                dist.barrier()
                ledger, queue, began_s = (
                    handle.stats()["payload_bytes"],
                    read_qdisc_bytes(device),
                    time.time(),
                )
                run_layers = depth.run_layers if depth else 0
            inputs, labels = task(BATCH, draw)
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        dist.barrier()
        steps = settings["steps"]
        mine = {
            "step_s": (time.time() - began_s) / steps,
            "interface_bytes": (read_qdisc_bytes(device) - queue) / steps,
            "payload_bytes": (handle.stats()["payload_bytes"] - ledger) / steps,
            "run_share": (depth.run_layers - run_layers) / steps / blocks if depth else 1.0,
        }
    everyone = gathered((mine, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    return mine | {"replicas_identical": all(torch.equal(everyone[0][1], own) for _, own in everyone)}


def replicas_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """A thousand steps with dropped blocks: are all ranks' weights the same bits at the end?"""
    task = pairs()
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(BLOCKS, task.inputs, task.classes, width=64))
    depth = switch_of(model, "shared")
    assert depth is not None
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    draw = torch.Generator().manual_seed(dist.get_rank())
    with distcomp.attach(model, optimizer, depth.active_only(settings["method"])):
        for _ in range(settings["steps"]):
            inputs, labels = task(32, draw)
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    everyone = gathered(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    identical = all(torch.equal(everyone[0], own) for own in everyone)
    return {"steps": settings["steps"], "replicas_identical": identical}


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    return replicas_rank(settings) if settings.get("replicas") else wire_rank(settings)


def accuracy(name: str, seed: int) -> dict[str, Any]:
    blocks, last = ACCURACY[name]
    task = pairs()
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Net(blocks, task.inputs, task.classes, ACCURACY_WIDTH)
    depth = switch_of(model, "shared", seed) if last < 1 else None
    times, _ = trained(model, task, ACCURACY_STEPS, torch.Generator().manual_seed(seed))
    model.eval()
    with torch.no_grad():
        scores = model(task.test[0])
    share = depth.run_layers / ACCURACY_STEPS / blocks if depth else 1.0
    return {
        "test_accuracy": (scores.argmax(1) == task.test[1]).float().mean().item(),
        "test_loss": cross_entropy(scores, task.test[1]).item(),
        "train_s": sum(times),
        "run_share": share,
    }


def main() -> None:
    parser = arguments_of(__doc__)
    for part in ("wire", "accuracy", "replicas"):
        parser.add_argument(f"--{part}", action="store_true")
    wanted = parser.parse_args()
    cells = Cells("conditional_depth", PLAN)
    if wanted.wire:
        for method in METHODS:
            for name in WIRE:
                settings = {"name": name, "method": method, "steps": STEPS}
                cells.get(
                    f"wire|{method}|{name}",
                    lambda settings=settings: on_network("conditional_depth", 2, "100mbit", settings),
                )
    if wanted.replicas:
        settings = {"replicas": True, "method": "qsgd:bits=4", "steps": 1000}
        cells.get("replicas", lambda: on_network("conditional_depth", 2, "1gbit", settings))
    if wanted.accuracy:
        for seed in range(SEEDS):
            for name in ACCURACY:
                cells.get(f"accuracy|{name}|{seed}", lambda name=name, seed=seed: accuracy(name, seed))


if __name__ == "__main__":
    start(main, rank_main)
