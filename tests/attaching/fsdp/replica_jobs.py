"""What ranks do to test averaging across replicas of sharded models: islands of FSDP2, rarely in touch."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distcomp

from .shard_jobs import batch, flat, local, mesh_of, network, sgd, sharded, through_torch_save

Found = tuple[Tensor, Tensor, float, Tensor, dict[str, Any]]
"""Weights before the last averaging, their mean and spread, the weights at the end, and statistics."""


def even(seed: int = 0) -> nn.Sequential:
    """Shards of two ranks are whole chunks of 256; biases would not be."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 16, bias=False), nn.Linear(16, 32, bias=False)
    )


def island(mesh: Any, seed: int, whole: str) -> nn.Module:
    if whole == "odd":
        return sharded(mesh, seed)
    return fully_shard(even(seed), mesh=mesh)


def start(
    rank: int, size: int, spec: Any, replicas: int = 2, whole: str = "odd", **options: Any
) -> tuple[nn.Module, torch.optim.SGD, distcomp.Handle, int]:
    """An island's model, and which island it is. Replicas begin differently: attaching makes them alike."""
    mesh = mesh_of(size, replicas)
    replica = mesh.get_local_rank("replicate")
    model = island(mesh["shard"], replica, whole)
    optimizer = sgd(model)
    handle = distcomp.attach(model, optimizer, spec, replicas=mesh["replicate"], **options)
    return model, optimizer, handle, replica


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, worker: int, steps: int, start: int = 0
) -> None:
    """All ranks of an island see the island's batch: their mean gradient is one worker's, exactly."""
    for index in range(start, start + steps):
        x, y = batch(worker, index)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def whole_model(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def begin_at(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Weights and momentum of this rank's shards."""
    with torch.no_grad():
        for p, value, momentum in zip(model.parameters(), saved["weights"], saved["momentum"], strict=True):
            p.to_local().copy_(value)
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            optimizer.state[p]["momentum_buffer"].to_local().copy_(momentum)


# ------------------------------------------------------------------------------------------------ jobs


def islands(rank: int, size: int, spec: Any, steps: int, whole: str = "odd") -> Found:
    model, optimizer, handle, replica = start(rank, size, spec, whole=whole)
    train(model, optimizer, replica, steps)
    handle.state_dict()  # makes the last iteration's exchange
    own, stats = flat(model), handle.stats()
    with handle.averaged_model() as spread, torch.no_grad():
        mean = flat(model)
        model(batch(0, 99)[0])  # leaves the root's weights gathered, and they are the mean's
    assert torch.equal(flat(model), own)
    handle.detach()
    return own, mean, spread, flat(model), stats


def workers(rank: int, size: int, spec: Any, steps: int, whole: str = "odd") -> Found:
    """The same by one process to a worker, whole models."""
    model = network(rank) if whole == "odd" else even(rank)
    optimizer = sgd(model)
    handle = distcomp.attach(model, optimizer, spec)
    train(model, optimizer, rank, steps)
    handle.state_dict()
    own, stats = whole_model(model), handle.stats()
    with handle.averaged_model() as spread:
        mean = whole_model(model)
    handle.detach()
    return own, mean, spread, whole_model(model), stats


def resumed(rank: int, size: int, spec: Any, at: int, steps: int) -> tuple[Tensor, Tensor]:
    """One run through, and one that is saved at step ``at`` and goes on in another model."""
    model, optimizer, handle, replica = start(rank, size, spec)
    train(model, optimizer, replica, at)
    state = handle.state_dict()
    momentum = [optimizer.state[p]["momentum_buffer"].to_local() for p in model.parameters()]
    weights = [p.to_local() for p in model.parameters()]
    saved = through_torch_save(
        {
            "weights": [one.detach().clone() for one in weights],
            "momentum": [one.clone() for one in momentum],
            "distcomp": state,
        }
    )
    train(model, optimizer, replica, steps - at, start=at)
    handle.state_dict()
    through = local(model)
    handle.detach()

    model, optimizer, handle, replica = start(rank, size, spec)
    begin_at(model, optimizer, saved)
    handle.load_state_dict(saved["distcomp"])
    train(model, optimizer, replica, steps - at, start=at)
    handle.state_dict()
    again = local(model)
    handle.detach()
    return through, again


def saved_by_dcp(rank: int, size: int, spec: Any, path: Path, steps: int) -> Tensor:
    """An island's weights as they were saved."""
    model, optimizer, handle, replica = start(rank, size, spec)
    train(model, optimizer, replica, steps)
    dcp.save({"distcomp": handle.state_dict()}, checkpoint_id=path)
    own = flat(model)
    handle.detach()
    return own


def loaded_by_dcp(rank: int, size: int, spec: Any, path: Path, replicas: int) -> tuple[str, Tensor, int]:
    """How loading is refused, if it is; else the weights right after it, and the iterations after a step."""
    model, optimizer, handle, replica = start(rank, size, spec, replicas)
    try:
        handle.load_checkpoint(path)
    except distcomp.DistcompError as error:
        return str(error), torch.empty(0), 0
    weights = flat(model)
    train(model, optimizer, replica, 2, start=50)
    assert torch.isfinite(flat(model)).all()
    return "", weights, handle.stats()["iterations"]


def accumulated(rank: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Two backwards to a step, as FSDP has it and as the handle has it."""
    found, iterations = [], 0
    for told_fsdp in (True, False):
        model, optimizer, handle, replica = start(rank, size, distcomp.local_sgd(period=2))
        for index in range(4):
            optimizer.zero_grad()
            x, y = batch(replica, 10 * index)
            if told_fsdp:
                model.set_requires_gradient_sync(False)
                nn.functional.cross_entropy(model(x), y).backward()
                model.set_requires_gradient_sync(True)
            else:
                with handle.no_sync():
                    nn.functional.cross_entropy(model(x), y).backward()
            x, y = batch(replica, 10 * index + 1)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        handle.state_dict()
        found.append(flat(model))
        iterations = handle.stats()["iterations"]
        handle.detach()
    return found[0], found[1], iterations


def optimizer_states(rank: int, size: int, policy: str) -> list[Tensor | None]:
    """The momentum of each parameter after an exchange, and what this island's would have been."""
    model, optimizer, handle, replica = start(rank, size, distcomp.local_sgd(4, optimizer_state=policy))
    train(model, optimizer, replica, 4)
    before = [optimizer.state[p]["momentum_buffer"].full_tensor().clone() for p in model.parameters()]
    handle.state_dict()
    after = [
        optimizer.state[p]["momentum_buffer"].full_tensor() if p in optimizer.state else None
        for p in model.parameters()
    ]
    handle.detach()
    return [*before, *after]


def diverging(rank: int, size: int) -> str:
    """One weight of one island's last shard is a NaN: what each rank is told."""
    model, optimizer, handle, replica = start(rank, size, distcomp.local_sgd(period=2))
    train(model, optimizer, replica, 2)
    if rank == size - 1:
        with torch.no_grad():
            model[0].weight.to_local()[-1, -1] = float("nan")
    try:
        handle.state_dict()
    except distcomp.DistcompError as error:
        return str(error)
    return "no word"


def mourning(rank: int, size: int, spec: Any, timeout_s: float) -> dict[str, Any]:
    """Island 1 is killed in step 3; what becomes of the others."""
    model, optimizer, handle, replica = start(rank, size, spec, replicas=3, timeout_s=timeout_s)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for index in range(6):
                if (replica, index) == (1, 3):
                    os.kill(os.getpid(), signal.SIGKILL)
                train(model, optimizer, replica, 1, start=index)
            handle.state_dict()
            found["own"], found["lost"] = flat(model), handle.stats().get("lost")
            handle.detach()
            found["end"] = flat(model)
        except distcomp.DistcompError as error:
            found["error"] = f"{type(error).__name__}: {error}"
    found["warned"] = [str(one.message) for one in caught if "goes on without" in str(one.message)]
    return found


SHORT = {"short": 65, "empty": 1}
"""Rows of a matrix whose second shard has one block less, or nothing."""


def refusal(rank: int, size: int, kind: str, spec: Any) -> str:
    """How an attempt is refused."""
    mesh = mesh_of(size, 2)
    model = sharded(mesh["shard"])
    if kind in SHORT:
        model = fully_shard(nn.Sequential(nn.Linear(16, SHORT[kind], bias=False)), mesh=mesh["shard"])
    replicas = {"no replicas": None, "two dimensions": mesh}.get(kind, mesh["replicate"])
    try:
        if kind == "gradients before":
            distcomp.attach(model, None, "identity", replicas=mesh["replicate"]).detach()
        distcomp.attach(model, sgd(model), spec, replicas=replicas)
    except distcomp.DistcompError as error:
        dist.barrier()
        return str(error)
    return "not refused"
