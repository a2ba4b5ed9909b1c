"""What the ranks do: real DDP whose layers are not all used in every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.active import ActiveParameters, ActiveSet, Context
from distcomp.layout import Layout
from distcomp.randomness import Key
from tests.conformance.toys.active_toy import SharedCoins


class Layers(nn.Module):
    """A trunk and two residual layers, each of which may be left out of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(12, 24)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)
        self.used = ("first", "second")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        for name in self.used:
            x = x + torch.tanh(getattr(self, name)(x))
        scores: Tensor = self.head(x)
        return scores


def layers_of(step: int, rank: int) -> tuple[str, ...]:
    """Used in a step: in turn both, one alone on all ranks, none anywhere twice, both, and a different one on
    each rank. Seven, so that no number of micro-steps sees them all."""
    both, on_each = ("first", "second"), ("first", "second")[rank % 2]
    return (both, ("first",), (), (), both, (on_each,), ("second",))[step % 7]


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10_000 * rank + step))
    return x, x[:, :5].argmax(1)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return nn.functional.cross_entropy(model(x), y)


def made(spec: str, bucket_mb: float = 0.003, **options: Any) -> tuple[Any, Any, Any]:
    model = DistributedDataParallel(
        Layers(), bucket_cap_mb=bucket_mb, find_unused_parameters=True, broadcast_buffers=False
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, **options)
    return model, optimizer, distcomp.attach(model, optimizer, spec)


def state_of(handle: Any) -> dict[str, dict[str, Tensor]]:
    (saved,) = handle.state_dict().values()
    state: dict[str, dict[str, Tensor]] = saved["state"]
    return state


def account(
    rank: int, size: int, spec: str, micro_steps: int
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], list[str]]:
    """By parameter: all gradients that came in here, all that was applied, and what is owed here; and where
    the state of a parameter changed that no rank had used."""
    model, optimizer, handle = made(spec)
    parameters = dict(model.module.named_parameters())
    zeros = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    came, applied = dict(zeros), dict(zeros)
    touched: list[str] = []
    with handle:
        for step in range(18):
            optimizer.zero_grad()
            before = state_of(handle)
            nobody = set(parameters)
            for micro in range(micro_steps):
                number = micro_steps * step + micro
                model.module.used = layers_of(number, rank)
                on_all = {layer for other in range(size) for layer in layers_of(number, other)}
                nobody -= {n for n in parameters if n.split(".")[0] in {"trunk", "head", *on_all}}
                loss = loss_of(model.module, rank, number)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    came[name] = came[name] + (0 if gradient is None else gradient.double())
                if micro + 1 < micro_steps:
                    with handle.no_sync():
                        loss_of(model, rank, number).backward()
                else:
                    loss_of(model, rank, number).backward()
            after = state_of(handle)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    applied[name] = applied[name] + parameter.grad.double()
                old, new = before.get(name), after.get(name, {})
                same = old is None or all(torch.equal(old[path], new[path]) for path in old)
                if name in nobody and not same:
                    touched.append(f"{name} in step {step}")
            optimizer.step()
        residual = dict(zeros)
        for name, leaves in state_of(handle).items():
            for path, leaf in leaves.items():
                if path.split("/")[-1] == "residual":
                    residual[name] = residual[name] + leaf.double().view_as(residual[name])
        return {name: (came[name], applied[name], residual[name]) for name in parameters}, touched


def replicas(rank: int, size: int) -> bool:
    model, optimizer, handle = made("qsgd:bits=1", momentum=0.9)
    with handle:
        for step in range(12):
            model.module.used = layers_of(step, rank)
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, each) for each in everyone)


def priced(rank: int, size: int) -> list[dict[str, int]]:
    """What each step sends, by kind, in one bucket."""
    model, _, handle = made("identity", bucket_mb=25)
    sent, total = [], dict[str, int]()
    with handle:
        for step in range(6):
            model.module.used = layers_of(step, rank)
            loss_of(model, rank, step).backward()
            before, total = total, handle.stats()["payload_by_kind"]
            sent.append({kind: total[kind] - before.get(kind, 0) for kind in total})
    return sent


