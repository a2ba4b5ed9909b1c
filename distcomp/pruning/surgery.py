"""Dynamic network surgery: prune what became unimportant, splice what became important again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.pruning.magnitude import PerLayer, frozen, of_layer
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext
from distcomp.randomness import Key


@dataclass(frozen=True)
class Draws:
    """When surgery happens: at random, each layer on its own, ever more rarely.

    ::

        P(layer operated on after iteration t) = (1 + gamma t)^-power     while t < until, else 0

    Drawn from a stream that all ranks share: known beforehand, and the same everywhere.
    """

    seed: int
    gamma: float = 1e-3
    power: float = 1.0
    until: int = 10_000

    def __call__(self, step: int, name: str) -> bool:
        if step >= self.until:
            return False
        draw = torch.rand(
            (), generator=Key.of(self.seed).fold("surgery", name, step).generator(), dtype=torch.float32
        )
        return draw.item() < float((1 + self.gamma * step) ** -self.power)


def hysteresis(magnitudes: Tensor, mask: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Pruned at ``low`` and below, active above ``high``, as before in between."""
    return (magnitudes > high) | (mask & (magnitudes > low))


@dataclass(frozen=True)
class Surgery(Criterion):
    """Masks follow the weights, with hysteresis, while all weights are trained.

    ::

        base = max(mean|w| + rate std|w|, 0)       of a layer, once, at the first operation
        mask = 0 where |w| <= 0.9 base;  1 where |w| > 1.1 base;  as it was in between

    ``w`` takes the gradient of the masked weights, also where it is pruned.
    """

    wants_dense = True
    keeps_dense_grad = True
    restarts = False

    draws: Draws
    rate: float | tuple[tuple[str, float], ...]

    def due(self, step: int, name: str) -> bool:
        return self.draws(step, name)

    def decide(self, view: PruningContext) -> NamedTensors:
        masks: NamedTensors = {}
        for name in view.due:
            magnitudes = view.weights[name].abs().float()
            if name not in view.memory:
                spread = magnitudes.std(unbiased=False)
                base = magnitudes.mean() + of_layer(self.rate, name) * spread
                view.memory[name] = base.clamp(min=0)
            bound = self.bound(view.memory[name], magnitudes)
            masks[name] = hysteresis(magnitudes, view.masks[name], 0.9 * bound, 1.1 * bound)
        return masks

    def bound(self, base: Tensor, magnitudes: Tensor) -> Tensor:
        """What magnitudes are compared with: one number, or one for each."""
        return base


def dns(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    rate: PerLayer = 1.0,
    *,
    gamma: float = 1e-3,
    power: float = 1.0,
    until: int = 10_000,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Prune and splice while training: a connection that proves important again returns.

    ``rate`` (the paper's c_rate) sets a layer's threshold, in standard deviations above the mean magnitude;
    one number, or one per layer. A layer is operated on with a probability that falls with ``gamma`` and
    ``power``, and no more from step ``until`` on.

    Gradients of pruned weights are kept on each rank, and are sent in the iteration before their layer is
    operated on.

    Source: Guo et al., Dynamic network surgery, NeurIPS 2016, and its public code. We differ: thresholds are
    of a layer's weights alone (there weights and bias are pooled).
    """
    check_rarity(gamma, power)
    if isinstance(rate, Mapping) and names is None:
        names = list(rate)
    return Pruner(model, optimizer, Surgery(Draws(seed, gamma, power, until), frozen(rate)), names, seed)


def check_rarity(gamma: float, power: float) -> None:
    if gamma < 0 or power < 0:
        raise DistcompError(f"gamma and power are 0 or more, not {gamma} and {power}: probabilities fall")
