"""What ranks do to test a method inside, among those who hold a model together, beside one across."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import distcomp

from .shard_jobs import flat, local, mesh_of, sgd, sharded, through_torch_save, train

FEW = ("qsgd:bits=1", "qsgd:bits=1", "difference:compressor=(qsgd:bits=4)")
"""Across, inside, and weights: all of them remember something."""


def begin(size: int, across: str, inside: str | None, weights: str | None) -> Any:
    """A model on two replicas of ``size / 2`` shards, its optimizer and handle."""
    mesh = mesh_of(size, 2)
    model = sharded(mesh["shard"], 50 + mesh.get_local_rank("replicate"))  # attaching makes them alike
    optimizer = sgd(model, across)
    replicas = mesh["replicate"] if inside is None else distcomp.Replicas(mesh["replicate"], inside)
    handle = distcomp.attach(model, optimizer, across, replicas=replicas, weights=weights, seed=3)
    return model, optimizer, handle


def trained(
    rank: int, size: int, across: str, inside: str | None, weights: str | None
) -> tuple[Tensor, dict[str, Any], Tensor]:
    """The weights after some steps, statistics, and the weights some steps after leaving."""
    model, optimizer, handle = begin(size, across, inside, weights)
    with handle:
        train(model, optimizer, rank, 4)
        found = flat(model), handle.stats()
    train(model, optimizer, rank, 2, start=4)
    return *found, flat(model)


def divided(rank: int, size: int, factor: float, inside: str | None) -> Tensor:
    """With ``set_gradient_divide_factor`` on every module."""
    model, optimizer, handle = begin(size, "identity", inside, None)
    with handle:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(factor)
                part.set_force_sum_reduction_for_comms(True)
        train(model, optimizer, rank, 2)
    return flat(model)


def resumed(rank: int, size: int) -> tuple[bool, list[str]]:
    """Six steps at once, and as three and three with a checkpoint between; what was saved of."""
    model, optimizer, handle = begin(size, *FEW)
    with handle:
        train(model, optimizer, rank, 3)
        saved = through_torch_save(
            {
                "weights": [p.detach().to_local().clone() for p in model.parameters()],
                "of": handle.state_dict(),
            }
        )
        momenta = [optimizer.state[p]["momentum_buffer"].to_local().clone() for p in model.parameters()]
        train(model, optimizer, rank, 3, start=3)
        expected = local(model)
    model, optimizer, handle = begin(size, *FEW)
    with handle:
        with torch.no_grad():
            for p, value, momentum in zip(model.parameters(), saved["weights"], momenta, strict=True):
                p.to_local().copy_(value)
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                optimizer.state[p]["momentum_buffer"].to_local().copy_(momentum)
        handle.load_state_dict(saved["of"])
        train(model, optimizer, rank, 3, start=3)
        (part,) = saved["of"].values()
        return torch.equal(local(model), expected), sorted(part["state"])


def infinite(rank: int, size: int) -> list[bool]:
    """A backward in which one rank's gradient is infinite: whether what is owed stays, tensor by tensor."""
    model, optimizer, handle = begin(size, "qsgd:bits=1", "qsgd:bits=1", None)
    with handle:
        train(model, optimizer, rank, 2)
        before = through_torch_save(handle.state_dict())
        optimizer.zero_grad()
        x = torch.full((8, 16), float("inf") if rank == 1 else 1.0)
        model(x).sum().backward()
        after = handle.state_dict()
    ((old,), (new,)) = before.values(), after.values()
    return [
        torch.equal(tensor, new["state"][name][path])
        for name, leaves in old["state"].items()
        for path, tensor in leaves.items()
    ]


def refusals(rank: int, size: int) -> list[str]:
    """What is said of what cannot be."""
    told = []
    mesh = mesh_of(size, 2)

    def attach(across: str, replicas: Any, **others: Any) -> None:
        model = sharded(mesh["shard"])
        try:
            distcomp.attach(model, sgd(model), across, replicas=replicas(), timeout_s=10.0, **others).detach()
            told.append("nothing")
        except distcomp.DistcompError as error:
            told.append(f"{type(error).__name__}: {error}")

    attach("diloco", lambda: distcomp.Replicas(mesh["replicate"], "identity"))
    attach("identity", lambda: distcomp.Replicas(mesh["replicate"], "diloco"))
    attach("identity", lambda: mesh["replicate"], weights="bf16")
    attach("identity", lambda: distcomp.Replicas(mesh["replicate"], f"qsgd:bits={4 + 4 * (rank == 3)}"))
    attach("identity", lambda: distcomp.Replicas("replicate", "identity"))
    dist.barrier()
    return told
