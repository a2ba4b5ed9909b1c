"""Correlation-based sparsifying: of a layer's connections those stay whose ends vary together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.pruning.masks import evaluating, keep_largest, unwrapped, weights_of
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext


def correlations(layer: nn.Linear | nn.Conv2d, inputs: Tensor, outputs: Tensor) -> Tensor:
    """How strongly both ends of each connection vary together, in the shape of the layer's weight.

    ::

        r[k, i] = mean over positions l of |corr(a[:, i, l], b[:, k, l])|      over the examples

    ``a``: the inputs that a weight meets (shifted by its place in the kernel), ``b``: the layer's outputs,
    before what follows. 0 where one of them is constant.
    """
    if isinstance(layer, nn.Conv2d):
        a = functional.unfold(inputs, layer.weight.shape[2:], layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        b = outputs.flatten(2)
    else:
        a, b = (maps.reshape(len(maps), -1, maps.shape[-1]).transpose(1, 2) for maps in (inputs, outputs))
    r = torch.einsum("nkl,nil->lki", _standardised(b), _standardised(a)) / len(a)
    return r.abs().mean(0).view(layer.weight.shape)


def _standardised(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    deviation = centered.square().mean(0).sqrt()
    varies = deviation > 1e-6 * x.abs().amax(0)
    return torch.where(varies, centered / deviation, 0.0)


@dataclass(frozen=True)
class Correlation(Criterion):
    """One layer after the other, the last one first; training goes on in between.

    ::

        alive: the ``strong`` n largest r, and (1 - strong) n of the others, drawn at random
        n = (1 - share) numel
    """

    share: float
    order: tuple[str, ...]
    start: int
    every: int
    strong: float
    model: nn.Module = field(repr=False, compare=False)
    inputs: Tensor = field(repr=False, compare=False)

    def due(self, step: int, name: str) -> bool:
        return step == self.start + self.every * self.order.index(name)

    def decide(self, view: PruningContext) -> NamedTensors:
        return {name: self._of(name, view) for name in view.due}

    def _of(self, name: str, view: PruningContext) -> Tensor:
        scores = self._scores(name)
        kept = round((1 - self.share) * scores.numel())
        strong = keep_largest(scores, round(self.strong * kept))
        draw = torch.rand(
            scores.shape, generator=view.key.fold("weak", name).generator(), dtype=torch.float32
        ).to(scores.device)
        return strong | keep_largest(draw.masked_fill(strong, -torch.inf), kept - int(strong.sum()))

    def _scores(self, name: str) -> Tensor:
        seen: list[Tensor] = []

        def look(layer: Any, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            seen.append(correlations(layer, inputs[0].float(), outputs.float()))

        hook = self.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(look)
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(self.inputs)
        finally:
            hook.remove()
        return torch.stack(seen).mean(0)


def correlation(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    share: float = 0.9,
    *,
    inputs: Tensor,
    begin: int = 0,
    every: int = 100,
    strong: float = 0.75,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Prune connections between units that vary least together, layer by layer from the last one.

    After iteration ``begin`` the last layer, ``every`` iterations later the one before it, and so on. Of what
    stays in a layer, ``strong`` are the most correlated connections and the others are drawn from the rest.
    ``inputs``: some hundred examples, the same on every rank; models must be the same as well (no gossip).
    ``names``: of linear layers and 2-D convolutions, first to last; all of them where None.

    Source: Sun et al., Sparsifying neural network connections for face recognition, CVPR 2016. We differ:
    correlations are with a layer's outputs before the non-linearity; weak ones are drawn uniformly.
    """
    if not 0 <= share < 1 or not 0 <= strong <= 1 or every < 1:
        raise DistcompError(
            "correlation takes a share in [0, 1), strong in [0, 1] and every 1 step or more, not "
            f"{share}, {strong} and {every}"
        )
    module = unwrapped(model)
    chosen = weights_of(module) if names is None else list(names)
    for name in chosen:
        layer = module.get_submodule(name.rpartition(".")[0])
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple)
        if not (plain or isinstance(layer, nn.Linear)) or not name.endswith("weight"):
            raise DistcompError(
                f"{name} is not the weight of a linear layer or an ungrouped 2-D convolution padded by a "
                "number; leave it out of names"
            )
    criterion = Correlation(share, tuple(chosen[::-1]), begin, every, strong, module, inputs)
    return Pruner(model, optimizer, criterion, chosen, seed)
