"""What the ranks do in the tests: small models, real DDP, real backward."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp


def network(seed: int = 0, width: int = 48) -> nn.Sequential:
    """Weights, biases, a norm; several buckets when DDP's cap is small."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, width),
        nn.ReLU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 5),
    )


def wrap(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP with buckets of about 4 kB."""
    return DistributedDataParallel(module, **{"bucket_cap_mb": 0.004, **options})


def batches(rank: int, count: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for the same rank, whenever they are asked for."""
    for index in range(start, start + count):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        x = torch.randn(8, 16, generator=generator)
        yield x, x[:, :5].argmax(1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int, start: int = 0
) -> list[float]:
    losses = []
    for x, y in batches(rank, steps, start):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module, spec: str = "identity") -> torch.optim.SGD:
    """With momentum, unless the method brings its own and says so."""
    usual = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    try:
        distcomp.parse(spec).check(usual)
    except distcomp.DistcompError:
        return torch.optim.SGD(model.parameters(), lr=0.1)
    return usual


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def jitter(model: nn.Module, rank: int) -> None:
    """Random delays in every layer's backward, different on each rank."""
    rng, clock = random.Random(rank), threading.Event()

    def delay(*_: object) -> None:
        clock.wait(rng.random() * 0.004)

    for part in model.modules():
        if not list(part.children()):
            part.register_full_backward_hook(delay)


def attached(spec: str, rank: int, **options: Any) -> tuple[Any, Any, Any]:
    model = wrap(network(), **options)
    optimizer = sgd(model, spec)
    return model, optimizer, distcomp.attach(model, optimizer, spec)


def replicas_equal(model: nn.Module) -> bool:
    """Whether all ranks hold the same bits."""
    mine = flat(model)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(one, mine) for one in everyone)
