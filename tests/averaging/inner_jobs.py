"""What the ranks do with an inner optimizer of a kind: Adam, SGD with momentum, Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distcomp
from tests.averaging.model_jobs import flat, train

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "muon": lambda weights: torch.optim.Muon(weights, lr=0.02),
}


def network() -> nn.Sequential:
    """Matrices alone: Muon takes nothing else."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, bias=False), nn.Tanh(), nn.Linear(24, 5, bias=False))


def weights_of_each(rank: int, size: int, specs: list[Any], inner: str, steps: int) -> list[Tensor]:
    """A rank's weights after the same training by each method."""
    found = []
    for spec in specs:
        model = network()
        optimizer = INNER[inner](model.parameters())
        with distcomp.attach(model, optimizer, spec) as handle:
            train(model, optimizer, rank, steps)
            handle.state_dict()
            found.append(flat(model).clone())
    return found


def moments_after(rank: int, size: int, spec: Any, steps: int) -> dict[str, Tensor]:
    """Adam's moments of the first matrix after so many steps and their exchanges."""
    model = network()
    optimizer = INNER["adam"](model.parameters())
    with distcomp.attach(model, optimizer, spec) as handle:
        train(model, optimizer, rank, steps)
        handle.state_dict()
        state = optimizer.state[model[0].weight]
        return {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}


def refused_without_optimizer(rank: int, size: int, spec: Any) -> str:
    """What is told where no optimizer is handed over."""
    try:
        distcomp.attach(network(), None, spec).detach()
    except distcomp.DistcompError as error:
        return str(error)
    return "accepted"
