"""NoLoCo: DiLoCo without any all-reduce; pairs pull each other together through the outer momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcomp.averaging.base import Averaging, AveragingContext, agreed
from distcomp.averaging.gossip import weighted
from distcomp.averaging.pairs import Pairs
from distcomp.collectives import Rounds
from distcomp.errors import DistcompError
from distcomp.layout import FlatBuffer, Layout
from distcomp.methods import register
from distcomp.methods.base import AggregateResult, State
from distcomp.schedule import Schedule, varying


@dataclass(frozen=True)
class NoLoCo(Pairs):
    """Step an outer optimizer of one's own with a random pair's mean; a term in it lets slow weights meet.

    ::

        Delta_i = x_i - phi_i                              what was learnt since the last exchange
        delta_i = momentum delta_i + lr mean_j Delta_j - gamma (phi_i - mean_j phi_j)
        phi_i   = phi_i + delta_i;    x_i = phi_i          the means over i and its partner j

    Nobody ever holds the mean of all: slow weights ``phi`` differ between workers, and the last term pulls
    pairs together. The mean of all ``phi`` moves as one worker's would, by the mean of all ``Delta``.

    ``gamma = lr`` needs ``x`` alone: ``lr (mean x - mean phi) - lr (phi_i - mean phi) = lr (mean x -
    phi_i)``; one model is sent, otherwise two, one after the other. ``x``: float32 ``[layout.numel]``.

    Source: Kolehmainen et al., "NoLoCo", 2025; its code (jkolehm/noloco) has ``gamma = lr``. We differ: the
    one model; of an odd number one worker steps alone; no activations are routed between pipelines. Bytes:
    4 d, or 8 d. Memory: two models.

    Raises DistcompError for a learning rate or gamma that is not positive, or a momentum outside [0, 1).
    """

    lr: float = 0.7
    momentum: float = 0.5
    gamma: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.gamma > 0):
            raise DistcompError(
                f"noloco has an outer_lr and a gamma above 0 and a momentum in [0, 1), not {self.lr}, "
                f"{self.gamma} and {self.momentum}; its paper has 0.7, 0.7 and 0.5"
            )

    def init(self, x: Tensor, context: AveragingContext) -> State:
        return {
            "slow": FlatBuffer(x.clone(), context.layout),
            "momentum": FlatBuffer(torch.zeros_like(x), context.layout),
        }

    def aggregate(self, x: Tensor, state: State, context: AveragingContext) -> Rounds[AggregateResult]:
        slow = state["slow"].data
        mean_fast = yield from self._mean(x, context)
        if self.gamma == self.lr:
            step = self.lr * (mean_fast - slow)
        else:
            mean_slow = yield from self._mean(slow, context)
            step = self.lr * (mean_fast - mean_slow) - self.gamma * (slow - mean_slow)
        momentum = self.momentum * state["momentum"].data + step
        slow = slow + momentum
        kept = {
            "slow": FlatBuffer(slow, context.layout),
            "momentum": FlatBuffer(momentum, context.layout),
        }
        return agreed(slow, kept)

    def _mean(self, x: Tensor, context: AveragingContext) -> Rounds[Tensor]:
        """The pair's mean, the same bits on both."""
        row, messages = yield from self.send(self.encode(x, context), context)
        theirs = {j: self.compressor.decode(payload, context.layout) for j, payload in messages.items()}
        return weighted(row, x, theirs)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        numbers = super().conditions(layout, size)
        if size > 1 and self.gamma >= 2 * (1 + self.momentum):
            numbers["warning"] = (
                f"noloco's slow weights drive each other apart from gamma = 2 (1 + outer_momentum) = "
                f"{2 * (1 + self.momentum):.3g} on, and gamma is {self.gamma:.3g}; use a smaller one"
            )
        return numbers


@register(
    paper="Kolehmainen et al., NoLoCo: no-all-reduce low communication training method for large models, "
    "2025",
    wire="4d / period; 8d / period where gamma is not outer_lr",
    summable=False,
    biased=False,
    kind="gossip",
    deviations="gamma = outer_lr, as in its code, sends one model in place of two; of an odd number of "
    "workers one steps alone; activations are not routed between pipelines",
    limitations="workers never hold the same model: take the mean of all at the end",
)
def noloco(
    period: int | Schedule | str = 50,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.5,
    gamma: float = 0.7,
    on_failure: str = "stop",
) -> Averaging:
    """Train alone for ``period`` steps, then step an outer optimizer with the mean of a random pair.

    ``outer_lr`` and ``outer_momentum`` are the outer optimizer's; ``gamma`` pulls the slow weights of a pair
    together. ``on_failure``: when a worker dies, ``stop`` or ``continue`` without it.
    """
    return NoLoCo(
        lr=outer_lr,
        momentum=outer_momentum,
        gamma=gamma,
        period=varying(period),
        on_failure=on_failure,
    )
