"""Pruned in training and sent in 4 bits: how many bytes are left of DDP's, by the kernel's own count?

    python benchmarks/pruned_wire.py            # writes results/pruned_wire.json

Four ranks on an emulated network of 100 Mbit/s train the net of ``examples/digits.py`` at another width. DDP
in float32, 4 bits, and 4 bits for living weights only while a cubic schedule prunes to 90 % in the first part
of the run; afterwards the mask is frozen. Bytes are what each rank's queue was charged, acknowledgements
and one barrier a step included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import pruning
from distcomp.network import read_qdisc_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digits

ARMS = ("ddp", "qsgd:bits=4", "pruned qsgd:bits=4")
LR = 0.3


def train(arm: str, steps: int, frozen_from: int) -> list[dict[str, float]]:
    """One arm: bytes and seconds of each step, and the loss on this rank's batch."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    (images, labels), held_out = digits.digits()
    mine = images[rank::workers], labels[rank::workers]
    draw = torch.Generator().manual_seed(rank)
    torch.manual_seed(0)
    model = DistributedDataParallel(digits.network())
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.8, nesterov=True)
    method: Any = arm.removeprefix("pruned ")
    if arm != method:
        pruner = pruning.gradual(model, optimizer, 0.9, begin=frozen_from // 4, end=frozen_from - 1, every=5)
        method = distcomp.masked(pruner, method)
    test = digits.pairs(*held_out, 4000, torch.Generator().manual_seed(0))
    found = []
    with distcomp.attach(model, optimizer, method) as handle:
        for _ in range(steps):
            dist.barrier()
            sent, began_s = read_qdisc_bytes(os.environ["DISTCOMP_DEVICE"]), time.perf_counter()
            inputs, targets = digits.pairs(*mine, 128, draw)
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            step_s = time.perf_counter() - began_s
            dist.barrier()
            now = read_qdisc_bytes(os.environ["DISTCOMP_DEVICE"])
            found.append({"step_s": step_s, "queue_bytes": now - sent})
            found[-1]["payload_bytes"] = handle.stats()["payload_bytes"]
        loss, accuracy = digits.evaluate(model.module, *test)
        found[-1] |= {"test_loss": loss, "test_accuracy": accuracy}
    return found


def rank_main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = json.loads(os.environ["PRUNED_WIRE"])
    digits.WIDTH = settings["width"]
    mine = {arm: train(arm, settings["steps"], settings["frozen_from"]) for arm in ARMS}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": everyone}))
    dist.destroy_process_group()


def summarize(ranks: list[Any], frozen_from: int) -> dict[str, Any]:
    """Per arm: means over ranks; of the whole run, and of the steps in which the mask is frozen."""
    rows: dict[str, Any] = {}
    for arm in ARMS:
        queue = [statistics.mean(rank[arm][step]["queue_bytes"] for rank in ranks)
                 for step in range(len(ranks[0][arm]))]  # fmt: skip
        late = [rank[arm][step]["step_s"] for rank in ranks for step in range(frozen_from + 1, len(queue))]
        payload = [one["payload_bytes"] for one in ranks[0][arm]]
        frozen = len(payload) - 1 - frozen_from
        rows[arm] = {
            "queue_bytes_per_step": statistics.mean(queue),
            "queue_bytes_per_step_frozen": statistics.mean(queue[frozen_from + 1 :]),
            "payload_bytes_per_step_frozen": (payload[-1] - payload[frozen_from]) / frozen,
            "step_s_frozen": statistics.median(late),
            "test_loss": ranks[0][arm][-1]["test_loss"],
            "test_accuracy": ranks[0][arm][-1]["test_accuracy"],
        }  # fmt: skip
    for row in rows.values():
        for key in ("queue_bytes_per_step", "queue_bytes_per_step_frozen"):
            row[f"fewer_{key}"] = rows["ddp"][key] / row[key]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--frozen-from", type=int, default=40)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    from _common import on_network, write

    settings = {key: getattr(arguments, key) for key in ("steps", "frozen_from", "width")}
    raw = on_network(__file__, 4, "100mbit", {"PRUNED_WIRE": json.dumps(settings)})
    rows = summarize(raw["ranks"], arguments.frozen_from)
    print(json.dumps(rows, indent=1))
    write("pruned_wire", {"ranks": 4, "rate": "100mbit", "network": raw["network"],
                          "settings": settings, "arms": rows})  # fmt: skip


if __name__ == "__main__":
    rank_main() if "PRUNED_WIRE" in os.environ else main()
