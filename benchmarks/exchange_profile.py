"""Where the CPU seconds of an exchange go: arithmetic, Python around it, carrying, and how often
a thread wakes.

    python -m benchmarks.exchange_profile        # writes results/exchange_profile.json

Four ranks, a gradient of about 17 MB in four buckets; each rate in turn, each over Gloo's connections and
over distcomp's own. All is CPU time of one rank (the mean over ranks) and one step: of the thread that
carries the exchange, by phase (encode, recode and decode are a method's arithmetic; ``wait`` is what asking
for the end of a request costs), of Python's threads outside of phases (forward, backward, the optimizer,
starting requests), and of the transport's own threads, with the share that they spend in the kernel.
``wakes`` are voluntary context switches of the transport's threads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, on_network, start, write
from benchmarks.step_time import model
from distcomp.runtime import pipeline
from distcomp.transports.sockets import CARRIER, GLOO, SOCKETS

METHODS = (
    "qsgd:bits=1", "powersgd:rank=4", "topk:ratio=0.01", "qsgd:bits=4", "gradiveq:learn=5,compressed=400",
    "pqasgd:period=1,bits=4", "choco", "qsgd:bits=8", "identity",
)  # fmt: skip
AT_10_MBIT = METHODS[:4]
"""The others' steps take many seconds there."""
RATES = ("10mbit", "100mbit", "1gbit", "unshaped")
TICKS = 100
"""Of a second, in which the kernel tells a thread's user and system time."""

NO_TIMES = ("wakes", "payload_bytes")

Found = dict[str, float]


def phase_cpu(found: Found) -> Callable[[], None]:
    """From now on the thread's CPU seconds in each phase of the pipeline are added to ``found``; what is
    returned puts the pipeline's own functions back."""
    advance, wait = pipeline._advance, pipeline._wait

    def timed_advance(current: Any, *rest: Any) -> bool:
        first, begin_s = current.rounds == 0, time.thread_time()
        goes_on = advance(current, *rest)
        phase = "encode" if first else "recode" if goes_on else "decode"
        found[phase] = found.get(phase, 0.0) + time.thread_time() - begin_s
        return goes_on

    def timed_wait(*arguments: Any) -> None:
        begin_s = time.thread_time()
        wait(*arguments)
        found["wait"] = found.get("wait", 0.0) + time.thread_time() - begin_s

    def restore() -> None:
        pipeline._advance, pipeline._wait = advance, wait

    pipeline._advance, pipeline._wait = timed_advance, timed_wait
    return restore


def threads() -> dict[int, tuple[float, float, int]]:
    """Of each thread: seconds on a core, those of them in the kernel, and how often it slept."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            on_core_s = int((task / "schedstat").read_text().split()[0]) / 1e9
            system_s = int((task / "stat").read_text().rpartition(")")[2].split()[12]) / TICKS
            slept = next(
                int(line.split()[1])
                for line in (task / "status").read_text().splitlines()
                if line.startswith("voluntary")
            )
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        found[int(task.name)] = (on_core_s, system_s, slept)
    return found


def python_threads() -> set[int]:
    return {one.native_id for one in threading.enumerate() if one.native_id is not None}


def measure(ddp: DistributedDataParallel, method: str, steps: int) -> Found:
    """Means over steps of this rank."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    x = torch.randn(1, ddp.module[0].in_features)
    phases: Found = {}
    with distcomp.attach(ddp, optimizer, method) as handle:
        for _ in range(6):  # bases and residuals are there afterwards
            step(ddp, optimizer, x)
        dist.barrier()
        restore, before, begin_s = phase_cpu(phases), threads(), time.perf_counter()
        for _ in range(steps):
            step(ddp, optimizer, x)
        after, seconds = threads(), time.perf_counter() - begin_s
        restore()
        stats = handle.stats()["last"]
        ours = python_threads()
    used = {
        task: [b - a for a, b in zip(before.get(task, (0, 0, 0)), after[task], strict=True)] for task in after
    }
    mine, carriers = ([v for t, v in used.items() if (t in ours) is own] for own in (True, False))
    found = {**phases, "python": sum(v[0] for v in mine) - sum(phases.values()),
             "carrier": sum(v[0] for v in carriers), "carrier_system": sum(v[1] for v in carriers),
             "wakes": float(sum(v[2] for v in carriers)), "step": seconds}  # fmt: skip
    return {name: value / steps for name, value in found.items()} | {"payload_bytes": stats["payload_bytes"]}


def step(ddp: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    ddp(x).square().mean().backward()
    optimizer.step()


def rank_main(settings: Any) -> dict[str, Any]:
    ddp = model()  # once: DDP sends all parameters, which takes half a minute at 10 Mbit/s
    ranks = gathered({method: measure(ddp, method, settings["steps"]) for method in settings["methods"]})

    def mean(method: str, name: str) -> float:
        return sum(rank[method].get(name, 0.0) for rank in ranks) / len(ranks)

    return {
        "methods": {
            method: {name: mean(method, name) for name in ranks[0][method]} for method in settings["methods"]
        }
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rates", nargs="*", default=list(RATES))
    parser.add_argument("--methods", nargs="*")
    arguments = parser.parse_args()
    rates: dict[str, dict[str, Any]] = {}
    for rate in arguments.rates:
        methods = arguments.methods or (AT_10_MBIT if rate == "10mbit" else METHODS)
        settings = {"methods": methods, "steps": arguments.steps}
        rates[rate] = {}
        for carrier in (GLOO, SOCKETS):
            told = on_network("exchange_profile", arguments.ranks, rate, settings, env={CARRIER: carrier})
            rates[rate][carrier] = told["methods"]
            for method, found in told["methods"].items():
                times = {name: value for name, value in found.items() if name not in NO_TIMES}
                shown = " ".join(f"{name} {1e3 * value:.1f}" for name, value in times.items())
                print(f"{rate} {carrier} {method}: {shown} ms, {found['wakes']:.0f} wakes", file=sys.stderr)
    write("exchange_profile", {"ranks": arguments.ranks, "steps": arguments.steps, "rates": rates})


if __name__ == "__main__":
    start(main, rank_main)
