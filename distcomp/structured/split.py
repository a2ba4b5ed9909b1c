"""SplitNet: learn which features belong to which classes, then cut the layers into groups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.errors import DistcompError
from distcomp.parametrize import Storage, install
from distcomp.parametrize.base import Tensors
from distcomp.structured.driver import Driver, add_gradient
from distcomp.structured.structure import Structure, compute_with_theta, convolved, plain_geometry


class BlockDiagonal(Structure):
    """A weight with a block for each group of outputs and inputs, and zeros elsewhere: grouped layers.

    ``W[rows of g, columns of g] = theta_g``: G tensors ``[out_g, in_g, *taps]``, each a parameter of its own.
    Groups may be of any size and in any order: nothing is permuted. The layer computes group by group.
    """

    outputs: Tensor
    inputs: Tensor

    def __init__(self, outputs: Tensor, inputs: Tensor, groups: int) -> None:
        """``outputs [out]`` and ``inputs [in]`` hold the group of each, below ``groups`` (at most 256)."""
        super().__init__()
        self.groups = groups
        self.register_buffer("outputs", outputs.to(torch.uint8))
        self.register_buffer("inputs", inputs.to(torch.uint8))
        for group in range(groups):
            if not (bool((self.outputs == group).any()) and bool((self.inputs == group).any())):
                raise DistcompError(
                    f"group {group} of {groups} has no output or no input; split with a stronger balance, or "
                    "into fewer groups"
                )

    @property
    def held(self) -> Sequence[int]:
        """The groups whose blocks are here, in theta's order."""
        return range(self.groups)

    def _members(self, group: int) -> tuple[Tensor, Tensor]:
        return (self.outputs == group).nonzero().squeeze(1), (self.inputs == group).nonzero().squeeze(1)

    def decode(self, *theta: Tensor) -> Tensor:
        """The weight, zeros and all."""
        weight = theta[0].new_zeros(len(self.outputs), len(self.inputs), *theta[0].shape[2:])
        for group, block in zip(self.held, theta, strict=True):
            rows, columns = self._members(group)
            weight = weight.index_put((rows[:, None], columns[None]), block)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensors:
        """What lies within the groups."""
        members = [self._members(group) for group in self.held]
        return tuple(weight[rows[:, None], columns[None]] for rows, columns in members)

    def storage(self, below: Storage, weight: Tensors) -> Storage:
        """The blocks, and a byte for the group of each input and output."""
        return Storage(below.numbers, below.width, below.extra + 8 * (len(self.outputs) + len(self.inputs)))

    def compute(self, layer: nn.Module, x: Tensor, *theta: Tensor) -> Tensor | None:
        if not plain_geometry(layer):
            return None
        dim = -1 if isinstance(layer, nn.Linear) else x.dim() - theta[0].dim() + 1
        rows, parts = [], []
        for group, block in zip(self.held, theta, strict=True):
            outputs, inputs = self._members(group)
            mine = x.index_select(dim, inputs)
            rows.append(outputs)
            parts.append(mine @ block.T if isinstance(layer, nn.Linear) else convolved(mine, block, layer))
        y = self._in_place(torch.cat(parts, dim), torch.cat(rows), dim)
        bias: Any = layer.bias
        if bias is None:
            return y
        return torch.add(y, bias.view(-1, *(1 for _ in theta[0].shape[2:])))

    def _in_place(self, y: Tensor, rows: Tensor, dim: int) -> Tensor:
        """Outputs that were computed group by group, at the places of their features."""
        return y.index_select(dim, rows.argsort())

    def multiplications(self, layer: nn.Module, positions: int) -> int | None:
        if not plain_geometry(layer):
            return None
        taps = int(layer.weight[0, 0].numel())  # type: ignore[index]
        sizes = [self._members(group) for group in self.held]
        return sum(len(rows) * len(columns) for rows, columns in sizes) * taps * positions


