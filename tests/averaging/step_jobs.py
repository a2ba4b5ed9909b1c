"""Optimizers that ask for several gradients in one step, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distcomp
from tests.averaging.model_jobs import batch, flat


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., ICLR 2021), laid out as its usual PyTorch code: the step is
    that of another optimizer, with the gradient at the worst point nearby."""

    def __init__(self, parameters: Any, rho: float = 0.5) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["before"] = p.data.clone()
            p.data.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["before"]
        self.base.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))


def optimizer_of(model: nn.Module, how: str, rank: int) -> torch.optim.Optimizer:
    if how == "lbfgs":  # each rank evaluates as often as it likes
        return torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2 + 2 * rank)
    return SAM(model.parameters())


def take_step(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor], how: str, first: Any) -> int:
    """One step, the first forward and backward of it within ``first()``; how many were evaluated."""
    evaluated = 0

    def closure() -> Tensor:
        nonlocal evaluated
        evaluated += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    if how == "lbfgs":
        optimizer.step(closure)
    elif how == "sam as a closure":
        closure()
        optimizer.step(closure)
    else:
        with first():
            closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
    return evaluated


def average(model: nn.Module, size: int) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data.div_(size)


def alike(rank: int, size: int, spec: Any, how: str, steps: int) -> tuple[Tensor, Tensor, int, list[int]]:
    """Weights after training, averaged after each step by the method and by hand."""
    by_hand = network()
    optimizer = optimizer_of(by_hand, how, rank)
    evaluated = []
    for index in range(steps):
        evaluated.append(take_step(by_hand, optimizer, batch(rank, index), how, torch.enable_grad))
        average(by_hand, size)
    model = network()
    optimizer = optimizer_of(model, how, rank)
    with distcomp.attach(model, optimizer, spec) as handle:
        for index in range(steps):
            take_step(model, optimizer, batch(rank, index), how, handle.no_sync)
        handle.state_dict()
        iterations = handle.stats()["iterations"]
        return flat(by_hand), flat(model).clone(), iterations, evaluated


def perturbed(rank: int, size: int, spec: Any) -> str:
    """What is told where the perturbed weights would be averaged."""
    model = network()
    optimizer = optimizer_of(model, "sam", rank)
    handle = distcomp.attach(model, optimizer, spec, timeout_s=30)
    try:
        for index in range(4):
            take_step(model, optimizer, batch(rank, index), "sam", torch.enable_grad)
    except distcomp.DistcompError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        handle.detach()
    return "went on"


def by_hand(rank: int, size: int) -> int:
    """A loop without an optimizer moves the weights itself: that is its step."""
    model = network()
    with distcomp.attach(model, None, "local_sgd:period=1") as handle:
        for index in range(4):
            x, y = batch(rank, index)
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        handle.state_dict()
        return int(handle.stats()["iterations"])
