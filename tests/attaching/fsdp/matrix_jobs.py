"""What ranks do to test methods that need whole parameters, on FSDP2 and on DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp

from .shard_jobs import batch, flat, mesh_of, network, sgd, sharded, train


def by_fsdp(rank: int, size: int, spec: Any, steps: int) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Weights, statistics, and what is owed by parameter."""
    model = sharded(mesh_of(size)["shard"])
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, spec) as handle:
        train(model, optimizer, rank, steps)
        return flat(model), handle.stats(), handle.state_dict()[f"rank{rank}"]["state"]


def by_ddp(rank: int, size: int, spec: Any, steps: int) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    model = DistributedDataParallel(network())
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, spec) as handle:
        train(model, optimizer, rank, steps)
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return weights, handle.stats(), handle.state_dict()[f"rank{rank}"]["state"]


def saved(rank: int, size: int, spec: Any) -> dict[str, Any]:
    model = sharded(mesh_of(size)["shard"])
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, spec) as handle:
        train(model, optimizer, rank, 3)
        return handle.state_dict()


def handed_on(rank: int, size: int, spec: Any, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What this rank owes after taking over the parts of another number of ranks, and then trains on."""
    model = sharded(mesh_of(size)["shard"])
    optimizer = sgd(model)
    with distcomp.attach(model, optimizer, spec) as handle:
        handle.load_state_dict(parts)
        state: dict[str, Any] = handle.state_dict()[f"rank{rank}"]["state"]
        train(model, optimizer, rank, 2)
        assert torch.isfinite(flat(model)).all()
        return state


def frozen(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """A part of each buffer is not trained: the last weights, by powersgd and in plain."""
    found = []
    for spec in ("powersgd:rank=64,min_compression=0", "identity"):
        model = network()
        model[0].bias.requires_grad_(False)
        model[3].weight.requires_grad_(False)
        mesh = mesh_of(size)["shard"]
        from torch.distributed.fsdp import fully_shard

        for part in model:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = sgd(model)
        with distcomp.attach(model, optimizer, spec):
            for index in range(3):
                x, y = batch(rank, index)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            found.append(flat(model))
    return found[0], found[1]
