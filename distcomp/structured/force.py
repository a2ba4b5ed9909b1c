"""Coordinating filters: an attractive force between filters, so that a low rank suffices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.structured.driver import Driver, add_gradient

LAWS = ("l2", "l1")


def forces(weight: Tensor, law: str = "l2") -> Tensor:
    """The force on each filter ``[out, ...]``, tangential to it and as long as it is.

    ::

        u_i = w_i / |w_i|;    f_i = sum_j (u_j - u_i)   ("l2"),   sum_j (u_j - u_i) / |u_j - u_i|   ("l1")
        force_i = |w_i| (f_i - (f_i . u_i) u_i)
    """
    flat = weight.flatten(1)
    norms = flat.norm(dim=1, keepdim=True)
    units = flat / norms.clamp(min=1e-12)
    if law == "l2":
        pull = units.sum(0, keepdim=True) - len(units) * units
    else:
        distances = torch.cdist(units, units)
        closeness = torch.where(distances > 1e-6, 1 / distances.clamp(min=1e-6), 0.0)
        pull = closeness @ units - closeness.sum(1, keepdim=True) * units
    tangential = pull - (pull * units).sum(1, keepdim=True) * units
    force: Tensor = norms * tangential
    return force.view_as(weight)


class ForceRegularizer(Driver):
    """See :func:`force_regularization`."""

    def __init__(self, model: nn.Module, strength: float, law: str, names: Iterable[str] | None) -> None:
        if law not in LAWS or strength < 0:
            raise DistcompError(
                f"a force has a law of {LAWS} and a strength of 0 or more, not {law!r}, {strength}"
            )
        super().__init__(model, names)
        self.strength, self.law = strength, law

    def add(self) -> None:
        """``gradient_i -= strength / filters * force_i``."""
        for weight in self.weights().values():
            add_gradient(weight, -self.strength / weight.shape[0] * forces(weight, self.law))


def force_regularization(
    model: nn.Module, strength: float = 1e-2, *, law: str = "l2", names: Iterable[str] | None = None
) -> ForceRegularizer:
    """While training, pull each layer's filters towards each other's directions; a low rank then suffices.

    ``gradient_i -= strength / filters * |w_i| f_i`` with the tangential force of :func:`forces`. After
    training, ``low_rank(model, 0.95)`` finds smaller ranks than without. Too strong a force collapses a layer
    to one direction: try strengths around 1e-2, a decade to each side.

    Wire: nothing; the force is a function of weights, and added after the exchange.

    Source: Wen et al., Coordinating filters for faster deep neural networks, ICCV 2017. We differ: the
    strength is divided by the number of filters, so that one number serves layers of all widths.

    Raises DistcompError for another law, a negative strength, weights that are described by something
    already.
    """
    return ForceRegularizer(model, strength, law, names)
