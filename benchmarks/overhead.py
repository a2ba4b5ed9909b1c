"""What does attaching cost where the network is not the bottleneck? Steps of bare DDP and of DDP with
identity, in turn.

    python benchmarks/overhead.py               # writes results/overhead.json

Two ranks on an unshaped network, a gradient of about 17 MB, batches large enough that compute is most of a
step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp

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


def rank_main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = json.loads(os.environ["OVERHEAD"])
    models = {name: model() for name in ("bare", "identity")}
    optimizers = {name: torch.optim.SGD(one.parameters(), lr=1e-3) for name, one in models.items()}
    x = torch.randn(settings["batch"], SIDE)
    handle = distcomp.attach(models["identity"], optimizers["identity"], "identity")
    times: dict[str, list[float]] = {name: [] for name in models}
    for context in range(settings["steps"]):
        for name in models:
            seconds = step_s(models[name], optimizers[name], x)
            if context >= 3:
                times[name].append(seconds)
    handle.detach()
    if dist.get_rank() == 0:
        print(json.dumps({"times": times}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    from _common import median, on_network, write

    found = on_network(__file__, 2, "unshaped", {"OVERHEAD": json.dumps(vars(arguments))})
    times = found["times"]
    ratio = median([one / other for one, other in zip(times["identity"], times["bare"], strict=True)])
    result = {
        "what": "median of identity step / bare DDP step, pair by pair",
        "ranks": 2, "batch": arguments.batch, "ratio": ratio,
        "bare_s": median(times["bare"]), "identity_s": median(times["identity"]),
    }  # fmt: skip
    print(result, "written to", write("overhead", result), file=sys.stderr)


if __name__ == "__main__":
    rank_main() if "OVERHEAD" in os.environ else main()
