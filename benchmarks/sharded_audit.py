"""Is what an audit says of a step what the interface sends? DDP, FSDP2, HSDP and distcomp's own exchanges.

    python -m benchmarks.sharded_audit            # resumes; writes results/sharded_audit.json

Four ranks on an emulated network, whose queues count what each rank sends; an MLP of a million parameters,
three steps after two. Bytes are the mean over the ranks, without the packets' headers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, on_network, start
from benchmarks._sharded_loop import made

RATE, RANKS, WARM, STEPS, WIDTH, DEPTH, BATCH = "1gbit", 4, 2, 3, 512, 4, 4
KINDS: dict[str, dict[str, Any]] = {
    "DistributedDataParallel": {"shards": 0},
    "FSDP2": {"shards": 4},
    "FSDP2, weights kept after the forward": {"shards": 4, "reshard": False},
    "HSDP, 2 replicas of 2 shards": {"shards": 2},
    "FSDP2 with qsgd:bits=4, weights=qsgd:bits=8": {"shards": 4, "attach": ["qsgd:bits=4", "qsgd:bits=8"]},
}


def replicated() -> tuple[Any, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return model, optimizer, step


def rank_main(told: Any) -> dict[str, Any]:
    """The audit of one kind of model."""
    if told["shards"]:
        model, optimizer, step, _ = made(WIDTH, DEPTH, told.get("reshard", True), told["shards"])
    else:
        model, optimizer, step = replicated()
    handle = None
    if "attach" in told:
        method, weights = told["attach"]
        handle = distcomp.attach(model, optimizer, method, weights=weights)
    for _ in range(WARM):
        step()
    dist.barrier()
    with distcomp.audit() as seen:
        for _ in range(STEPS):
            step()
    if handle is not None:
        handle.detach()
    ranks = gathered((seen.sent_bytes, seen.interface_payload_bytes))
    audited, interface = (sum(one[at] for one in ranks) / len(ranks) for at in (0, 1))
    return {"audited_bytes": audited, "interface_payload_bytes": interface, "sentence": seen.sentence}


def main() -> None:
    arguments_of(__doc__).parse_args()
    about = {"rate": RATE, "ranks": RANKS, "steps": STEPS, "width": WIDTH, "depth": DEPTH}
    cells = Cells("sharded_audit", about)
    for name, told in KINDS.items():
        row = cells.get(name, lambda told=told: on_network("sharded_audit", RANKS, RATE, told))
        error = row["audited_bytes"] / row["interface_payload_bytes"] - 1
        print(f"{name:<48}{row['audited_bytes']:14.0f}{row['interface_payload_bytes']:14.0f}{error:+8.2%}")


if __name__ == "__main__":
    start(main, rank_main)
