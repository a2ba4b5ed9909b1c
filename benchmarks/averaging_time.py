"""How long until the loss is there? Steps counted in lock-step, times seconds per step on a slow network.

    python -m benchmarks.averaging_time steps                      # minutes; resumes
    python -m benchmarks.averaging_time network --rate 10mbit
    python -m benchmarks.averaging_time network --rate 100mbit --delay 20ms
    python -m benchmarks.averaging_time sizes --rate 10mbit        # gossip among 4, 8 and 16 ranks

Writes results/averaging_steps.json, averaging_time_10mbit.json, averaging_time_100mbit_20ms.json and
averaging_sizes.json. Digit pairs, a network of 146,560 parameters, eight ranks, each with images of its
own.

*Steps* until the test loss of the averaged model is at most the target: what ranks agree on does not depend
on how fast their network is. Constant learning rate, the best of a grid on seed 0 for each method; median
of three seeds.

*Seconds per step* of the same training on an emulated network, all methods in turn in one run: the time of
a window of whole periods between two barriers, over its steps; median of the windows. "no exchange" is what
computing alone takes where eight ranks share the cores of one machine.
"""

from __future__ import annotations

import json
import math
import sys
import time
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, median, on_network, start, write
from benchmarks._crowd import Plan, digit_pairs, train
from benchmarks._places import RESULTS
from distcomp.averaging.base import Averaging
from distcomp.methods import parse
from distcomp.schedule import whole

WIDTH, RANKS, TARGET, MOST, SEEDS = 320, 8, 0.4, 600, 3
RATES = (0.03, 0.06, 0.12)
METHODS = {
    "all-reduce fp32": "ddp",
    "QSGD 8 bits": "qsgd:bits=8",
    "D-PSGD": "dpsgd",
    "DCD 8 bits": "dcd:compressor=qsgd:bits=8",
    "CHOCO 4 bits": "choco:compressor=qsgd:bits=4",
    "PQASGD (8,8)": "pqasgd:period=8,bits=8",
    "PQASGD (16,4)": "pqasgd:period=16,bits=4",
    "PQASGD (16,2)": "pqasgd:period=16,bits=2",
    "PQASGD (32,4)": "pqasgd:period=32,bits=4",
    "DiLoCo 50": "diloco:period=50",
}
ALONE = "local_sgd:period=1000000"
WINDOWS = 3


def period_of(spec: str) -> int:
    """Steps from one exchange to the next."""
    method = carrier_of(spec)
    return whole(method.period, 0) if isinstance(method, Averaging) else 1


def carrier_of(spec: str) -> Any:
    """What a spec means in lock-step: DDP's all-reduce is the identity."""
    return parse("identity" if spec == "ddp" else spec)


# ---------------------------------------------------------------------------------------------- steps


