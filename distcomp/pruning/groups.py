"""Whole groups of weights go: filters, channels, shapes, layers, inputs and units, exactly to zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.pruning.masks import Pruned, unwrapped, weights_of
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext

KINDS = {"filters": (0,), "channels": (1,), "shapes": None, "depth": ()}
"""The dimensions that tell groups apart; None: all but the first."""


def block_shrink(weight: Tensor, kind: str, threshold: float, weighted: bool) -> Tensor:
    """The proximal operator of ``threshold sum_g c_g |w_g|_2``: exact zeros where a group's norm is small.

    ::

        w_g = max(0, 1 - threshold c_g / |w_g|) w_g          c_g = sqrt(|g|) if ``weighted``, else 1

    Groups of a weight ``[F, C, ...]``: ``filters`` w[f], ``channels`` w[:, c], ``shapes`` w[:, c, m, k],
    ``depth`` all of it. A vector has one group per element, whatever the kind.
    """
    kept = KINDS[kind]
    dims = tuple(range(1, weight.dim())) if kept is None else kept
    if weight.dim() < 2:
        dims = (0,)
    across = tuple(dim for dim in range(weight.dim()) if dim not in dims)
    if not across:
        return weight.sign() * (weight.abs() - threshold).clamp(min=0)
    norms = weight.square().sum(across, keepdim=True).sqrt()
    size = weight.numel() / max(1, norms.numel())
    bound = threshold * (size**0.5 if weighted else 1.0)
    scale = torch.where(norms > bound, 1 - bound / norms.clamp(min=1e-30), 0.0)
    return weight * scale


@dataclass(frozen=True)
class GroupLasso(Criterion):
    """After each optimizer step a proximal step; after iteration ``until`` what is zero stays so.

    Thresholds are the learning rate times ``strengths``, one kind of groups after the other (overlapping
    kinds have no operator in closed form). ``l1``: as much of the absolute values, first.
    """

    wants_optimizer = True

    strengths: tuple[tuple[str, float], ...]
    until: int
    weighted: bool
    l1: float = 0.0

    def due(self, step: int, name: str) -> bool:
        return step == self.until

    def decide(self, view: PruningContext) -> NamedTensors:
        return {name: view.weights[name] != 0 for name in view.due}

    def after_step(self, step: int, pruned: Mapping[str, Pruned], rates: Mapping[int, float]) -> None:
        if step > self.until:
            return
        for pruned_weight in pruned.values():
            rate, weight = rates.get(id(pruned_weight.parameter), 0.0), pruned_weight.parameter.detach()
            shrunk = weight.sign() * (weight.abs() - rate * self.l1).clamp(min=0) if self.l1 else weight
            for kind, strength in self.strengths:
                shrunk = block_shrink(shrunk, kind, rate * strength, self.weighted)
            weight.copy_(shrunk)


def ssl(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    until: int,
    filters: float = 0.0,
    channels: float = 0.0,
    shapes: float = 0.0,
    depth: float = 0.0,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Learn which filters, channels, filter shapes and layers a net needs; the others become exactly zero.

    Each number is the strength of one kind of groups. After iteration ``until`` the zeros stay and the
    survivors train on without a penalty; on the wire all weights are sent until then.

    Source: Wen et al., Learning structured sparsity, NeurIPS 2016. We differ: a proximal step instead of a
    sub-gradient and a threshold. ``depth`` needs a way around the layer, such as a residual connection.
    """
    strengths = {"filters": filters, "channels": channels, "shapes": shapes, "depth": depth}
    return _group_pruner(model, optimizer, strengths, until, False, 0.0, names, seed)


def group_lasso(
    model: nn.Module,
    optimizer: Optimizer,
    strength: float = 1e-3,
    *,
    until: int,
    sparse: bool = False,
    biases: bool = True,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Drop whole inputs and units: all weights that leave one are a group, each bias is one of its own.

    The penalty is ``strength sum_g sqrt(|g|) |w_g|_2``; ``sparse`` adds ``strength |w|_1`` (sparse group
    lasso). After iteration ``until`` the zeros stay. ``biases``: those of pruned layers as well.

    Source: Scardapane et al., Group sparse regularization, Neurocomputing 2017. We differ: proximal steps,
    so that zeros are exact without a threshold.
    """
    module = unwrapped(model)
    chosen = weights_of(module) if names is None else list(names)
    if biases:
        known = dict(module.named_parameters())
        chosen += [b for n in chosen if (b := n.removesuffix("weight") + "bias") in known and b not in chosen]
    l1 = strength if sparse else 0.0
    return _group_pruner(model, optimizer, {"channels": strength}, until, True, l1, chosen, seed)


def _group_pruner(
    model: nn.Module,
    optimizer: Optimizer,
    strengths: Mapping[str, float],
    until: int,
    weighted: bool,
    l1: float,
    names: Iterable[str] | None,
    seed: int,
) -> Pruner:
    used = tuple((kind, strength) for kind, strength in strengths.items() if strength)
    if not used or any(strength < 0 for _, strength in used):
        raise DistcompError(f"group strengths are 0 or more and one is not 0, not {dict(strengths)}")
    return Pruner(model, optimizer, GroupLasso(used, until, weighted, l1), names, seed)
