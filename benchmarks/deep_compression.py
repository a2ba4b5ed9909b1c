"""How small does a trained net become at what accuracy? Pruned, shared, coded; against the same net dense.

    python benchmarks/deep_compression.py            # writes results/deep_compression.json

LeNet-300-100 on digit pairs (the last digit of a sum), paired seeds: the dense net and the compressed one
start from the same weights and see the same batches for the same number of steps. Bytes are the file's,
table and header included, against the float32 state dict. The model that is judged is the one read back from
the file. Each seed is kept in the result file as it is done: started again, the script goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, write
from torch import nn
from torch.nn.functional import cross_entropy

from distcomp import pruning

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits

TARGET, BITS = {"0.weight": 0.92, "2.weight": 0.9, "4.weight": 0.6}, 4
TUNING = 0.15
"""The share of the steps in which centroids are trained."""


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(128, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )  # fmt: skip


def train(
    net: nn.Module, steps: range, total: int, draw: torch.Generator, lr: float, set_up: Any = None
) -> None:
    """Adam, with a rate that falls along a cosine over ``total`` steps."""
    (images, labels), _ = digits.digits()
    optimizer = torch.optim.Adam(net.parameters(), lr)
    if set_up is not None:
        set_up(optimizer)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item()) / 2
        inputs, targets = digits.pairs(images, labels, 128, draw)
        optimizer.zero_grad()
        cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def accuracy(net: nn.Module) -> tuple[float, float]:
    _, held_out = digits.digits()
    return digits.evaluate(net, *digits.pairs(*held_out, 20_000, torch.Generator().manual_seed(0)))


def cell(seed: int, steps: int) -> dict[str, Any]:
    """One seed: the dense net and the compressed one."""
    found: dict[str, Any] = {}
    torch.manual_seed(seed)
    start = {name: value.clone() for name, value in lenet().state_dict().items()}
    dense = lenet()
    dense.load_state_dict(start)
    train(dense, range(steps), steps, torch.Generator().manual_seed(seed), 2e-3)
    found["dense_loss"], found["dense_accuracy"] = accuracy(dense)
    net = lenet()
    net.load_state_dict(start)
    draw, tuned = torch.Generator().manual_seed(seed), int(steps * (1 - TUNING))
    pruners: list[pruning.Pruner] = []

    def prune(optimizer: torch.optim.Optimizer) -> None:
        cuts = tuple(int(steps * at) for at in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4))
        pruners.append(pruning.magnitude(net, optimizer, TARGET, steps=cuts))

    train(net, range(tuned), steps, draw, 2e-3, prune)
    pruners[0].settle()
    pruners[0].detach()
    found["sparsity"] = 1 - pruners[0].density
    found["pruned_loss"], found["pruned_accuracy"] = accuracy(net)
    pruning.share(net, BITS)
    train(net, range(tuned, steps), steps, draw, 1e-3)
    state = pruning.plain_state(net)
    data = pruning.compress(state, BITS)
    again = lenet()
    again.load_state_dict(pruning.decompress(data))
    found["bit_equal"] = all(
        torch.equal(again.state_dict()[n], state[n]) for n in state if n.endswith("weight")
    )
    found["loss"], found["accuracy"] = accuracy(again)
    found["dense_bytes"] = sum(4 * value.numel() for value in start.values())
    found["file_bytes"] = len(data)
    found["smaller"] = found["dense_bytes"] / len(data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "deep_compression.json"
    settings = {"steps": arguments.steps, "bits": BITS, "target": TARGET}
    cells: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text())
        cells = old["cells"] if old["settings"] == settings else {}
    for seed in range(arguments.seeds):
        if str(seed) not in cells:
            cells[str(seed)] = cell(seed, arguments.steps)
        print(seed, json.dumps(cells[str(seed)]), flush=True)
        keys = ("dense_accuracy", "accuracy", "dense_loss", "loss", "smaller", "file_bytes", "sparsity")
        mean = {key: statistics.mean(one[key] for one in cells.values()) for key in keys}
        write("deep_compression", {"net": "LeNet-300-100 (128-300-100-10)", "settings": settings,
                                   "mean": mean, "cells": cells})  # fmt: skip


if __name__ == "__main__":
    main()
