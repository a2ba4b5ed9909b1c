"""What the ranks do with every pair: DistributedDataParallel, a compressed wire, FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import DistcompError
from distcomp.parametrize import install, materialize, parameters
from tests.parametrize.pairs import PAIRS, W, built
from tests.parametrize.toys import Halves, LowRank, batch, network

STEPS = 3


def trained(model: nn.Module, optimizer: Any, rank: int, size: int = 1) -> None:
    """Steps on batches of a rank's own; of all ranks, one after the other, where ``size`` is given."""
    for step in range(STEPS):
        optimizer.zero_grad()
        for one in range(rank, rank + size):
            x, y = batch(100 * one + step)
            (nn.functional.cross_entropy(model(x), y) / size).backward()
        optimizer.step()


def flat(model: nn.Module) -> list[float]:
    return [number for part in model.parameters() for number in part.detach().flatten().tolist()]


def replicas(rank: int, size: int, method: str | None) -> list[tuple[list[float], list[float]]]:
    """Of each pair: what is stored, and what is computed with, after a few steps."""
    results = []
    for names in PAIRS:
        inner = built(names, 0)
        model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        handle = None if method is None else distcomp.attach(model, optimizer, method)
        trained(model, optimizer, rank)
        if handle is not None:
            handle.detach()
        results.append((flat(inner), flat(materialize(inner))))
    return results


def sharded(rank: int, size: int) -> list[float]:
    """A quantized structure under FSDP2: what is stored, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = built(("structure", "quantizer"), 0)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    trained(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    return [number for part in model.parameters() for number in part.full_tensor().flatten().tolist()]  # type: ignore[operator]


def refused(rank: int, size: int) -> tuple[str, str, bool]:
    """What is said to a structure that comes after DDP, or after FSDP2; and whether a quantizer may come."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = DistributedDataParallel(network())
    sentences = []
    for late in (model, fully_shard(network(), mesh=init_device_mesh("cpu", (size,)))):
        try:
            install(late, W, LowRank(3))
        except DistcompError as error:
            sentences.append(str(error))
    install(model, W, Halves())
    trained(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    (parameter,) = parameters(model, W)
    totals = [torch.zeros_like(parameter) for _ in range(size)]
    torch.distributed.all_gather(totals, parameter.detach())
    return sentences[0], sentences[1], all(torch.equal(one, totals[0]) for one in totals)