def left_alone(rank: int, size: int) -> tuple[bool, bool]:
    """A layer that no rank uses, for some steps, while the optimizer decays weights and nobody clears
    gradients: are its weights what they are without a method, and is its residual what it was?"""
    model, optimizer, handle = made("qsgd:bits=1")
    with handle:
        model.module.used = ("first", "second")
        loss_of(model, rank, 0).backward()
        optimizer.step()
        stale = model.module.second.weight.grad.clone()
        residual = state_of(handle)["second.weight"]
        for step in range(1, 4):
            model.module.used = ("first",)
            for name, parameter in model.module.named_parameters():
                if not name.startswith("second"):
                    parameter.grad = None
            loss_of(model, rank, step).backward()
        after = state_of(handle)["second.weight"]
        return (
            torch.equal(model.module.second.weight.grad, stale),
            all(torch.equal(residual[path], after[path]) for path in residual),
        )


def decayed(rank: int, size: int) -> tuple[bool, bool]:
    """Whether weight decay changed a layer that nobody used, and one that was."""
    model, optimizer, handle = made("qsgd:bits=1", weight_decay=0.5)
    unused, used = model.module.second.weight.detach().clone(), model.module.first.weight.detach().clone()
    with handle:
        for step in range(3):
            model.module.used = ("first",)
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
    return (
        not torch.equal(model.module.second.weight, unused),
        not torch.equal(model.module.first.weight, used),
    )


@dataclass(frozen=True)
class Astray(ActiveParameters):
    """Reads what it may not: from some step on its answer is another on one rank than on the others."""

    rank: int = field(repr=False)
    at: int = 3

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        astray = context.step >= self.at and self.rank == 1
        return ActiveSet.of(layout, {"second.weight": not astray})


def strayed(rank: int, size: int, averaged: bool) -> tuple[int, str]:
    """The step to which training came, and the words in which it ended."""
    model: nn.Module = Layers()
    inner = distcomp.local_sgd(period=1) if averaged else "qsgd:bits=1"
    method = distcomp.averaging.active_only(inner, Astray(rank))
    if not averaged:
        model = DistributedDataParallel(model, bucket_cap_mb=0.003)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    step = 0
    try:
        with distcomp.attach(model, optimizer, method, timeout_s=20):
            for step in range(8):
                optimizer.zero_grad()
                loss_of(model, rank, step).backward()
                optimizer.step()
    except (distcomp.Mismatch, RuntimeError) as error:  # DDP passes on the words, not the type
        return step, str(error)
    return step, "not noticed"


def resumed(rank: int, size: int, at: int) -> Tensor:
    """The weights after 12 steps with shared coins and 1 bit; from ``at`` on with copies of the method, the
    model and all that was saved."""
    method = distcomp.averaging.active_only("qsgd:bits=1", Coins())
    model = DistributedDataParallel(Layers(), bucket_cap_mb=0.003)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    handle = distcomp.attach(model, optimizer, method)
    for step in range(12):
        if step == at:
            saved = handle.state_dict()
            handle.detach()
            handle = distcomp.attach(model, optimizer, copy.deepcopy(method))
            handle.load_state_dict(saved)
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    handle.detach()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@dataclass(frozen=True)
class Coins(ActiveParameters):
    """A coin for each parameter and step, the same on every rank."""

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        def awake(name: str) -> bool:
            return bool(torch.rand((), generator=context.shared.fold("coin", name).generator()) < 0.6)

        return ActiveSet.of(layout, {name: awake(name) for name in layout.names})


class Deep(nn.Module):
    """Two residual layers, which the coins of the worked example leave out."""

    def __init__(self, coins: SharedCoins) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.head = nn.Linear(12, 24), nn.Linear(24, 5)
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])
        self.coins = coins
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        for number, layer in enumerate(self.layers):
            if self.coins.awake(f"layers.{number}", Key.of(7, self.step)):
                x = x + torch.tanh(layer(x))
        scores: Tensor = self.head(x)
        return scores


def with_coins(rank: int, size: int) -> tuple[list[int], list[int], Tensor]:
    """What each step sent, how many layers its coins left in, and the weights at the end."""
    coins = SharedCoins(("layers.0", "layers.1"))
    model = DistributedDataParallel(Deep(coins), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    sent, awake, total = [], [], 0
    with distcomp.attach(
        model, optimizer, distcomp.averaging.active_only("identity", coins), seed=7
    ) as handle:
        for step in range(10):
            model.module.step = step
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
            before, total = total, handle.stats()["payload_bytes"]
            sent.append(total - before)
            awake.append(sum(coins.awake(f"layers.{n}", Key.of(7, step)) for n in range(2)))
    return sent, awake, torch.cat([p.detach().flatten() for p in model.parameters()])
