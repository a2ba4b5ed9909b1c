"""What is done with the mean of the workers' progress: the optimizer of the outer loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.kernels import memory
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods.base import State


@dataclass(frozen=True)
class Outer:
    """SGD with momentum on the outer gradient ``g = mean_i (anchor - x_i)``, as ``torch.optim.SGD`` has it::

        m = momentum m + g;    anchor = anchor - lr (g + momentum m  if nesterov else  m)

    ``Outer()`` is plain averaging: ``anchor - g`` is the mean of the models. DiLoCo's is
    ``Outer(0.7, 0.9, nesterov=True)``. Memory: one model if there is momentum. It sends nothing: every rank
    takes the same step from the same ``g``.

    Source: Douillard et al., "DiLoCo", 2023; plain: McMahan et al., FedAvg, AISTATS 2017.

    Raises DistcompError for a learning rate that is not positive or a momentum outside [0, 1).
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1):
            raise DistcompError(
                f"an outer optimizer has lr > 0 and 0 <= momentum < 1, not {self.lr} and {self.momentum}"
            )

    def init(self, layout: Layout) -> State:
        """The state before the first exchange."""
        return (
            {"momentum": FlatBuffer(torch.zeros(layout.numel, dtype=torch.float32), layout)}
            if self.momentum
            else {}
        )

    def step(self, anchor: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
        """The new anchor and the new state."""
        # Without momentum there is nothing to keep: plain averaging has no state but the anchor.
        if not self.momentum:
            return _descended(anchor, gradient, self.lr), state
        old = state["momentum"]
        momentum = old.data * self.momentum + gradient
        direction = gradient + self.momentum * momentum if self.nesterov else momentum
        return _descended(anchor, direction, self.lr), {"momentum": FlatBuffer(momentum, old.layout)}


def _descended(anchor: Tensor, direction: Tensor, lr: float) -> Tensor:
    return torch.sub(anchor, direction, alpha=lr, out=memory.empty(anchor.numel(), anchor.device))
