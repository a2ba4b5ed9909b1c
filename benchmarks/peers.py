"""How many seconds to the same test loss, on the same link? PyTorch's reductions against distcomp's methods.

    python -m benchmarks.peers steps       # steps to the loss, counted once on an unshaped network
    python -m benchmarks.peers 100mbit     # the median step on a link; also 10mbit, 1gbit, unshaped
    python -m benchmarks.peers table       # seconds = steps x median step

A step is over when the slowest rank's is: times lie between such moments, of one clock. Methods that exchange
every few steps are timed over whole periods, and the mean step counts; their loss is that of the model on
which all agree, at the end of a period.
Steps that differ from the rest, at the beginning (PyTorch's PowerSGD sends two in full, GradiVeQ learns), are
timed apart: ``seconds`` leaves them out of the median, ``seconds_from_start`` counts them as they were, from
the call of ``attach`` on.

Each call writes what it found into results/peers.json; ``table`` multiplies. Pairs of digits, 4 ranks, a
small convolutional stem and two wide layers: 4.4 million parameters. All methods take turns in one run on
each link, with the same weights, batches and optimizer.
PyTorch's PowerSGD runs on one bucket, where it survives; what becomes of it on several is recorded.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import (
    arguments_of,
    gathered,
    median,
    on_network,
    rank_command,
    rank_environment,
    start,
    write,
)
from benchmarks._places import RESULTS, example

RANKS, BATCH, LR, WIDTH = 4, 16, 0.02, 1856
BUCKET_MB, ONE_BUCKET_MB = 4, 1000
TARGET_LOSS, MOST_STEPS, EVAL_EVERY, AVERAGED = 0.5, 150, 2, 3

METHODS = {
    "ddp": "ddp",
    "torch fp16": "torch:fp16",
    "torch PowerSGD, one bucket": "torch:powersgd:rank=2",
    "bf16": "bf16",
    "4-bit": "qsgd:bits=4",
    "1-bit": "qsgd:bits=1",
    "top-k 1 %": "topk:ratio=0.01",
    "PowerSGD": "powersgd:rank=2",
    "PowerSGD, after two steps in full": "warmup:inner=(powersgd:rank=2),steps=2",
    "PowerSGD rank 3": "powersgd:rank=3",
    "PowerSGD rank 3 in bf16": "powersgd:rank=3,values=bf16",
    "PowerSGD rank 4": "powersgd:rank=4",
    "PowerSGD rank 4 in bf16": "powersgd:rank=4,values=bf16",
    "PowerSGD, one round": "powersgd:rank=2,one_round=True",
    "GradiVeQ, PowerSGD where it does not apply": (
        "gradiveq:learn=20,compressed=80,others=(powersgd:rank=2)"
    ),
    "PQASGD, every 8 steps in 8 bits": "pqasgd:period=8,bits=8",
    "PQASGD, every 8 steps in 1 bit": "pqasgd:period=8,bits=1",
    "SparseLoCo, every 4 steps": "sparse_loco:period=4",
    "no communication": "none",
}
PERIOD = {
    "PQASGD, every 8 steps in 8 bits": 8,
    "PQASGD, every 8 steps in 1 bit": 8,
    "SparseLoCo, every 4 steps": 4,
}
BUILTIN_HOOKS = ("torch fp16", "torch PowerSGD, one bucket")
SLOW = {"10mbit": ("ddp", "torch fp16", "bf16")}
"""Timed over two steps there after the first, not over many: one takes 10 to 20 seconds."""


def network() -> nn.Module:
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 16)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class Task:
    """Two digits side by side: which is the larger? One rank's images, and the test set."""

    def __init__(self, rank: int) -> None:
        digits = example("digits").digits

        (images, labels), held_out = digits()
        self._mine = images[rank::RANKS], labels[rank::RANKS]
        self._rank = rank
        self.test = _pairs(*held_out, 500, torch.Generator().manual_seed(0))

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _pairs(*self._mine, BATCH, torch.Generator().manual_seed(1000 * step + self._rank))


