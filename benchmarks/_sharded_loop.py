"""A training loop on FSDP2, as its users write them: ``distcomp advise`` runs it alone, a benchmark on ranks.

    python -m benchmarks._sharded_loop WIDTH DEPTH RESHARD SHARDS

An MLP without biases, every layer a buffer of its own; ``RESHARD`` 1 gathers weights again for the backward.
With fewer ``SHARDS`` than ranks it is a hybrid mesh, whose replicas FSDP averages itself, or a method across.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BATCH = 4


def made(
    width: int, depth: int, reshard: bool, shards: int, hybrid: bool = True
) -> tuple[Any, torch.optim.Optimizer, Callable[[], None], Any]:
    """The model, its optimizer, a step, and the mesh; ``hybrid``: FSDP knows the mesh's replicas."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    ranks = dist.get_world_size()
    within = min(shards, ranks)
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (ranks // within, within), mesh_dim_names=names)
    on = mesh if hybrid and ranks > within else mesh["shard"]
    for part in model:
        fully_shard(part, mesh=on, reshard_after_forward=reshard)
    fully_shard(model, mesh=on, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return model, optimizer, step, mesh


def main() -> None:
    width, depth, reshard, shards = map(int, sys.argv[1:5])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _, _, step, _ = made(width, depth, bool(reshard), shards)
    for _ in range(1000):
        step()


if __name__ == "__main__":
    main()