class LearnedSplit(Driver):
    """See :func:`splitnet`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        groups: int,
        *,
        strengths: tuple[float, float, float],
        until: int,
        rate: float,
        seed: int,
    ) -> None:
        super().__init__(model, [f"{layer}.weight" for layer in layers])
        if groups < 2 or groups > 256 or until < 1 or min(strengths) < 0:
            raise DistcompError(
                "a split has 2 to 256 groups, strengths of 0 or more and ends after 1 iteration or more, "
                f"not {groups}, {strengths}, {until}"
            )
        self.groups, self.strengths, self.until = groups, strengths, until
        weights = list(self.weights().values())
        self._repeats = [1, *(_repeats(*pair) for pair in itertools.pairwise(weights))]
        draw = torch.Generator().manual_seed(seed)
        starts = spectral_start(weights, self._repeats, groups)
        drawn = [
            start + 0.01 * torch.randn(start.shape, generator=draw, dtype=torch.float32) for start in starts
        ]
        self.logits = [logits.to(weights[0].device).requires_grad_() for logits in drawn]
        """Of the inputs of the first layer, and of the outputs of each: ``[groups, features]``."""
        self._optimizer = torch.optim.Adam(self.logits, rate)

    def shares(self) -> list[Tensor]:
        """How much each feature belongs to each group: columns sum to 1. Cooled from temperature 1 to 1/4."""
        progress = min(1.0, self.iteration / self.until)
        return [torch.softmax(logits / (1 - 0.75 * progress), 0) for logits in self.logits]

    def penalty(self, weights: Sequence[Tensor]) -> Tensor:
        """Group lasso off the diagonal, disjointness (ramped up) and balance, each times its strength."""
        shares, (lasso, disjoint, balance) = self.shares(), self.strengths
        progress = min(1.0, self.iteration / self.until)
        total = weights[0].new_zeros(())
        for position, weight in enumerate(weights):
            inputs = shares[position].repeat_interleave(self._repeats[position], 1)
            total = total + lasso * off_diagonal(weight, shares[position + 1], inputs)
        for share in shares:
            apart = (share.sum(0).square() - share.square().sum(0)).sum() / 2  # sum over i < j of p_i . p_j
            total = total + disjoint * progress * apart + balance * share.mean(1).square().sum()
        return total

    def add(self) -> None:
        """The penalty's gradient: for the weights now, for the assignments until :meth:`stepped`."""
        weights = list(self.weights().values())
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            gradients = torch.autograd.grad(self.penalty(leaves), [*leaves, *self.logits])
        for weight, gradient in zip(weights, gradients, strict=False):
            add_gradient(weight, gradient)
        for logits, gradient in zip(self.logits, gradients[len(weights) :], strict=True):
            logits.grad = gradient

    def stepped(self) -> None:
        """The assignments learn."""
        self._optimizer.step()

    @property
    def assignments(self) -> list[Tensor]:
        """The group of each feature: of the first layer's inputs, then of each layer's outputs."""
        return [logits.detach().argmax(0) for logits in self.logits]

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Cut: each layer keeps the blocks within the groups, which are parameters of their own from now on.

        Make the optimizer and DistributedDataParallel anew, and train on. Returns the model.

        Raises DistcompError, and changes nothing, where a group has no feature left.
        """
        assignments = self.assignments
        cuts = {
            name: BlockDiagonal(
                assignments[position + 1],
                assignments[position].repeat_interleave(self._repeats[position]),
                self.groups,
            )
            for position, name in enumerate(self.names)
        }
        self.detach()
        for name, cut in cuts.items():
            install(self.model, name, cut)
            compute_with_theta(self.model.get_submodule(name.rpartition(".")[0]))
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {
            "iteration": self.iteration,
            "logits": [logits.detach().clone() for logits in self.logits],
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.iteration = int(state["iteration"])
        with torch.no_grad():
            for logits, saved in zip(self.logits, state["logits"], strict=True):
                logits.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])


def off_diagonal(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The group lasso of what leads from one group to another.

    ::

        sum_g  sum_columns |(1 - p_out_g) W p_in_g|_2  +  sum_rows |p_out_g W (1 - p_in_g)|_2

    ``outputs [G, out]``, ``inputs [G, in]``: how much each belongs to each group. Of a convolution, a column
    is all kernels of an input channel.
    """
    squares = weight.flatten(2).square().sum(2) if weight.dim() > 2 else weight.square()
    columns = inputs.square() * ((1 - outputs).square() @ squares)  # [G, in]
    rows = outputs.square() * ((1 - inputs).square() @ squares.T)  # [G, out]
    return (columns + 1e-12).sqrt().sum() + (rows + 1e-12).sqrt().sum()


