"""What does attaching cost where the network is not the bottleneck? Steps of bare DDP and of DDP with
identity in turn; and of a model that nothing is attached to, and of one whose averaging is not due.

    python -m benchmarks.overhead               # writes results/overhead.json

Two and four ranks on an unshaped network, 17 MB of parameters, batches large enough that compute is most of a
step. All take turns, and each pair of neighbours is compared. ``cpu`` is the same comparison in CPU time of a
rank, which does not change with what else the cores do.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, median, on_network, start, write

SIDE, LAYERS = 1024, 4
RANKS = (2, 4)
EVERY_STEP, BETWEEN = "identity", ("pqasgd", "choco", "diloco")
NEVER = 1 << 20
"""A period that no run here reaches."""


def model(reduced: bool) -> nn.Module:
    """In DDP where its gradients are ``reduced``; on its own where models are averaged."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS)))
    return DistributedDataParallel(layers, bucket_cap_mb=4) if reduced else layers


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> tuple[float, float]:
    """Seconds, and CPU seconds of this rank, all its threads together."""
    dist.barrier()
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - begin_s, time.process_time() - cpu_s


def rank_main(settings: Any) -> dict[str, Any]:
    """Each method's steps beside its neighbour's without it: bare DDP's, or a bare model's."""
    specs = {EVERY_STEP: EVERY_STEP, **{name: f"{name}:period={NEVER}" for name in BETWEEN}}
    names = ("bare DDP", EVERY_STEP, "bare model", *BETWEEN)
    nets = {name: model(reduced=name in names[:2]) for name in names}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-3) for name, net in nets.items()}
    handles = [distcomp.attach(nets[name], optimizers[name], spec) for name, spec in specs.items()]
    x = torch.randn(settings["batch"], SIDE)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for index in range(settings["steps"]):
        for name in names:
            taken = step(nets[name], optimizers[name], x)
            if index >= 3:
                found[name].append(taken)
    for handle in handles:
        handle.detach()
    times = {
        name: [slowest(one) for one in zip(*gathered(taken), strict=True)] for name, taken in found.items()
    }
    return {"times": times}


def slowest(ranks: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """The time of the slowest rank, and the mean CPU time."""
    return max(wall_s for wall_s, _ in ranks), sum(cpu_s for _, cpu_s in ranks) / len(ranks)


def ratios(times: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians over pairs of neighbouring steps."""
    rows = {}
    for name in (EVERY_STEP, *BETWEEN):
        bare = times["bare DDP" if name == EVERY_STEP else "bare model"]
        pairs = list(zip(times[name], bare, strict=True))
        rows[name] = {
            "ratio": median([with_s / without_s for (with_s, _), (without_s, _) in pairs]),
            "cpu": median([with_s / without_s for (_, with_s), (_, without_s) in pairs]),
            "step_s": median([with_s for (with_s, _), _ in pairs]),
            "bare_s": median([without_s for _, (without_s, _) in pairs]),
        }
    return rows


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    rows = {
        str(ranks): ratios(on_network("overhead", ranks, "unshaped", vars(arguments))["times"])
        for ranks in RANKS
    }
    identity = rows["2"][EVERY_STEP]
    result = {
        "what": "medians over pairs of neighbouring steps, with the method over without it",
        "batch": arguments.batch, "ranks": 2, "ratio": identity["ratio"], "by_ranks": rows,
    }  # fmt: skip
    print(rows, "written to", write("overhead", result), file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
