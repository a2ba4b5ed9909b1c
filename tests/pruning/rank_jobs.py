"""What the ranks do: real DDP, real backward, a pruner and its method."""

from __future__ import annotations

import io
import random
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import pruning
from distcomp.pruning.masks import digest

MAKERS = {
    "dns": lambda m, o: pruning.dns(m, o, 0.2, gamma=0.02),
    "rigl": lambda m, o: pruning.rigl(m, o, 0.7, every=5, until=900),
    "gradual": lambda m, o: pruning.gradual(m, o, 0.8, end=12, every=3),
    "once": lambda m, o: pruning.magnitude(m, o, 0.9, steps=(1,)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 5))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10_000 * rank + step))
    return x, x[:, :5].argmax(1)


def made(maker: str, method: Any, ddp: bool = True, bucket_mb: float = 0.001) -> tuple[Any, Any, Any, Any]:
    model: nn.Module = network()
    if ddp:
        model = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = MAKERS[maker](model, optimizer)
    method = distcomp.parse(method) if isinstance(method, str) else method
    return model, optimizer, pruner, distcomp.attach(model, optimizer, distcomp.masked(pruner, method))


def train(model: nn.Module, optimizer: Any, rank: int, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def long_run(rank: int, size: int, maker: str, steps: int) -> tuple[list[int], bool, float]:
    """Digests after each change of masks, while every rank is held up now and then."""
    model, optimizer, pruner, handle = made(maker, "qsgd:bits=4", bucket_mb=25)
    rng, clock, digests = random.Random(rank), threading.Event(), []
    with handle:
        for step in range(steps):
            if rng.random() < 0.05:
                clock.wait(rng.random() * 0.02)
            train(model, optimizer, rank, 1, step)
            pruner.settle()
            digests.append(digest(pruner.masks))
        everyone = [torch.empty_like(flat(model)) for _ in range(size)]
        dist.all_gather(everyone, flat(model))
        return digests, all(torch.equal(one, everyone[0]) for one in everyone), pruner.density


def losses(rank: int, size: int, maker: str, method: str) -> tuple[list[float], list[int], dict[str, Any]]:
    model, optimizer, pruner, handle = made(maker, method)
    with handle:
        found, sent = [], []
        for step in range(16):
            before = handle.stats()["payload_bytes"]
            found += train(model, optimizer, rank, 1, step)
            sent.append(handle.stats()["payload_bytes"] - before)
        pruner.settle()
        return found, sent, handle.stats()["sparsity"]


def alone(maker: str, size: int) -> list[list[float]]:
    """The same training in one process: the mean of all ranks' gradients; each rank's losses."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    MAKERS[maker](model, optimizer)
    found: list[list[float]] = [[] for _ in range(size)]
    for step in range(16):
        optimizer.zero_grad()
        pairs = [batch(rank, step) for rank in range(size)]
        scores = model(torch.cat([x for x, _ in pairs])).split(8)
        each = [nn.functional.cross_entropy(s, y) for s, (_, y) in zip(scores, pairs, strict=True)]
        (sum(each) / size).backward()
        optimizer.step()
        for mine, loss in zip(found, each, strict=True):
            mine.append(loss.item())
    return found


def strayed(rank: int, size: int) -> str:
    model, optimizer, pruner, handle = made("gradual", "identity")
    with handle:
        train(model, optimizer, rank, 4)
        if rank == 1:
            pruner.pruned["0.weight"].mask[0] = True
            pruner.pruned["0.weight"].mask[1] = False
        handle_stats = handle.stats()
        assert handle_stats["iterations"] == 4
        try:
            pruner.step = 6  # a change is due after this
            pruner._pending = True
            pruner.settle()
        except distcomp.Mismatch as error:
            return str(error)
    return "not noticed"


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def whole(rank: int, size: int, maker: str, method: str) -> Tensor:
    model, optimizer, _, handle = made(maker, method)
    with handle:
        train(model, optimizer, rank, 14)
        return flat(model)


def first_half(rank: int, size: int, maker: str, method: str) -> Any:
    model, optimizer, pruner, handle = made(maker, method)
    with handle:
        train(model, optimizer, rank, 7)
        return through_a_file(
            [pruner.state_dict(), model.module.state_dict(), optimizer.state_dict(), handle.state_dict()]
        )


def second_half(rank: int, size: int, maker: str, method: str, saved: list[Any]) -> Tensor:
    model, optimizer, pruner, handle = made(maker, method)
    with handle:
        pruner.load_state_dict(saved[rank][0])
        model.module.load_state_dict(saved[rank][1])
        optimizer.load_state_dict(saved[rank][2])
        handle.load_state_dict(saved[rank][3])
        train(model, optimizer, rank, 7, start=7)
        return flat(model)


AVERAGINGS = {
    "local_sgd": lambda: distcomp.local_sgd(period=3),
    "choco": lambda: distcomp.choco("topk:ratio=0.25"),
    "dpsgd": lambda: distcomp.dpsgd(),
    "dcd": lambda: distcomp.dcd(),
}


def averaged(rank: int, size: int, averaging: str, maker: str) -> tuple[list[int], bool, float, float, int]:
    model, optimizer, pruner, handle = made(maker, AVERAGINGS[averaging](), ddp=False)
    digests = []
    with handle:
        for step in range(30):
            train(model, optimizer, rank, 1, step)
            digests.append(digest(pruner.masks))
        with handle.averaged_model() as spread:
            pass
        sent = handle.stats()["payload_bytes"]
        train(model, optimizer, rank, 6, 30)
        each = (handle.stats()["payload_bytes"] - sent) // 6
        computed = model[0].weight.detach()
        return digests, bool((computed[~pruner.masks["0.weight"]] == 0).all()), pruner.density, spread, each
