"""Which backwards are iterations of a model whose weights are averaged.

An iteration's exchange is made at the next forward, when its step has been taken. Two kinds of optimizers ask
for forwards in between: those that evaluate a closure several times in one step (LBFGS), and those that move
the weights for a second gradient and take that back (SAM).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distcomp.attaching.slices import local
from distcomp.errors import DistcompError

TENSORS, ELEMENTS = 16, 64
"""So many parameters, and so many elements of each, tell whether the weights have moved."""


class Iterations:
    """Of ``parameters``, by name. What is done within one step of an optimizer is one iteration."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sampled = list(parameters.values())[:: max(1, len(parameters) // TENSORS)]
        self._at_backward: list[Tensor] = []
        self._inside = False  # of an optimizer's step
        self._stepped = False  # since the last backward
        self._ever_stepped = False

    def backward_ended(self) -> None:
        """An iteration is over but for its step."""
        self._stepped = False
        self._at_backward = self._sample() if self._ever_stepped else []

    def before_step(self) -> None:
        self._inside = True

    def after_step(self) -> None:
        self._inside = False
        self._stepped = self._ever_stepped = True

    def goes_on(self) -> bool:
        """Whether what happens now belongs to the iteration of the last backward: a closure is evaluated once
        more.

        Raises DistcompError where weights were moved since that backward, by no optimizer's step: what would
        be exchanged now is taken back later. A step that a GradScaler skips moves nothing.
        """
        if self._stepped:
            return False
        if self._inside:
            return True
        if self._at_backward and not all(map(torch.equal, self._at_backward, self._sample())):
            raise DistcompError(
                "weights were moved after a backward by no step of an optimizer, as sharpness-aware "
                "minimization (SAM) does, which takes it back later: an average made now would be lost; make "
                "the first forward and backward of a step in `with handle.no_sync():`"
            )
        return False

    def _sample(self) -> list[Tensor]:
        flat = [local(parameter).detach().reshape(-1) for parameter in self._sampled]
        return [one[:: max(1, len(one) // ELEMENTS)].clone() for one in flat]
