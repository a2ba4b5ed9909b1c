"""Small problems for many workers in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, MultiLevel
from distcomp.averaging.workers import Workers


class Quadratic:
    """``f_i(x) = (x - x_i*)^T A (x - x_i*) / 2`` with a diagonal A: no noise, one optimum of the mean."""

    def __init__(self, workers: int, numel: int, lowest: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(5)
        self.curvature = torch.linspace(lowest, 1.0, numel)
        self.optima = torch.randn(workers, numel, generator=generator)

    def train(
        self,
        averaging: Averaging | MultiLevel,
        steps: int,
        rate: float = 0.1,
        watch: Callable[[Workers], None] = lambda _: None,
    ) -> Workers:
        """All workers start at zero and descend."""
        count, numel = self.optima.shape
        workers = Workers(averaging, torch.zeros(numel), count)
        for _ in range(steps):
            self.descend(workers, rate)
            workers.step()
            watch(workers)
        return workers

    def descend(self, workers: Workers, rate: float) -> None:
        for model, optimum in zip(workers.models, self.optima, strict=True):
            model -= rate * self.curvature * (model - optimum)

    def error(self, workers: Workers) -> float:
        """Mean squared distance of the average model from the optimum."""
        return float((workers.mean - self.optima.mean(0)).square().mean())


def errors_at(training_task: Quadratic, averaging: Averaging, marks: tuple[int, ...]) -> list[float]:
    """The error after so many steps."""
    found: list[float] = []

    def watch(workers: Workers) -> None:
        if workers.steps in marks:
            found.append(training_task.error(workers))

    training_task.train(averaging, max(marks), watch=watch)
    return found


def consensus(averaging: Averaging | MultiLevel, starts: Tensor, steps: int) -> Workers:
    """No gradients: workers start apart (row i is worker i's model) and only average."""
    workers = Workers(averaging, torch.zeros(starts.shape[1]), len(starts))
    for model, start in zip(workers.models, starts, strict=True):
        model.copy_(start)
    for _ in range(steps):
        workers.step()
    return workers


def stacked(workers: Workers) -> Tensor:
    """Row i is worker i's model."""
    return torch.stack(workers.models)
