"""Parameters, multiplications, time and accuracy of each block, on one digit somewhere on a noisy canvas.

    python -m benchmarks.blocks_table            # resumes; writes results/blocks_table.json
    python -m benchmarks.blocks_table --times    # and then measures CPU times of one thread

The networks of ``examples/architectures.py``: two 3 x 3 convolutions (32 -> 32 -> 64 channels) are replaced
by each block, and a few whole networks. A forward and backward of 64 images is timed in CPU seconds of one
thread, the median of 15.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks._common import Cells, arguments_of, mean_and_spread, median
from benchmarks._places import example
from distcomp import structured

SEEDS, STEPS, BATCH, RATE = 2, 200, 64, 3e-3


def multiplications(net: nn.Module, x: torch.Tensor) -> int:
    """Of one image; Winograd's are counted as those of the convolution that it is."""
    return int(structured.summary(net, x[:1]).total("multiplications")[1])


def cell(name: str, seed: int) -> dict[str, Any]:
    """One network, trained."""
    shapes = example("architectures")
    torch.manual_seed(seed)
    net = shapes.NETWORKS[name](1.0)
    train, held_out = shapes.digits()
    draw = torch.Generator().manual_seed(100 + seed)
    test = shapes.shifted(*held_out, 2000, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        inputs, labels = shapes.shifted(*train, BATCH, draw)
        optimizer.zero_grad()
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "multiplications": multiplications(net, test[0]),
        "accuracy": shapes.accuracy(net, *test),
    }


def step_s(name: str) -> float:
    """Forward and backward of a batch, the median of 15."""
    shapes = example("architectures")
    net, times = shapes.NETWORKS[name](1.0), []
    inputs, labels = shapes.shifted(*shapes.digits()[0], BATCH, torch.Generator().manual_seed(0))
    for _ in range(15):
        net.zero_grad()
        began_s = time.process_time()
        cross_entropy(net(inputs), labels).backward()
        times.append(time.process_time() - began_s)
    return median(times)


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By network: parameters, multiplications, accuracy over the seeds that are there."""
    table = {}
    for name in example("architectures").NETWORKS:
        rows = [cells[f"{name} | {seed}"] for seed in range(SEEDS) if f"{name} | {seed}" in cells]
        if rows:
            table[name] = {**rows[0], "accuracy": mean_and_spread([row["accuracy"] for row in rows])}
    return table


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so many; a later call goes on"
    )
    parser.add_argument("--times", action="store_true", help="measure times, and nothing else")
    wanted = parser.parse_args()
    until = time.monotonic() + wanted.seconds
    torch.set_num_threads(1)
    names = list(example("architectures").NETWORKS)
    plan = {"steps": STEPS, "batch": BATCH, "rate": RATE, "reduced": "small networks, 2 seeds"}
    cells = Cells("blocks_table", plan)
    if wanted.times:
        step_s(names[0])  # what is made once is made
        cells.document["step_s"] = {name: step_s(name) for name in names}
        cells.write()
        return
    planned = [(f"{name} | {seed}", name, seed) for seed in range(SEEDS) for name in names]
    for key, name, seed in planned:
        if time.monotonic() > until:
            break
        cells.get(key, lambda n=name, s=seed: cell(n, s))
    done = cells.document["cells"]
    cells.document["table"] = tabulate(done)
    cells.write()
    print("done" if all(key in done for key, _, _ in planned) else "to be continued")


if __name__ == "__main__":
    main()
