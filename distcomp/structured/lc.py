"""Learning-compression: train towards any compression, alternating between loss and nearest description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import Order, Parametrization, install
from distcomp.parametrize.links import applied, as_tuple
from distcomp.pruning.masks import unwrapped
from distcomp.structured.driver import Driver, add_gradient, plain_weights

CStep = Parametrization | Callable[[Tensor], Parametrization]
"""A parametrization, which is fitted anew (``refit``) to every weight, or what makes one for a weight."""


class LC(Driver):
    """See :func:`lc`."""

    def __init__(
        self,
        model: nn.Module,
        compressions: Mapping[str, Sequence[CStep]],
        *,
        mu: float,
        factor: float,
        every: int,
        multipliers: bool,
    ) -> None:
        super().__init__(model, compressions)
        if mu <= 0 or factor < 1 or every < 1:
            raise DistcompError(f"LC needs mu > 0, factor >= 1 and every >= 1, not {mu}, {factor}, {every}")
        self.compressions = {name: list(chosen) for name, chosen in compressions.items()}
        self.mu, self.factor, self.every, self.multipliers = mu, factor, every, multipliers
        self.lambdas = {name: torch.zeros_like(weight) for name, weight in self.weights().items()}
        self.targets: dict[str, Tensor] = {}
        self._compress()

    def add(self) -> None:
        """L step: ``mu (w - Delta(theta)) - lambda``, the gradient of the augmented Lagrangian's penalty."""
        for name, weight in self.weights().items():
            add_gradient(weight, self.mu * (weight - self.targets[name]) - self.lambdas[name])

    def stepped(self) -> None:
        """C step, then the multipliers, then a larger mu, every ``every`` iterations."""
        if self.iteration % self.every:
            return
        self._compress()
        if self.multipliers:
            for name, weight in self.weights().items():
                self.lambdas[name] -= self.mu * (weight - self.targets[name])
        self.mu *= self.factor

    @torch.no_grad()
    def _compress(self) -> None:
        for name, weight in self.weights().items():
            wanted = weight - self.lambdas[name] / self.mu
            links, theta = nearest_description(self.compressions[name], wanted)
            self.targets[name] = applied(links, theta)[0]

    @property
    @torch.no_grad()
    def gap(self) -> float:
        """``max |w - Delta(theta)|`` over all weights: the constraint holds when it is zero."""
        return max(
            float((weight - self.targets[name]).abs().max()) for name, weight in self.weights().items()
        )

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Project once more, without multipliers, and put the compressions in the weights' places.

        The model then stores, and trains, theta: make the optimizer (and DistributedDataParallel) anew if
        training goes on. Returns the model.
        """
        self.detach()
        for name, weight in self.weights().items():
            links, theta = nearest_description(self.compressions[name], weight)
            # A quantizer or mask keeps what it is given; a structure or code describes what it decodes to.
            latent = links[0].order > Order.STRUCTURE
            weight.copy_(theta[0] if latent else applied(links[:1], theta)[0])
            for link in links:
                install(self.model, name, link)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights: tensors and numbers."""
        return {
            "iteration": self.iteration,
            "mu": self.mu,
            "lambdas": {name: value.clone() for name, value in self.lambdas.items()},
            "targets": {name: value.clone() for name, value in self.targets.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises DistcompError where it is of other weights."""
        if set(state["targets"]) != set(self.names):
            raise DistcompError(
                f"the saved LC drives {sorted(state['targets'])}, this one {sorted(self.names)}; name "
                f"the same weights"
            )
        self.iteration, self.mu = int(state["iteration"]), float(state["mu"])
        for mine, saved in ((self.lambdas, state["lambdas"]), (self.targets, state["targets"])):
            for name, value in saved.items():
                mine[name] = value.clone()


@torch.no_grad()
def nearest_description(
    compressions: Sequence[CStep], weight: Tensor
) -> tuple[list[Parametrization], tuple[Tensor, ...]]:
    """``Pi(weight)``: the links, innermost first, and theta, which the innermost decodes.

    Several stand on one another in the order of a chain. The outermost is fitted first, and what lies below
    it to what it must be given: under a mask, to a weight without what is pruned.
    """
    made = [_fitted(compression, weight) for compression in compressions]
    outermost_first = sorted(range(len(made)), key=lambda position: -made[position].order)
    links: list[Parametrization] = []
    target: tuple[Tensor, ...] = (weight,)
    for position in outermost_first:
        whole = target[0] if len(target) == 1 else target
        link = made[position] if whole is weight else _fitted(compressions[position], target[0])
        target = as_tuple(link.right_inverse(whole))
        if link.order == Order.PRUNE:
            target = applied([link], target)
        links.insert(0, link)
    return links, target


def _fitted(compression: CStep, weight: Tensor) -> Parametrization:
    if isinstance(compression, Parametrization):
        return compression.refit(weight)
    return compression(weight)


def lc(
    model: nn.Module,
    optimizer: Optimizer | None,
    compression: CStep | Sequence[CStep] | Mapping[str, CStep | Sequence[CStep]],
    *,
    mu: float = 1e-2,
    factor: float = 1.2,
    every: int = 100,
    multipliers: bool = True,
    names: Iterable[str] | None = None,
) -> LC:
    """Train a model so that its weights become ones that a compression describes exactly.

    ::

        min_w,theta  L(w)   subject to  w = Delta(theta)
        L step       some iterations on  L(w) + mu/2 |w - Delta(theta) - lambda/mu|^2
        C step       theta = Pi(w - lambda/mu);    lambda -= mu (w - Delta(theta));    mu *= factor

    ``compression``: what makes a parametrization of a weight, such as ``codebook(4)``, ``pruned(0.1)``, or
    ``lambda w: SVD(w.shape, 8)``; a quantizer; or a list, which stand on one another as in a chain; or such
    by parameter name. A C step comes every ``every`` iterations: long enough for weights to follow ``mu``, or
    the gap stays open (``.gap`` tells). ``multipliers=False`` is the quadratic penalty. Then ``.finish()``.

    The C step is the same function of the same weights on every rank: nothing is sent for it. ``optimizer``
    may be None: the driver hears every optimizer of the model's parameters.

    Source: Carreira-Perpinan and Idelbayev, "Learning-compression" algorithms for neural net pruning, CVPR
    2018, and Carreira-Perpinan, Model compression as constrained optimization, 2017.

    Raises DistcompError for parameters that are described by something already, mu <= 0, factor < 1, every <
    1.
    """
    if isinstance(compression, Mapping):
        return LC(model, {name: _listed(one) for name, one in compression.items()}, mu=mu, factor=factor,
                  every=every, multipliers=multipliers)  # fmt: skip
    chosen = plain_weights(unwrapped(model), names)
    return LC(model, dict.fromkeys(chosen, _listed(compression)), mu=mu, factor=factor, every=every,
              multipliers=multipliers)  # fmt: skip


def _listed(compression: CStep | Sequence[CStep]) -> list[CStep]:
    return list(compression) if isinstance(compression, Sequence) else [compression]
