"""Parametrizations of each order, small enough to be counted by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distcomp.parametrize import Order, Parametrization, Storage


class LowRank(Parametrization):
    """``weight = left right``, of a rank."""

    owner = "structured"
    order = Order.STRUCTURE

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def decode(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest matrix of that rank (Eckart and Young)."""
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = s[: self.rank].sqrt()
        return u[:, : self.rank] * root, root[:, None] * v[: self.rank]


class Halves(Parametrization):
    """Rounds to multiples of a half, straight through: holds exactly what it gives."""

    owner = "precision"
    order = Order.QUANTIZE

    def decode(self, weight: Tensor) -> Tensor:
        return weight + (torch.round(2 * weight) / 2 - weight).detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def storage(self, below: Storage, weight: tuple[Tensor, ...]) -> Storage:
        return Storage(weight[0].numel(), 4, below.extra)


class Signs(Halves):
    """``sign(w) mean|w|``, which no zero is: it cannot hold a pruned weight."""

    def decode(self, weight: Tensor) -> Tensor:
        return weight + (torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean() - weight).detach()


class Keep(Parametrization):
    """Zero where ``mask`` is False."""

    owner = "pruning"
    order = Order.PRUNE
    selects = True
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def decode(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def network(seed: int = 0) -> nn.Sequential:
    """Of 312 and 125 numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :5].argmax(1)


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
