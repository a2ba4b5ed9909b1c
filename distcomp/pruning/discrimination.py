"""Discrimination-aware channel pruning: a layer keeps the channels that the loss asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.parametrize import chain, evaluating, parameters
from distcomp.pruning.masks import Mask, keep_largest, unwrapped
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Discrimination(Criterion):
    """Select a layer's input channels one after the other, beginning with none.

    ::

        L = loss(model(x), y) + balance mean (z - z_0)^2      z: the layer's output, z_0: with all channels
        next: the channel c of the largest sum_o |dL/dW[o, c]|_F among those not selected
        until (1 - share) of them are

    Layers are pruned one after the other, the first one first, ``every`` iterations apart.
    """

    share: float
    order: tuple[str, ...]
    start: int
    every: int
    balance: float
    at_once: int
    model: nn.Module = field(repr=False, compare=False)
    data: tuple[Tensor, Tensor] = field(repr=False, compare=False)
    loss: Loss = field(repr=False, compare=False)

    def due(self, step: int, name: str) -> bool:
        return step == self.start + self.every * self.order.index(name)

    def decide(self, view: PruningContext) -> NamedTensors:
        return {name: self._selected(name) for name in view.due}

    def _selected(self, name: str) -> Tensor:
        path, _, tensor = name.rpartition(".")
        layer = self.model.get_submodule(path)
        (masking,) = [link for link in chain(layer, tensor) if isinstance(link, Mask)]
        (weight,) = parameters(layer, tensor)
        mask, before, dense_grad = masking.mask, masking.mask.clone(), masking.dense_grad
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda *seen: outputs.append(seen[2]))
        masking.dense_grad = True  # channels that are not selected have gradients, too
        try:
            with evaluating(self.model), torch.enable_grad():
                return self._greedy(weight, mask, outputs)
        finally:
            hook.remove()
            mask.copy_(before)
            masking.dense_grad = dense_grad

    def _greedy(self, weight: Tensor, mask: Tensor, outputs: list[Tensor]) -> Tensor:
        inputs, targets = self.data
        self.model.forward(inputs)  # not called: that would be an iteration to the pruner
        whole = outputs[-1].detach()
        count = weight.shape[1]
        wanted = count - int(self.share * count)
        selected = torch.zeros(count, dtype=torch.bool, device=weight.device)
        while (missing := wanted - int(selected.sum())) > 0:
            mask.copy_(_columns(selected, weight))
            objective = self.loss(self.model.forward(inputs), targets)
            objective = objective + self.balance * functional.mse_loss(outputs[-1], whole)
            (gradient,) = torch.autograd.grad(objective, weight)
            scores = gradient.reshape(len(gradient), count, -1).norm(dim=2).sum(0)
            selected |= keep_largest(scores.masked_fill(selected, -torch.inf), min(missing, self.at_once))
        return _columns(selected, weight)


def _columns(selected: Tensor, weight: Tensor) -> Tensor:
    return selected.view(-1, *[1] * (weight.dim() - 2)).expand(weight.shape).clone()


def dcp(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    share: float = 0.5,
    *,
    data: tuple[Tensor, Tensor],
    loss: Loss = functional.cross_entropy,
    begin: int = 0,
    every: int = 100,
    balance: float = 1.0,
    at_once: int = 1,
    names: Iterable[str] | None = None,
) -> Pruner:
    """Drop the input channels of convolutions that neither the loss nor the layer's own output misses.

    After iteration ``begin`` in the first layer, ``every`` iterations later in the next, and so on; training
    goes on in between. ``data``: inputs and targets of some hundred examples, the same on every rank, as the
    models must be (no gossip). Each selection takes a gradient over them and adds ``at_once`` channels.
    ``names``: of layers, first to last; where None all ungrouped 2-D convolutions but the first. Shrink what
    is left with :func:`distcomp.pruning.shrink`.

    Source: Zhuang et al., Discrimination-aware channel pruning, NeurIPS 2018. We differ: the loss is the
    network's own (give one that adds auxiliary losses if the model has such heads); the output to keep is the
    one just before, not that of the network first trained; weights are not trained between selections.
    """
    if not 0 <= share < 1 or min(every, at_once) < 1 or balance < 0:
        raise DistcompError(
            "dcp takes a share in [0, 1), every and at_once 1 or more and a balance of 0 or more, not "
            f"{share}, {every}, {at_once} and {balance}"
        )
    module = unwrapped(model)
    convolutions = [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups == 1
    ]
    chosen = convolutions[1:] if names is None else list(names)
    if not chosen:
        raise DistcompError(
            "there is no second convolution whose channels could go; name the layers to prune"
        )
    criterion = Discrimination(share, tuple(chosen), begin, every, balance, at_once, module, data, loss)
    return Pruner(model, optimizer, criterion, chosen)
