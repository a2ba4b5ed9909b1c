"""Sparse from the first step to the last: drop the smallest, grow where the gradient is largest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.pruning.magnitude import random_masks
from distcomp.pruning.masks import keep_largest
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext
from distcomp.randomness import Key


@dataclass(frozen=True)
class Regrowth(Criterion):
    """Every ``every`` steps a part of the active weights is exchanged for pruned ones.

    ::

        f_t  = fraction / 2 (1 + cos(pi t / until))
        drop the f_t n smallest |w| of a layer's n active weights
        grow as many: the largest |dL/dw| among those that do not live now; they begin at zero

    A weight that was just dropped may grow again, and then keeps its value, as in the paper and its code.
    """

    wants_dense = True
    wants_gradients = True

    sparsity: float
    every: int
    until: int
    fraction: float = 0.3

    def begin(self, weights: NamedTensors, key: Key) -> NamedTensors:
        return random_masks(weights, self.sparsity, key)

    def due(self, step: int, name: str) -> bool:
        return 0 < step < self.until and step % self.every == 0

    def decide(self, view: PruningContext) -> NamedTensors:
        share = self.fraction / 2 * (1 + math.cos(math.pi * view.step / self.until))
        return {
            name: _exchanged(view.weights[name], view.masks[name], view.gradients[name], share)
            for name in view.due
            if view.gradients[name].any()  # none where a GradScaler skipped the step
        }


def _exchanged(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> Tensor:
    active = int(mask.sum())
    count = min(int(share * active), mask.numel() - active)
    # What was dropped just now competes with the rest, by its gradient.
    kept = keep_largest(weight.abs().float().masked_fill(~mask, -torch.inf), active - count)
    return kept | keep_largest(gradient.abs().masked_fill(kept, -torch.inf), count)


def rigl(
    model: nn.Module,
    optimizer: Optimizer,
    sparsity: float = 0.9,
    *,
    every: int = 100,
    until: int = 750,
    fraction: float = 0.3,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Train a network that is sparse from the start, and move its connections to where the gradient asks.

    ``sparsity`` of every layer stays what it is; ``every`` so many steps, until ``until``, a ``fraction``
    that falls along a cosine is exchanged. On the wire, gradients of pruned weights are sent in those
    iterations alone.

    Where no normalization follows, scale the weights up by ``1/sqrt(1 - sparsity)`` first: as few of them
    then carry the signal as all of them did.

    Source: Evci et al., Rigging the lottery, ICML 2020. We differ: the same share of pruned weights in every
    layer, also in the first; no noise on the magnitudes that decide what is dropped; the optimizer steps in
    every iteration, where the authors' code skips its step when connections change.
    """
    if not 0 <= sparsity < 1 or not 0 <= fraction <= 1 or every < 1:
        raise DistcompError(
            "rigl takes a sparsity in [0, 1), a fraction in [0, 1] and every 1 step or more, not "
            f"{sparsity}, {fraction} and {every}"
        )
    return Pruner(model, optimizer, Regrowth(sparsity, every, until, fraction), names, seed)
