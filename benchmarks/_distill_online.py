"""Networks that teach each other on shifted digits: cells of :mod:`benchmarks.distill_table`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._distill_tasks import Rows, accuracy, cnn, shifted, train
from distcomp import distill

Cell = Callable[[int], float]
"""The test accuracy of a seed."""


def steps_of(rows: Rows, epochs: int, seed: int) -> Any:
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        batches = torch.randperm(len(rows[0]), generator=order).split(64)
        yield from (batch for batch in batches if len(batch) > 1)  # a norm needs two rows


def stepped(
    module: nn.Module, rows: Rows, epochs: int, seed: int, loss: Callable[[Tensor, Tensor, int], Tensor]
) -> None:
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step, batch in enumerate(steps_of(rows, epochs, seed)):
        optimizer.zero_grad()
        loss(rows[0][batch], rows[1][batch], step).backward()
        optimizer.step()


def native(weight: str, whole: bool = False) -> Cell:
    """ONE with three branches; the first is kept, or all with the gate."""

    def cell(seed: int) -> float:
        data, network = shifted(seed), cnn(10, seed)
        one = distill.OnTheFlyEnsemble(network[:3], network[3:], 10, 3)
        stepped(
            one, data.train, 30, seed,
            lambda x, y, step: distill.ensemble_loss(one(x), y, 3.0, weight, step),
        )  # fmt: skip
        one.eval()
        if not whole:
            return accuracy(one.export(), data.test)
        with torch.no_grad():
            return (one(data.test[0]).ensemble.argmax(1) == data.test[1]).float().mean().item()

    return cell


def mutual(weight: float, together: bool = False) -> Cell:
    """Three networks; the first is kept, or their mean."""

    def cell(seed: int) -> float:
        data = shifted(seed)
        learners = distill.MutualLearners([cnn(10, seed + 10 * k) for k in range(3)])
        stepped(
            learners, data.train, 30, seed,
            lambda x, y, step: distill.mutual_loss(learners(x), y, weight),
        )  # fmt: skip
        if not together:
            return accuracy(learners.networks[0], data.test)
        with torch.no_grad():
            said = torch.stack(learners(data.test[0])).mean(0)
        return (said.argmax(1) == data.test[1]).float().mean().item()

    return cell


def single(epochs: int, channels: int = 10) -> Cell:
    def cell(seed: int) -> float:
        network = cnn(channels, seed)
        train(network, shifted(seed).train, epochs, seed=seed)
        return accuracy(network, shifted(seed).test)

    return cell


ONLINE = {
    "one network": single(30),
    "one network, twice as long": single(60),
    "branches on a stem, no distilling": native("0"),
    "ONE, one branch kept": native("0 ~> 1 @ 140"),
    "ONE, the whole ensemble": native("0 ~> 1 @ 140", whole=True),
    "mutual learning, one of three kept": mutual(1.0),
    "three networks apart, their mean": mutual(0.0, together=True),
}
