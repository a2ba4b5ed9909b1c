"""Tasks on which structures differ: pairs of digits, one digit somewhere on a noisy canvas, two worlds of
classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks._places import example

BATCH = 64
STEPS = {"pairs": 700, "shifted": 400}
TUNING = {"pairs": 250, "shifted": 150}
WORLD_STEPS = (700, 700, 250)
"""Dense, while groups are learned, after the cut."""
"""Of fine-tuning, at half of the rate."""
RATE = 2e-3
CANVAS = 12
WORLD_NOISE = 1.0


class Task:
    """Batches to train with and examples to test on; the same ones for every row of a seed."""

    def __init__(self, name: str, seed: int) -> None:
        digits = example("digits")
        self.name, self._digits = name, digits
        self.train, held_out = digits.digits()
        self.draw = torch.Generator().manual_seed(1000 + seed)
        self.test = self._of(held_out, 4000, torch.Generator().manual_seed(0))

    def _of(self, data: tuple[Tensor, Tensor], count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.name == "pairs":
            pairs: tuple[Tensor, Tensor] = self._digits.pairs(*data, count, draw)
            return pairs
        if self.name == "worlds":
            return worlds(*data, count, draw)
        return shifted(*data, count, draw)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self._of(self.train, BATCH, self.draw)

    def accuracy(self, net: nn.Module) -> float:
        net.eval()
        accuracy: float = self._digits.evaluate(net, *self.test)[1]
        net.train()
        return accuracy


def shifted(images: Tensor, labels: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[count, 1, 12, 12]``: noise, and one digit at a random place."""
    which = torch.randint(len(images), (count,), generator=draw)
    rows, columns = torch.randint(CANVAS - 7, (2, count), generator=draw)
    canvas = 0.5 * torch.randn(count, CANVAS, CANVAS, generator=draw)
    within = torch.arange(8)
    row = rows[:, None, None] + within[None, :, None]
    column = columns[:, None, None] + within[None, None, :]
    canvas[torch.arange(count)[:, None, None], row, column] += images[which].view(count, 8, 8)
    return canvas[:, None], labels[which]


def worlds(images: Tensor, labels: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[count, 128]``: a digit on the left (classes 0 to 9) or on the right (10 to 19), under noise; what is
    on the other side is noise alone."""
    which = torch.randint(len(images), (count,), generator=draw)
    side = torch.randint(2, (count,), generator=draw)
    both = WORLD_NOISE * torch.randn(count, 2, 64, generator=draw)
    both[torch.arange(count), side] += images[which].view(count, 64)
    return both.flatten(1), labels[which] + 10 * side


def mlp(width: int = 256, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )  # fmt: skip


def two_worlds(width: int = 64) -> nn.Sequential:
    return mlp(width, 20)


def cnn(width: int = 32) -> nn.Sequential:
    """5 x 5 kernels: structures are put on the second convolution."""
    return nn.Sequential(
        nn.Conv2d(1, width // 2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width // 2, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(9 * width, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {"pairs": mlp, "shifted": cnn, "worlds": two_worlds}
HIDDEN: dict[str, list[str]] = {"pairs": ["0", "2"], "shifted": ["3"]}
"""The layers that get structures."""


def numbers(net: nn.Module) -> int:
    """That are trained and exchanged."""
    return sum(parameter.numel() for parameter in net.parameters())


def narrow_width(task: str, budget: int) -> int:
    """Of the plain network whose parameters come nearest to a budget."""
    widths = range(2, 257, 2)
    return min(widths, key=lambda width: abs(numbers(NETWORKS[task](width)) - budget))


def trained(
    task: Task,
    net: nn.Module,
    steps: int,
    rate: float = RATE,
    driver: Callable[[torch.optim.Optimizer], Any] | None = None,
    sgd: bool = False,
    penalty: Callable[[], Tensor] | None = None,
) -> Any:
    """Adam (or SGD with momentum), with a rate that falls along a cosine. Returns the driver."""
    parameters: Iterable[nn.Parameter] = net.parameters()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, rate, momentum=0.9) if sgd else torch.optim.Adam(parameters, rate)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    made = driver(optimizer) if driver is not None else None
    net.train()
    for _ in range(steps):
        inputs, targets = task.batch()
        optimizer.zero_grad()
        loss = cross_entropy(net(inputs), targets)
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        schedule.step()
    return made
