"""Which layers take part in a step: values that answer alike on every rank, and again after a resume.

A choice is a function of the iteration and of nothing else. Its coins come from counter-based keys
(:mod:`distcomp.randomness`), so nobody has to send, save or replay a generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from distcomp.errors import DistcompError
from distcomp.randomness import Key
from distcomp.schedule import Varying, at, extremes


class LayerChoice(ABC):
    """Which of :attr:`layers` are awake in an iteration. Subclasses are frozen dataclasses."""

    layers: tuple[str, ...]
    """Names of modules, in the order in which the model calls them."""

    @property
    def shared(self) -> bool:
        """Whether all ranks choose alike: otherwise a layer that is off here may have others' gradient."""
        return True

    @abstractmethod
    def awake(self, step: int) -> frozenset[str]:
        """The layers that take part in iteration ``step`` (from 0): equal on all ranks."""

    def survival(self, layer: str, step: int) -> float:
        """The probability with which a layer is awake, by which evaluation scales what it adds."""
        return 1.0


@dataclass(frozen=True)
class Survival(LayerChoice):
    """Layer l of L survives with probability ``p_l = 1 - l / L (1 - p_L)``, p_L = ``last``, l = 1 .. L.

    One coin per layer and iteration. ``shape="uniform"`` gives every layer ``p_L``. ``last`` may be a
    schedule over iterations. ``salt`` is mixed into the coins; coins that all ranks share have none.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, equation 4 (linear decay) and
    section 3 (uniform). We differ: one coin for all ranks, where the paper's is per mini-batch and process.
    """

    layers: tuple[str, ...]
    last: Varying = 0.5
    seed: int = 0
    shape: str = "linear"
    salt: str = ""

    def __post_init__(self) -> None:
        low, high = extremes(self.last)
        if not 0 <= low <= high <= 1:
            raise DistcompError(f"a survival probability lies in [0, 1], not {self.last}; the usual is 0.5")
        if self.shape not in ("linear", "uniform"):
            raise DistcompError(f"survival falls 'linear' with depth or is 'uniform', not {self.shape!r}")

    @property
    def shared(self) -> bool:
        return not self.salt

    def survival(self, layer: str, step: int) -> float:
        last, depth = at(self.last, step), self.layers.index(layer) + 1
        return last if self.shape == "uniform" else 1 - depth / len(self.layers) * (1 - last)

    def awake(self, step: int) -> frozenset[str]:
        key = Key.of(self.seed, step).fold("depth", self.salt)
        return frozenset(
            layer
            for layer in self.layers
            if torch.rand((), generator=key.fold(layer).generator(), dtype=torch.float64)
            < self.survival(layer, step)
        )


@dataclass(frozen=True)
class Sampled(LayerChoice):
    """``k`` layers of all, drawn anew every ``period`` iterations; the others are computed and not trained.

    Source: Pan et al., "LISA: Layerwise Importance Sampling", NeurIPS 2024, algorithm 1 (uniform over the
    middle layers; embedding and head always train, which here is whatever is not named).
    """

    layers: tuple[str, ...]
    k: int = 2
    period: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_period(self.period)
        if not 0 <= self.k <= len(self.layers):
            raise DistcompError(f"{self.k} of {len(self.layers)} layers cannot be drawn; choose a smaller k")

    def awake(self, step: int) -> frozenset[str]:
        generator = Key.of(self.seed, step // self.period).fold("layers").generator()
        drawn = torch.randperm(len(self.layers), generator=generator)[: self.k]
        return frozenset(self.layers[number] for number in drawn.tolist())


@dataclass(frozen=True)
class Alternating(LayerChoice):
    """Groups of layers take turns, ``period`` iterations each: two halves of a model, LoRA's A and B."""

    groups: tuple[tuple[str, ...], ...]
    period: int = 1

    def __post_init__(self) -> None:
        _check_period(self.period)
        if len(set(self.layers)) != len(self.layers):
            raise DistcompError("a layer is in two of the groups that take turns; name it in one")

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(layer for group in self.groups for layer in group)

    def awake(self, step: int) -> frozenset[str]:
        return frozenset(self.groups[step // self.period % len(self.groups)])


@dataclass(frozen=True)
class FrozenFrom(LayerChoice):
    """Each layer trains up to an iteration of its own and is frozen from then on.

    Source: Brock et al., "FreezeOut", 2017 (the first layers freeze first); the iterations are yours.
    """

    layers: tuple[str, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.steps):
            raise DistcompError(
                f"{len(self.steps)} iterations were given to freeze {len(self.layers)} layers; give one each"
            )

    def awake(self, step: int) -> frozenset[str]:
        return frozenset(
            layer for layer, frozen in zip(self.layers, self.steps, strict=True) if step < frozen
        )


def _check_period(period: int) -> None:
    if period < 1:
        raise DistcompError(f"a period is at least one iteration, not {period}")