def _pairs(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = torch.randint(len(images), (2, count), generator=generator)
    side_by_side = torch.cat([images[left].view(-1, 8, 8), images[right].view(-1, 8, 8)], dim=2)
    return side_by_side.flatten(1), torch.maximum(labels[left], labels[right])


def begin(label: str, one_bucket: bool) -> tuple[DistributedDataParallel, torch.optim.SGD]:
    torch.manual_seed(0)
    cap_mb = ONE_BUCKET_MB if one_bucket else BUCKET_MB
    # Models are alike by the seed: to send each would take 20 s at 10 Mbit/s.
    model = DistributedDataParallel(
        network(), bucket_cap_mb=cap_mb, gradient_as_bucket_view=True, init_sync=False
    )
    return model, torch.optim.SGD(model.parameters(), LR, momentum=0.9)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, step: int) -> None:
    x, y = task.batch(step)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


def count(label: str, task: Task) -> dict[str, Any]:
    """Steps until the test loss, averaged over the last few tests, has come down to the target."""
    model, optimizer = begin(label, one_bucket=label == BUILTIN_HOOKS[1])
    handle = distcomp.attach(model, optimizer, METHODS[label])
    losses: list[float] = []
    reached, sent = None, 0
    for step in range(MOST_STEPS if METHODS[label] != "none" else EVAL_EVERY):  # alone nobody gets there
        step_once(model, optimizer, task, step)
        if (step + 1) % PERIOD.get(label, EVAL_EVERY):
            continue
        handle.state_dict()  # makes the exchange that is due: models are then alike, or gradients were
        sent = handle.stats()["payload_bytes"]
        found = torch.zeros(())
        if dist.get_rank() == 0:
            with torch.no_grad():
                found = cross_entropy(model.module(task.test[0]), task.test[1])
        dist.broadcast(found, 0)  # all stop together, also where replicas differ
        losses.append(found.item())
        recent = losses[-AVERAGED:]
        if len(recent) == AVERAGED and sum(recent) / AVERAGED <= TARGET_LOSS:
            reached = step + 1
            break
    handle.detach()
    return {"steps": reached, "losses": losses, "payload_bytes_per_step": sent / (step + 1)}


def timed(label: str, task: Task, steps: int) -> list[float]:
    """When it is attached, and when each step ends, in seconds of a clock that all ranks share."""
    model, optimizer = begin(label, one_bucket=label == BUILTIN_HOOKS[1])
    dist.barrier()
    ends = [time.perf_counter()]
    handle = distcomp.attach(model, optimizer, METHODS[label])
    for step in range(steps):
        step_once(model, optimizer, task, step)
        ends.append(time.perf_counter())
    handle.detach()
    return ends


