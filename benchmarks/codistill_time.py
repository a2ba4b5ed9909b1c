"""How long to a loss, on a slow network of real packets? Two workers, 1 Mbit/s, 50 ms.

    python -m benchmarks.codistill_time            # writes results/codistill_time.json; two minutes

The task of ``benchmarks/codistill.py``, two real processes on an emulated network, each method for 20
seconds of training. The loss is rank 0's network on the test pairs; testing does not count. One seed: the
differences are of tens of times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, on_network, start, write
from benchmarks.codistill import network, task

RATE, DELAY, LIMIT_S, EVERY, SEED = "1mbit", "50ms", 20.0, 5, 0
LOSSES = (1.5, 1.0, 0.8)
MOST_STEPS = 3000
METHODS = {
    "DDP": "ddp",
    "qsgd, 4 bits": "qsgd:bits=4",
    "pqasgd": "pqasgd",
    "codistill, 8 bits": "codistill:period=50,values=(qsgd:bits=8)",
}


def rank_main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train for ``LIMIT_S``; (seconds, step, loss, accuracy) of rank 0, and the bytes it sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    training = task(SEED)
    model: torch.nn.Module = network(SEED)
    plain = model
    if settings["method"] in ("ddp", "qsgd:bits=4"):
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = distcomp.attach(model, optimizer, settings["method"], shared=training.shared)
    curve, train_s = [], 0.0
    for step in range(MOST_STEPS):
        begin_s = time.perf_counter()
        inputs, labels = training.batch(rank, size, step)
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        train_s += time.perf_counter() - begin_s
        if (step + 1) % EVERY:
            continue
        assert training.evaluate is not None
        with torch.no_grad():
            found = training.evaluate(plain)
        curve.append([train_s, step + 1, found["test_loss"], found["test_accuracy"]])
        over = torch.tensor([float(train_s > LIMIT_S)])
        dist.all_reduce(over)  # all stop after the same step; outside of what is timed
        if over.item():
            break
    sent_bytes = handle.stats()["payload_bytes"]
    handle._leave(agree=False)
    return {"curve": curve, "sent_bytes": sent_bytes, "steps": step + 1}


def seconds_to(curve: list[list[float]], loss: float) -> float | None:
    """When a loss was first reached."""
    return next((seconds for seconds, _, reached, _ in curve if reached <= loss), None)


def main() -> None:
    arguments_of(__doc__).parse_args()
    rows = {}
    for name, method in METHODS.items():
        found = on_network("codistill_time", 2, RATE, {"method": method}, DELAY)
        found["to_loss_s"] = {str(loss): seconds_to(found["curve"], loss) for loss in LOSSES}
        rows[name] = found
        last = found["curve"][-1]
        print(name, found["to_loss_s"], f"{last[0]:.1f} s, loss {last[2]:.3f}", file=sys.stderr, flush=True)
    write("codistill_time", {"rate": RATE, "delay": DELAY, "limit_s": LIMIT_S, "methods": rows}, SEED)


if __name__ == "__main__":
    start(main, rank_main)
