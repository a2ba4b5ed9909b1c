"""Structure times codec: bits a step and rank, and accuracy, of two ranks on pairs of digits.

    python -m benchmarks.structured_codecs           # resumes; writes results/structured_codecs.json

Two processes over Gloo, unhindered, each with images of its own; both hidden layers have the structure.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import time
from typing import Any

import torch

from benchmarks import _structured_tasks as tasks
from benchmarks._common import Cells, arguments_of
from benchmarks._structured_tasks import HIDDEN, Task, numbers

STEPS, SEEDS, RANKS, RATE = 300, 3, 2, 2e-3
METHODS = ("identity", "qsgd:bits=4", "qsgd:bits=1", "topk:ratio=0.01")
STRUCTURES = ("dense", "circulant, b = 8", "hashed, 1/16", "low rank, r = 14", "plain, width 72")


def network(structure: str) -> torch.nn.Module:
    from distcomp import structured

    net = tasks.mlp(72 if structure.startswith("plain") else 256)
    if structure.startswith("circulant"):
        structured.circulant(net, 8, layers=HIDDEN["pairs"], start="variance", fft=False)
    elif structure.startswith("hashed"):
        structured.hashed(net, 16, layers=HIDDEN["pairs"], start="variance")
    elif structure.startswith("low rank"):
        structured.low_rank(net, 14, layers=HIDDEN["pairs"])
    return net


def rank_main(rank: int, port: int, structure: str, seed: int, answers: Any) -> None:
    """All methods, one after the other, in one process group."""
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    import distcomp

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo")
    found = {}
    for method in METHODS:
        data = Task("pairs", 100 * seed + rank)
        torch.manual_seed(seed)
        net = network(structure)
        model = DistributedDataParallel(net)
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
        )
        handle = distcomp.attach(model, optimizer, method, seed=seed)
        for _ in range(STEPS):
            inputs, targets = data.batch()
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
        sent = handle.stats()["payload_bytes"] / STEPS
        handle.detach()
        found[method] = {"parameters": numbers(net), "bytes_per_step": sent, "accuracy": data.accuracy(net)}
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def cell(structure: str, seed: int) -> dict[str, Any]:
    """One structure with every method."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=rank_main, args=(rank, port, structure, seed, answers))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        found: dict[str, Any] = answers.get(timeout=900)
    finally:
        for process in ranks:
            process.join(timeout=30)
            process.kill()
    return found


def main() -> None:
    parser: argparse.ArgumentParser = arguments_of(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so many; a later call goes on"
    )
    until = time.monotonic() + parser.parse_args().seconds
    plan = {
        "ranks": RANKS,
        "steps": STEPS,
        "rate": RATE,
        "optimizer": "Adam, cosine",
        "reduced": "3 seeds of 5",
    }
    cells = Cells("structured_codecs", plan)
    for seed in range(SEEDS):
        for structure in STRUCTURES:
            if time.monotonic() > until:
                return
            cells.get(f"{structure} | {seed}", lambda s=structure, n=seed: cell(s, n))
            cells.document["rows"] = tabulate(cells.document["cells"])
            cells.write()


def tabulate(cells: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, methods in cells.items():
        structure = key.partition(" | ")[0]
        for method, found in methods.items():
            row = rows.setdefault(
                f"{structure} | {method}", {"structure": structure, "method": method, **found, "accuracy": []}
            )
            row["accuracy"].append(found["accuracy"])
    return rows


if __name__ == "__main__":
    main()
