"""What all drivers are: they listen to the model's training clock, and act on gradients after the
exchange."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import chain, parameters
from distcomp.pruning.masks import unwrapped, weights_of
from distcomp.training import Listener, clock_of


class Driver(Listener):
    """Adds to gradients what is a function of the weights alone, once an iteration, when they have been
    exchanged.

    Weights are alike on all ranks, so this is, too, and nothing is sent for it. A subclass writes
    :meth:`add`. A GradScaler has unscaled the gradients by then. Usable as a context manager; :meth:`detach`
    ends it.
    """

    source = "parameters"

    def __init__(self, model: nn.Module, names: Iterable[str] | None) -> None:
        self.model = unwrapped(model)
        self.names = plain_weights(self.model, names)
        self.iteration = 0
        """How many iterations have been driven."""
        self._due = False
        self._clock: Any = clock_of(model)
        self._clock.listen(self)

    def add(self) -> None:
        """Add to the gradients of :meth:`weights`."""

    def stepped(self) -> None:
        """An optimizer step of an iteration is over."""

    def weights(self) -> dict[str, nn.Parameter]:
        """What is driven, by name."""
        return {name: parameters(self.model, name)[0] for name in self.names}

    def backward_ended(self) -> None:
        self._due = True

    @torch.no_grad()
    def gradients_used(self, optimizer: Optimizer) -> None:
        """Once for each iteration, however many optimizers step."""
        if self._due:
            self.add()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if self._due:
            self._due = False
            self.iteration += 1
            self.stepped()

    def detach(self) -> None:
        """Listen no longer."""
        if self._clock is not None:
            self._clock.leave(self)
            self._clock = None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def plain_weights(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """The parameters that are named, or the weights of all linear layers and convolutions; each a plain one.

    Raises DistcompError for a name that is none, and where something stands in the weight's place already.
    """
    chosen = weights_of(model) if names is None else list(names)
    if not chosen:
        raise DistcompError("the model has no linear layer or convolution to drive; name its parameters")
    for name in chosen:
        links = chain(model, name)
        if links:
            raise DistcompError(
                f"{name} is described by {type(links[0]).__name__} already, and a driver works on "
                f"plain weights; "
                f"leave it out of names, or remove that first"
            )
    return chosen


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """``parameter.grad += gradient``, where it has one; where it has none, no step is taken with it."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
