"""What a parametrization is: a description of a weight, and the nearest description of a given one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

Tensors = tuple[Tensor, ...]
"""What a link of a chain is given or gives: one tensor, or the several that the next link decodes."""


class Order(IntEnum):
    """Where a parametrization stands in a chain, innermost first, whenever it was installed.

    Codes stand for stored numbers, a structure makes the weight of them, a quantizer rounds it, and what is
    pruned is zero in the end. So a chain does not depend on the order in which it was built.
    """

    CODE = 0
    STRUCTURE = 1
    QUANTIZE = 2
    PRUNE = 3


@dataclass(frozen=True)
class Storage:
    """What it takes to store a weight: so many numbers of so many bits, and ``extra`` bits besides."""

    numbers: int
    width: float
    extra: float = 0.0

    @property
    def bits(self) -> float:
        """All of it."""
        return self.numbers * self.width + self.extra


class Parametrization(nn.Module):
    """Something that stands in a weight's place: ``weight = decode(theta)``.

    A subclass writes :meth:`decode` and :meth:`right_inverse`, and says where it belongs (``order``) and who
    put it there (``owner``). What it trains itself are parameters, what it keeps are buffers: both are in the
    state dict. :func:`distcomp.parametrize.install` puts it on a tensor.

    ``decode`` takes theta: one tensor, or several, which its parameters name. Shapes of theta are those that
    ``right_inverse`` gives; the weight has the shape and, unless ``changes_dtype``, the type that it had.
    """

    owner: str = "user"
    """Who put it there: ``precision``, ``pruning``, ``sharing``, ... :func:`remove` takes this name."""
    order: Order = Order.STRUCTURE
    selects: bool = False
    """Whether every number of the weight is a number of theta, or zero: laws about weights (a grid, a range)
    may then be applied to theta."""
    changes_dtype: bool = False
    """Whether the weight may have another type than theta; it is then not tried when it is installed."""

    @abstractmethod
    def decode(self, *theta: Any) -> Any:
        """The weight that theta describes (differentiable). In ``eval()`` a function of theta and buffers."""

    @abstractmethod
    def right_inverse(self, weight: Any) -> Tensor | Tensors:
        """Theta of the weight nearest to ``weight``; of ``w = decode(theta)`` so that
        ``decode(right_inverse(w)) ~ w``.

        Changes nothing of its own. A code is given all tensors of what it stands for, as a tuple, if these
        are several.
        """

    def refit(self, weight: Tensor | Tensors) -> Parametrization:
        """What stands for ``weight`` in the place of this one, where its shape may be another.

        The same object unless it holds something of the weight's shape, such as codes.
        """
        return self

    def restore(self, *theta: Tensor) -> Tensor | Tensors:
        """The weight without what this one does to it: theta under a quantizer or mask, else ``decode``."""
        if self.order <= Order.STRUCTURE:
            restored: Tensor | Tensors = self.decode(*theta)
            return restored
        return theta[0]

    def storage(self, below: Storage, weight: Tensors) -> Storage:
        """What the weight takes to store, given what theta does. ``weight`` is what it decodes to in eval().

        As much as theta, unless a subclass says otherwise.
        """
        return below

    def forward(self, *theta: Any) -> Any:
        """:meth:`decode`, of one tensor or several: torch calls it whenever the weight is read."""
        if len(theta) == 1 and isinstance(theta[0], tuple):
            theta = theta[0]
        return self.decode(*theta)

    @property
    def label(self) -> str:
        """How messages call it: ``Codebook (sharing)``."""
        return f"{type(self).__name__} ({self.owner})"