def counted(label: str, rate: str, steps: int) -> tuple[int, int]:
    """How many steps are timed apart, and how many then: whole periods."""
    if label in SLOW.get(rate, ()):
        return 1, 2
    period = PERIOD.get(label, 1)
    return 22 if "GradiVeQ" in label else 3 if period == 1 else period, -(-steps // period) * period


def rank_main(asked: Any) -> dict[str, Any]:
    task = Task(dist.get_rank())
    found: dict[str, Any] = {}
    if asked["what"] == "several buckets":
        METHODS["several"] = METHODS[BUILTIN_HOOKS[1]]
        found = {"several": count("several", task)}
    for label in asked["methods"]:
        if asked["what"] == "steps":
            found[label] = count(label, task)
            continue
        first, then = counted(label, asked["what"], asked["steps"])
        mine = timed(label, task, first + then)
        everyone = gathered(mine)
        over = [max(one) for one in zip(*everyone, strict=True)]
        step_s = [after - before for before, after in itertools.pairwise(over)]
        found[label] = {"first": step_s[:first], "then": step_s[first:]}
    parameters = sum(p.numel() for p in network().parameters())
    return {"parameters": parameters, "found": found}


def measure(what: str, rate: str, methods: list[str], steps: int) -> dict[str, Any]:
    asked = {"what": what, "methods": methods, "steps": steps}
    return on_network("peers", RANKS, rate, asked)


def several_buckets() -> str:
    """What becomes of PyTorch's PowerSGD on several buckets, on Gloo."""
    from distcomp.network import Fabric, emulate
    from distcomp.network.launch import show_nothing

    with emulate(Fabric.uniform(RANKS, "unshaped")) as net:
        env = rank_environment({"what": "several buckets", "methods": [], "steps": 0})
        result = net.launch(rank_command("peers"), env, timeout_s=90, show=show_nothing)
    if result.ok:
        return "ran to the end"
    lines = [line.strip() for out in result.outputs.values() for line in out.splitlines() if "Error" in line]
    return lines[-1][-300:] if lines else "hung for 90 seconds"


def summary(raw: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the loss on every link that was measured, and how much faster than DDP that is."""
    rows: dict[str, Any] = {}
    for label in METHODS:
        counted = raw["steps"].get(label)
        if counted is None:
            continue
        row: dict[str, Any] = {"steps": counted["steps"], "bytes": counted["payload_bytes_per_step"]}
        for rate, times in raw["step_s"].items():
            if label not in times:
                continue
            first, then, steps = times[label]["first"], times[label]["then"], counted["steps"]
            step_s = sum(then) / len(then) if label in PERIOD else median(then)
            row[rate] = {"step_s": step_s, "seconds": steps and steps * step_s}
            if steps:
                row[rate]["seconds_from_start"] = sum(first) + (steps - len(first)) * step_s
        rows[label] = row
    for row in rows.values():
        for rate in raw["step_s"]:
            if row["steps"] and rate in row and rate in rows["ddp"]:
                for name, seconds in (("over_ddp", "seconds"), ("over_ddp_from_start", "seconds_from_start")):
                    row[rate][name] = rows["ddp"][rate][seconds] / row[rate][seconds]
    ours = [
        label
        for label in rows
        if label not in ("ddp", "no communication", *BUILTIN_HOOKS) and rows[label]["steps"]
    ]
    verdict = {}
    for rate in raw["step_s"]:
        here = [label for label in ours if "over_ddp" in rows[label].get(rate, {})]
        if not here:
            continue
        verdict[rate] = {
            seconds: _best(rows, here, rate, seconds) for seconds in ("seconds", "seconds_from_start")
        }
    return {"rows": rows, "best": verdict}


def _best(rows: dict[str, Any], ours: list[str], rate: str, seconds: str) -> dict[str, Any]:
    best = min(ours, key=lambda label: rows[label][rate][seconds])
    stock = [rows[label][rate][seconds] for label in BUILTIN_HOOKS if rows.get(label, {}).get("steps")]
    mine = rows[best][rate][seconds]
    return {
        "best": best,
        "over_ddp": rows["ddp"][rate][seconds] / mine,
        "over_best_stock_hook": min(stock) / mine if stock else None,
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("what", nargs="+", help="steps, buckets, a rate, or table")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--timed-steps", type=int, default=12)
    arguments = parser.parse_args()
    path = RESULTS / "peers.json"
    raw: dict[str, Any] = (
        json.loads(path.read_text())["raw"] if path.exists() else {"steps": {}, "step_s": {}}
    )
    for what in arguments.what:
        if what == "steps":
            for label in arguments.methods:
                if label not in raw["steps"]:
                    answer = measure("steps", "unshaped", [label], 0)
                    raw["parameters"] = answer["parameters"]
                    raw["steps"].update(answer["found"])
                    save(raw)
        elif what == "buckets":
            raw["torch_powersgd_on_several_buckets"] = several_buckets()
        elif what != "table":
            answer = measure(what, what, arguments.methods, arguments.timed_steps)
            raw.setdefault("network", {})[what] = answer["network"]
            raw["step_s"].setdefault(what, {}).update(answer["found"])
        save(raw)


def save(raw: dict[str, Any]) -> None:
    """All that was measured so far, and what follows from it."""
    found = {
        "what": f"seconds to a test loss of {TARGET_LOSS}: steps, counted once, times the median step",
        "ranks": RANKS, "batch": BATCH, "lr": LR, "methods": METHODS,
        **(summary(raw) if "ddp" in raw["steps"] else {}), "raw": raw,
    }  # fmt: skip
    print(f"written to {write('peers', found)}", file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
