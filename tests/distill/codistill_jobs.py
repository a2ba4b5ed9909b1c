"""What ranks do to test codistillation."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.averaging import codistill
from tests.averaging.return_jobs import copies_of, trained_together
from tests.cluster import threads_left
from tests.distill.networks import mlp, rows

SHARED, _ = rows(20, seed=99)
PERIOD, STEPS = 3, 8


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        x, y = rows(8, seed=100 * rank + step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def run(rank: int, size: int, text: str, width: int = 8, ddp: bool = False) -> dict[str, Any]:
    """Each rank's network begins otherwise, and may be of another width."""
    model: nn.Module = mlp(width, seed=0 if ddp else rank)
    if ddp:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with distcomp.attach(model, optimizer, text, shared=SHARED, seed=5) as handle:
        train(model, optimizer, rank, range(STEPS))
        stats = handle.stats()
        with handle.averaged_model() as apart:
            pass
    return {"weights": flat(model), "stats": stats, "apart": apart}


def widths(rank: int, size: int, text: str) -> dict[str, Any]:
    return run(rank, size, text, 8 + 4 * rank)


def resumed(rank: int, size: int, text: str) -> tuple[Tensor, Tensor]:
    def begin() -> tuple[Any, ...]:
        model = mlp(8 if "checkpoints" in text else 8 + 2 * rank, seed=rank)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, distcomp.attach(model, optimizer, text, shared=SHARED, seed=5)

    model, optimizer, handle = begin()
    train(model, optimizer, rank, range(STEPS))
    handle.detach()
    model2, optimizer2, handle2 = begin()
    train(model2, optimizer2, rank, range(5))
    saved = handle2.state_dict(), optimizer2.state_dict()
    handle2.detach()
    again, fresh, handle3 = begin()
    torch.manual_seed(77)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.normal_()
    handle3.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    train(again, fresh, rank, range(5, STEPS))
    handle3.detach()
    return flat(model), flat(again)


def refusals(rank: int, size: int) -> list[str]:
    told = []

    def attach(model: nn.Module, method: Any, shared: Any) -> None:
        try:
            distcomp.attach(model, torch.optim.SGD(model.parameters(), 0.1), method, shared=shared).detach()
            told.append("nothing")
        except distcomp.DistcompError as error:
            told.append(f"{type(error).__name__}: {error}")

    attach(mlp(), "codistill", None)
    attach(mlp(), "codistill:rows=21", SHARED)
    attach(mlp(), "codistill", [1, 2])
    attach(mlp(), "codistill", SHARED + rank)
    attach(nn.Sequential(mlp(), nn.Linear(4, 4 + rank)), "codistill", SHARED)
    attach(mlp(8 + rank), "codistill:exchanged=checkpoints", SHARED)
    attach(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), "codistill", SHARED)
    attach(mlp(), "local_sgd", SHARED)
    return told


def other_world(rank: int, size: int) -> str:
    model = mlp(8, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "codistill:period=2", shared=SHARED) as handle:
        train(model, optimizer, rank, range(4))
        parts = handle.gather_state_dicts()
        store = [parts]
        torch.distributed.broadcast_object_list(store, 0)
        fewer = {key: {**part, "world_size": 3, "ranks": "0-2"} for key, part in store[0].items()} | {
            "rank2": {**store[0]["rank0"], "world_size": 3, "ranks": "0-2"}
        }
        try:
            handle.load_state_dict(fewer)
        except distcomp.DistcompError as error:
            return str(error)
    return "nothing"


def dies(rank: int, size: int, victim: int) -> dict[str, Any]:
    model = mlp(8 + rank, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    text = "codistill:period=2,on_failure=continue"
    handle = distcomp.attach(model, optimizer, text, shared=SHARED, timeout_s=10.0)
    for step in range(10):
        if rank == victim and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, rank, range(step, step + 1))
    stats = handle.stats()
    handle._leave(agree=False)
    return {"stats": stats, "finite": bool(torch.isfinite(flat(model)).all())}


def returns(rank: int, size: int, text: str) -> dict[str, Any]:
    """One rank is slow, is given up, and comes back with its own network."""
    torch.distributed.barrier()  # a busy machine starts ranks at times that are further apart than timeout_s
    model = mlp(8, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    handle = distcomp.attach(model, optimizer, text, shared=SHARED, timeout_s=6.0)
    found = trained_together(rank, handle, lambda step: train(model, optimizer, rank, range(step, step + 1)))
    handle.state_dict()  # makes the exchange of the last step now
    found["heard"], found["left out"] = handle.stats()["heard"], handle.stats().get("lost", [])
    found["replicas"], found["public"] = copies_of(handle)
    handle.detach()
    return {**found, "weights": flat(model), "threads": threads_left()}


def clipped(rank: int, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient that the optimizer sees, with a loss scale and without, and the oracle's."""

    class Scaler:
        def scale(self, outputs: Tensor) -> Tensor:
            return outputs * scale

    model = mlp(8, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = codistill(period=1, values="identity", batch=20, weight=0.5, temperature=2.0)
    with distcomp.attach(model, optimizer, method, shared=SHARED, scaler=Scaler()):
        x, y = rows(8, seed=rank)
        for _ in range(2):  # the second hears of the first's exchange; weights do not move
            optimizer.zero_grad()
            (scale * cross_entropy(model(x), y)).backward()
            optimizer.step()
        seen = torch.cat([p.grad.reshape(-1) for p in model.parameters()]) / scale
    other = mlp(8, seed=1 - rank)
    p = (other(SHARED) / 2).softmax(1).detach()
    q = (model(SHARED) / 2).log_softmax(1)
    term = 4 * (p * (p.log() - q)).sum(1).mean()
    loss = cross_entropy(model(x), y) + 0.5 * term
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    return seen, torch.cat([g.reshape(-1) for g in wanted])


def shared_mean(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """One network from all: every rank has the mean of all logits, by handle.exchange."""
    model = mlp(8, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with distcomp.attach(model, optimizer, "codistill", shared=SHARED) as handle:
        train(model, optimizer, rank, range(2))
        own = model(SHARED).detach()
        return own, handle.exchange(own)


def as_simulated(rank: int, size: int, text: str) -> tuple[Tensor, int]:
    """Seven steps as the simulation makes them: one model to begin with, one batch for each rank."""
    model = mlp(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with distcomp.attach(model, optimizer, text, shared=SHARED, seed=5) as handle:
        x, y = rows(8, seed=rank)
        for _ in range(7):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return flat(model), handle.stats()["payload_bytes"]
