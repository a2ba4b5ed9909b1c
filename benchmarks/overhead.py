"""What does attaching cost where the network is not the bottleneck? Steps of bare DDP and of DDP with
identity, in turn.

    python -m benchmarks.overhead               # writes results/overhead.json

Two ranks on an unshaped network, a gradient of about 17 MB, batches large enough that compute is most of a
step.
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
from benchmarks._common import arguments_of, median, on_network, start, write

SIDE, LAYERS = 1024, 4


def model() -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(
        nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS))), bucket_cap_mb=4
    )


def step_s(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    dist.barrier()
    begin_s = time.perf_counter()
    optimizer.zero_grad()
    ddp(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - begin_s


def rank_main(settings: Any) -> dict[str, Any]:
    models = {name: model() for name in ("bare", "identity")}
    optimizers = {name: torch.optim.SGD(one.parameters(), lr=1e-3) for name, one in models.items()}
    x = torch.randn(settings["batch"], SIDE)
    handle = distcomp.attach(models["identity"], optimizers["identity"], "identity")
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(settings["steps"]):
        for name in models:
            seconds = step_s(models[name], optimizers[name], x)
            if step >= 3:
                times[name].append(seconds)
    handle.detach()
    return {"times": times}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    found = on_network("overhead", 2, "unshaped", vars(arguments))
    times = found["times"]
    ratio = median([one / other for one, other in zip(times["identity"], times["bare"], strict=True)])
    result = {
        "what": "median of identity step / bare DDP step, pair by pair",
        "ranks": 2, "batch": arguments.batch, "ratio": ratio,
        "bare_s": median(times["bare"]), "identity_s": median(times["identity"]),
    }  # fmt: skip
    print(result, "written to", write("overhead", result), file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
