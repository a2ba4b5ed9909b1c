"""Networks that teach each other while they learn: deep mutual learning, and ONE's branches on one stem.

Both train more than is kept at the end, and a wire method sends all that is trained:
:func:`distcomp.distill.summary`, and ``training_factor`` of the handle's ``stats()``, say by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distcomp.distill.losses import labelled_cross_entropy, softened_kl
from distcomp.errors import DistcompError
from distcomp.schedule import Schedule, at, varying


class MutualLearners(nn.Module):
    """Several networks as one module: wrap it, optimize it and attach to it as to any other.

    ``forward(batch)`` gives each network's logits; :func:`mutual_loss` makes a loss of them; ``networks[0]``
    is what is kept.

    Source: Zhang et al., Deep mutual learning, CVPR 2018.

    Raises DistcompError for fewer than two networks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) < 2:
            raise DistcompError(f"mutual learning takes 2 networks or more, not {len(networks)}")
        self.networks = nn.ModuleList(networks)

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """The logits of each, ``[batch, classes]``."""
        return tuple(network(batch) for network in self.networks)

    def kept_after_training(self) -> tuple[nn.Module, ...]:
        """The first network."""
        return (self.networks[0],)


def mutual_loss(logits: Sequence[Tensor], labels: Tensor, weight: float = 1.0) -> Tensor:
    """The sum over networks of their own loss and of what the others say, at temperature 1.

    ::

        sum_i [ CE(z_i, y) + weight / (K-1) sum_{j != i} KL(softmax(z_j) | softmax(z_i)) ],   z_j detached

    Rows of label -1 have the second term alone. Source: Zhang et al., CVPR 2018, equation 8. We differ: the
    networks step at once, each seeing the others as they were.
    """
    total = torch.stack([labelled_cross_entropy(z, labels) for z in logits]).sum()
    for i, z in enumerate(logits):
        others = [softened_kl(z, p.detach().softmax(-1), 1.0) for j, p in enumerate(logits) if j != i]
        total = total + weight * torch.stack(others).mean()
    return total


@dataclass(frozen=True)
class Branches:
    """What :class:`OnTheFlyEnsemble` gives: the logits of each branch, of their gated ensemble, and the gate
    (``[batch, branches]``)."""

    each: tuple[Tensor, ...]
    ensemble: Tensor
    gate: Tensor


class OnTheFlyEnsemble(nn.Module):
    """ONE: a shared stem, several branches, and a gate that weighs them into a teacher of them all.

    ``branch``: the upper part of the network, given the stem's features; ``branches`` copies of it are made,
    with weights drawn anew where its modules have ``reset_parameters``. ``features``: how many channels the
    stem gives. ``export()`` is a plain network: the stem and one branch.

    ::

        gate = softmax(relu(norm(W pooled(stem(x)))))          z_e = sum_i gate_i z_i

    Source: Lan et al., Knowledge distillation by on-the-fly native ensemble, NeurIPS 2018.

    Raises DistcompError for fewer than two branches.
    """

    def __init__(self, stem: nn.Module, branch: nn.Module, features: int, branches: int = 3) -> None:
        super().__init__()
        if branches < 2:
            raise DistcompError(f"an on-the-fly ensemble has 2 branches or more, not {branches}")
        self.stem = stem
        self.branches = nn.ModuleList([branch, *(_drawn_anew(branch) for _ in range(branches - 1))])
        self.gate = nn.Sequential(nn.Linear(features, branches), nn.BatchNorm1d(branches), nn.ReLU())

    def forward(self, batch: Tensor) -> Branches:
        """All branches' logits, and the ensemble's."""
        features = self.stem(batch)
        pooled = features.flatten(2).mean(2) if features.dim() > 2 else features
        gate = self.gate(pooled).softmax(1)
        each = tuple(branch(features) for branch in self.branches)
        return Branches(each, torch.einsum("nb,bn...->n...", gate, torch.stack(each)), gate)

    def export(self, branch: int = 0) -> nn.Sequential:
        """The network that is kept: no larger than one that was trained alone."""
        return nn.Sequential(self.stem, self.branches[branch])

    def kept_after_training(self) -> tuple[nn.Module, ...]:
        """The stem and a branch."""
        return self.stem, self.branches[0]


def ensemble_loss(
    branches: Branches,
    labels: Tensor,
    temperature: float = 3.0,
    weight: float | str | Schedule = 1.0,
    step: int = 0,
) -> Tensor:
    """ONE's loss.

    ::

        sum_i CE(z_i, y) + CE(z_e, y) + weight sum_i T^2 KL(softmax(z_e / T) | softmax(z_i / T))

    with z_e detached in the last term.

    ``weight`` is often a schedule that rises over the first epochs, evaluated at ``step``.

    Source: Lan et al., NeurIPS 2018, equation 7.
    """
    own = [labelled_cross_entropy(z, labels) for z in (*branches.each, branches.ensemble)]
    targets = (branches.ensemble.detach() / temperature).softmax(-1)
    taught = [softened_kl(z, targets, temperature) for z in branches.each]
    return torch.stack(own).sum() + at(varying(weight), step) * torch.stack(taught).sum()


def training_factor(trained: nn.Module, kept: nn.Module) -> float:
    """How many parameters are trained, and sent by a gradient method, for each one that is kept."""
    counts = [sum(p.numel() for p in module.parameters()) for module in (trained, kept)]
    return counts[0] / counts[1]


def _drawn_anew(branch: nn.Module) -> nn.Module:
    copy = deepcopy(branch)
    for module in copy.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return copy
