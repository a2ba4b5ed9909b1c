"""What the ranks do: real DistributedDataParallel around structures, with a method on the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import structured
from distcomp.layout import Layout
from distcomp.methods import Method, parse
from distcomp.parametrize import materialize
from distcomp.structured import BlockDiagonal, SparseBasis

STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 16, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


def split(net: nn.Module) -> nn.Module:
    return structured.install_structures(
        net, ["5"], lambda layer, w: BlockDiagonal(torch.arange(24) % 3, torch.arange(192) % 3, 3)
    )


STRUCTURES: dict[str, Any] = {
    "circulant": lambda net: structured.circulant(net, 4, layers=["2", "5"], fft=True),
    "projections": lambda net: structured.circulant(net, None, signs=True, layers=["5"]),
    "hashed": lambda net: structured.hashed(net, 8, layers=["2", "5"]),
    "low rank": lambda net: structured.low_rank(net, 3, layers=["2", "5"]),
    "cp": lambda net: structured.low_rank(net, 4, layers=["2"], kind="cp"),
    "split": split,
    "sparse": lambda net: structured.install_structures(net, ["2"], lambda _, w: SparseBasis(tuple(w.shape))),
}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1000 * rank + step))
    return x, x.flatten(1)[:, :5].argmax(1)


def stepped(model: nn.Module, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        x, y = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def flat(model: nn.Module) -> list[float]:
    return [number for part in model.parameters() for number in part.detach().flatten().tolist()]


Replica = tuple[list[float], list[float], int, int, int]


def replicas(rank: int, size: int, method: str) -> dict[str, Replica]:
    """By structure: what is stored, what is computed with; bytes of the last step, of a gradient, and those
    that the method declares for as many numbers."""
    results = {}
    for name, change in STRUCTURES.items():
        inner = change(network())
        model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        handle = distcomp.attach(model, optimizer, method)
        stepped(model, optimizer, rank, range(STEPS))
        sent = handle.stats()["last"]["payload_bytes"]
        declared = structured.summary(inner).exchanged_bytes
        handle.detach()
        layout = Layout.of([(key, tuple(p.shape)) for key, p in inner.named_parameters()])
        chosen = parse(method)
        by_method = chosen.payload_bytes(layout, size, STEPS - 1) if isinstance(chosen, Method) else 0
        results[name] = (flat(inner), flat(materialize(inner)), sent, declared, by_method)
    return results


def resumed(rank: int, size: int, name: str, method: str, stop: int) -> list[float]:
    """Stored numbers after STEPS steps; with ``stop``, through a checkpoint in between."""
    inner = STRUCTURES[name](network())
    model, start = DistributedDataParallel(inner), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    handle = distcomp.attach(model, optimizer, method)
    if stop:
        stepped(model, optimizer, rank, range(stop))
        saved = handle.state_dict()
        weights = {k: v.clone() for k, v in inner.state_dict().items()}
        momentum = optimizer.state_dict()
        handle.detach()
        inner = STRUCTURES[name](network())
        inner.load_state_dict(weights)
        model, start = DistributedDataParallel(inner), stop
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        optimizer.load_state_dict(momentum)
        handle = distcomp.attach(model, optimizer, method)
        handle.load_state_dict(saved)
    stepped(model, optimizer, rank, range(start, STEPS))
    handle.detach()
    return flat(inner)


def driven(rank: int, size: int) -> dict[str, list[float]]:
    """By driver: all weights after training; nothing of a driver is sent."""
    results = {}
    for name, drive in {
        "lc": lambda model: structured.lc(model, None, structured.codebook(3), every=2, mu=0.1),
        "soft sharing": lambda model: structured.soft_sharing(model, components=4, strength=1e-3),
        "force": lambda model: structured.force_regularization(model, 0.1),
        "split": lambda model: structured.splitnet(model, ["2", "5", "7"], 2, until=4),
    }.items():
        inner = network()
        model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        handle = distcomp.attach(model, optimizer, "qsgd:bits=4")
        driver = drive(model)
        stepped(model, optimizer, rank, range(STEPS))
        assert driver.iteration == STEPS, f"{name} was driven {driver.iteration} times"
        handle.detach()
        if name == "split":
            driver.detach()
        else:
            driver.detach() if name == "force" else driver.finish()
        results[name] = flat(inner)
    return results


def converted_early(rank: int, size: int) -> tuple[list[float], int, int]:
    """Dense for two steps, circulant from then on: stored numbers, and bytes of a step before and after."""
    inner = network()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    handle = distcomp.attach(model, optimizer, "identity")
    stepped(model, optimizer, rank, range(2))
    before = handle.stats()["last"]["payload_bytes"]
    with pytest.raises(distcomp.DistcompError, match="hand over the plain model"):
        structured.restructure(model, optimizer, lambda m: structured.circulant(m, 4, layers=["2", "5"]))
    handle.detach()
    structured.restructure(inner, optimizer, lambda m: structured.circulant(m, 4, layers=["2", "5"]))
    model = DistributedDataParallel(inner)
    handle = distcomp.attach(model, optimizer, "identity")
    stepped(model, optimizer, rank, range(2, 4))
    after = handle.stats()["last"]["payload_bytes"]
    handle.detach()
    return flat(inner), before, after


def in_turn(rank: int, size: int) -> tuple[list[float], list[int], int]:
    """Of a cut model whose groups are sent in turn: numbers, bytes of each step, bytes of a whole
    gradient."""
    inner = split(network())
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    method = distcomp.averaging.active_only("identity", structured.groups_in_turn(model))
    handle, sent = distcomp.attach(model, optimizer, method), []
    for step in range(6):
        stepped(model, optimizer, rank, range(step, step + 1))
        sent.append(handle.stats()["last"]["payload_bytes"])
    handle.detach()
    return flat(inner), sent, structured.summary(inner).exchanged_bytes


def reconstructed(rank: int, size: int) -> list[float]:
    """Factors trained for the original's outputs, on inputs of each rank's own."""
    reference = network()
    inner = structured.low_rank(network(), 3, layers=["2", "5"], kind="svd")
    model = DistributedDataParallel(inner)
    handle = distcomp.attach(model, None, "qsgd:bits=4")
    structured.reconstruct(model, reference, (batch(rank, step)[0] for step in range(STEPS)))
    handle.detach()
    return flat(inner)
