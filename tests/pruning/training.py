"""A small model and a loop that trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("0.weight", "2.weight")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def sgd(model: nn.Module, lr: float = 0.2, momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    after: Callable[[int], Any] | None = None,
) -> list[float]:
    """``after(step)`` is called when the optimizer has stepped."""
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after(step)
    return losses