def count_steps() -> None:
    task = digit_pairs(width=WIDTH)

    def steps(spec: str, rate: float, seed: int) -> dict[str, Any]:
        carrier = carrier_of(spec)
        plan = Plan(
            RANKS,
            MOST,
            lambda weights: torch.optim.SGD(weights, rate, momentum=0.9),
            seed=seed,
            watch_every=math.lcm(2, period_of(spec)),
            target=TARGET,
        )
        found = train(task, plan, carrier)
        return {"steps": found["steps"] if found.get("test_loss", math.inf) <= TARGET else None}

    about = {
        "task": "digit pairs, 146,560 parameters",
        "ranks": RANKS,
        "target": TARGET,
        "rates": list(RATES),
    }
    cells = Cells("averaging_steps", about)
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in METHODS.items():

        def count(rate: float, seed: int, name: str = name, spec: str = spec) -> int:
            key = f"{name} | rate {rate} | seed {seed}"
            return cells.get(key, lambda: steps(spec, rate, seed))["steps"] or MOST + 1

        rate = min(RATES, key=lambda rate: count(rate, 0))
        found = sorted(count(rate, seed) for seed in range(SEEDS))
        rows[name] = {"spec": spec, "rate": rate, "steps": found[len(found) // 2], "all": found}
    cells.document["methods"] = rows
    cells.write()
    print(json.dumps(rows, indent=1))


# ---------------------------------------------------------------------------------------------- seconds


def rank_main(settings: Any) -> dict[str, Any]:
    """One rank: every method's windows, all methods in turn."""
    task = digit_pairs(width=WIDTH)
    rank = dist.get_rank()
    batches = [
        (inputs[rank], targets[rank]) for inputs, targets in islice(task.batches(dist.get_world_size(), 0), 8)
    ]
    model = DistributedDataParallel(task.network())
    found = {name: _windows(model, spec, batches) for name, spec in settings.items()}
    return {"methods": found}


def _windows(
    model: DistributedDataParallel, spec: str, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, Any]:
    """Seconds per step of some windows of whole periods, after one that is not counted."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    period = min(period_of(spec), 50)
    steps = max(2, period)
    with distcomp.attach(model, optimizer, spec) as handle:
        seconds = []
        for _ in range(1 + WINDOWS):
            dist.barrier()
            sent, begin_s = handle.stats()["payload_bytes"], time.perf_counter()
            for step in range(steps):
                inputs, targets = batches[step % len(batches)]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            dist.barrier()
            seconds.append((time.perf_counter() - begin_s) / steps)
            sent = handle.stats()["payload_bytes"] - sent
    return {"step_s": seconds[1:], "payload_bytes_per_step": sent / steps}


def measure(ranks: int, rate: str, delay: str, methods: dict[str, str]) -> dict[str, Any]:
    """All methods on one network."""
    raw = on_network("averaging_time", ranks, rate, methods, delay)
    for row in raw["methods"].values():
        row["step_s_median"] = median(row["step_s"])
    return raw


def on_the_network(rate: str, delay: str) -> None:
    """Seconds to the target, and how often faster than all-reduce."""
    raw = measure(RANKS, rate, delay, {**METHODS, "no exchange": ALONE})
    counted = json.loads((RESULTS / "averaging_steps.json").read_text())["methods"]
    baseline = raw["methods"]["all-reduce fp32"]["step_s_median"]
    for name, row in raw["methods"].items():
        if name not in METHODS:
            continue
        row["steps"] = counted[name]["steps"]
        at_end_s = baseline if period_of(METHODS[name]) == 1 and _is_gossip(METHODS[name]) else 0.0
        row["seconds_to_target"] = row["steps"] * row["step_s_median"] + at_end_s
    slowest = raw["methods"]["all-reduce fp32"]["seconds_to_target"]
    for name in METHODS:
        raw["methods"][name]["speed_up"] = slowest / raw["methods"][name]["seconds_to_target"]
    label = rate if delay == "0ms" else f"{rate}_{delay}"
    about = {
        "what": "steps to the target in lock-step times the median step here; for gossip one all-reduce more",
        "ranks": RANKS, "rate": rate, "delay": delay, "target": TARGET, "parameters": 146_560,
    }  # fmt: skip
    path = write(f"averaging_time_{label}", {**about, **raw})
    for name, row in raw["methods"].items():
        print(f"{name:<18}{1e3 * row['step_s_median']:8.1f} ms  {row.get('speed_up', 0):6.1f} x")
    print(f"written to {path}", file=sys.stderr)


def _is_gossip(spec: str) -> bool:
    from distcomp.averaging.gossip import Gossip

    return isinstance(carrier_of(spec), Gossip)


def sizes(rate: str) -> None:
    """Does a step of gossip cost the same among more ranks?"""
    chosen = {name: METHODS[name] for name in ("all-reduce fp32", "DCD 8 bits", "CHOCO 4 bits")}
    found = {
        str(ranks): measure(ranks, rate, "0ms", {**chosen, "no exchange": ALONE}) for ranks in (4, 8, 16)
    }
    about = {"what": "seconds per step", "rate": rate, "parameters": 146_560}
    path = write("averaging_sizes", {**about, "ranks": found})
    for ranks, raw in found.items():
        shown = {name: round(1e3 * row["step_s_median"], 1) for name, row in raw["methods"].items()}
        print(ranks, "ranks, ms per step:", shown)
    print(f"written to {path}", file=sys.stderr)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("part", choices=("steps", "network", "sizes"))
    parser.add_argument("--rate", default="10mbit")
    parser.add_argument("--delay", default="0ms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "steps":
        count_steps()
    elif arguments.part == "network":
        on_the_network(arguments.rate, arguments.delay)
    else:
        sizes(arguments.rate)


if __name__ == "__main__":
    start(main, rank_main)