@torch.no_grad()
def spectral_start(weights: Sequence[Tensor], repeats: Sequence[int], groups: int) -> list[Tensor]:
    """Logits of the assignments before anything is learned: by how much features speak to classes.

    Classes are clustered by the leading singular vectors of ``|W_k ... W_1|``, the network without its
    activations, rows and columns normed (Dhillon 2001); a feature's logits are the logarithms of its shares
    in the groups of classes.
    """
    matrices = [(w.flatten(2).sum(2) if w.dim() > 2 else w).float().cpu() for w in weights]
    signed = [torch.eye(len(matrices[-1]), dtype=torch.float32)]  # [classes, features], outputs first
    for matrix, repeat in zip(reversed(matrices), reversed(repeats), strict=True):
        inputs = signed[0] @ matrix
        signed.insert(0, inputs.view(len(inputs), -1, repeat).sum(2))
    reached = [features.abs() for features in signed]
    affinity = reached[0] / reached[0].sum(1, keepdim=True).sqrt() / reached[0].sum(0).sqrt()
    places = torch.linalg.svd(affinity, full_matrices=False)[0][:, 1 : max(2, groups)]
    group = _clusters(places, groups)
    member = nn.functional.one_hot(group, groups).T.float()  # [groups, classes]
    shares = [member @ (features / features.sum(0).clamp(min=1e-12)) for features in reached]
    return [(share / share.mean(1, keepdim=True).clamp(min=1e-12)).clamp(min=0.05).log() for share in shares]


def _clusters(places: Tensor, count: int) -> Tensor:
    """k-means from points far apart, the same everywhere: the cluster of each row."""
    centres = places[places[:, 0].argmax()][None]
    while len(centres) < count:
        far = torch.cdist(places, centres).amin(1).argmax()
        centres = torch.cat([centres, places[far : far + 1]])
    for _ in range(20):
        cluster = torch.cdist(places, centres).argmin(1)
        members = nn.functional.one_hot(cluster, count).T.float()
        centres = members @ places / members.sum(1, keepdim=True).clamp(min=1)
    return torch.cdist(places, centres).argmin(1)


def _repeats(before: Tensor, after: Tensor) -> int:
    """How many inputs of a layer come of each output of the one before: places of a flattened channel."""
    if after.shape[1] % before.shape[0]:
        raise DistcompError(
            f"a layer of {after.shape[1]} inputs does not follow one of {before.shape[0]} outputs; "
            f"name the layers "
            "in the order in which features pass through them"
        )
    return after.shape[1] // before.shape[0]


def splitnet(
    model: nn.Module,
    layers: Sequence[str],
    groups: int,
    *,
    strengths: tuple[float, float, float] = (1e-3, 1e-2, 1.0),
    until: int = 1000,
    rate: float = 1e-2,
    seed: int = 0,
) -> LearnedSplit:
    """While training, gather features and classes in groups that do not need each other; ``.finish()`` cuts.

    ::

        loss + s1 sum_layers off_diagonal(W, p_out, p_in) + s2 sum_{i<j} p_i . p_j + s3 sum_g mean(p_g)^2

    with p the softmax of learned assignments, for the inputs of the first of ``layers`` and the outputs of
    each (the last's are classes). ``layers`` follow each other. ``until``: over how many iterations the
    softmax is cooled and disjointness ramped up. Start from a trained dense model. After the cut a layer has
    about ``1/groups`` of its numbers, and what a group computes is no other's affair:
    ``distcomp.conditional.spread_groups`` lets each rank hold its groups alone.

    Wire: nothing for the assignments; they are a function of weights, which all ranks have alike.

    Source: Kim et al., SplitNet, ICML 2017 (PMLR 70). We differ: assignments start at spectral clusters of
    the trained weights, not at random, from where hidden features that serve all classes alike find no
    direction.

    Raises DistcompError for layers that do not follow each other, numbers out of range, weights described
    already.
    """
    return LearnedSplit(model, layers, groups, strengths=strengths, until=until, rate=rate, seed=seed)
