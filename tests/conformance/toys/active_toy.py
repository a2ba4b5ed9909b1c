"""A source of active parameters in one file, as a newcomer would add it: coins alike on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distcomp.active import ActiveParameters, ActiveSet, Context
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.randomness import Key


@dataclass(frozen=True)
class SharedCoins(ActiveParameters):
    """Each of ``layers`` takes part in a step with probability ``survival``, all other parameters always."""

    layers: tuple[str, ...]
    survival: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.survival <= 1:
            raise DistcompError(f"a probability lies in [0, 1], not {self.survival}; the usual is 0.5")

    def awake(self, layer: str, shared: Key) -> bool:
        """Whether a layer takes part in the step whose shared key this is. The model asks, too."""
        return bool(torch.rand((), generator=shared.fold("coin", layer).generator()) < self.survival)

    def active(self, layout: Layout, context: Context) -> ActiveSet:
        asleep = tuple(f"{layer}." for layer in self.layers if not self.awake(layer, context.shared))
        return ActiveSet.of(layout, {name: not name.startswith(asleep) for name in layout.names})
