"""Pruning by magnitude: Han's thresholds and sensitivity scan; gradual; N:M; dense-sparse-dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError
from distcomp.pruning.masks import keep_largest, unwrapped, weights_of
from distcomp.pruning.pruner import Criterion, NamedTensors, Pruner, PruningContext
from distcomp.randomness import Key
from distcomp.schedule import Schedule, extremes, varying

PerLayer = float | Mapping[str, float]


def frozen(value: PerLayer) -> float | tuple[tuple[str, float], ...]:
    """A setting per layer in the form in which ranks compare it."""
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else float(value)


def of_layer(value: float | tuple[tuple[str, float], ...], name: str, otherwise: float = 0.0) -> float:
    """The setting of one layer."""
    return dict(value).get(name, otherwise) if isinstance(value, tuple) else value


def smallest_pruned(weights: NamedTensors, masks: NamedTensors, sparsity: float, scope: str) -> NamedTensors:
    """Masks within the given ones that leave ``1 - sparsity`` of the weights: of each layer, or of all.

    The largest magnitudes live; among equals the lower index does.
    """
    scores = {n: w.abs().float().masked_fill(~masks[n], -math.inf) for n, w in weights.items()}
    if scope == "layer":
        return {n: keep_largest(score, round((1 - sparsity) * score.numel())) for n, score in scores.items()}
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    kept = keep_largest(flat, round((1 - sparsity) * flat.numel()))
    pieces = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: piece.view_as(scores[name]) for name, piece in zip(scores, pieces, strict=True)}


@dataclass(frozen=True)
class Gradual(Criterion):
    """Raise the share of pruned weights along a schedule, every ``every`` steps, by magnitude.

    ::

        s_t = s_f + (s_0 - s_f) (1 - (t - t_0) / (t_f - t_0))^3          (the default schedule, cubic)

    A pruned weight stays pruned. ``scope``: the share is that of each ``layer``, or of all weights together
    (``global``).
    """

    sparsity: Schedule
    every: int = 1
    scope: str = "layer"

    def __post_init__(self) -> None:
        low, high = extremes(self.sparsity)
        if not 0 <= low <= high < 1:
            raise DistcompError(f"a share of pruned weights is in [0, 1), not {low:g} to {high:g}")
        if self.every < 1 or self.scope not in ("layer", "global"):
            raise DistcompError(
                f"every is 1 step or more and scope 'layer' or 'global', not {self.every} and {self.scope!r}"
            )

    def due(self, step: int, name: str) -> bool:
        first, last = self.sparsity.points[0][0], self.sparsity.points[-1][0]
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    def decide(self, view: PruningContext) -> NamedTensors:
        return smallest_pruned(view.weights, view.masks, self.sparsity(view.step), self.scope)


def gradual(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    target: float | str | Schedule = 0.9,
    *,
    begin: int = 0,
    end: int = 1000,
    every: int = 10,
    scope: str = "layer",
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Prune by magnitude, more and more along a cubic curve from step ``begin`` to step ``end``.

    ``target`` is the share of pruned weights at the end, or a Schedule of it (whose points then say when).

    Source: Zhu & Gupta, To prune, or not to prune, 2017. We differ: any Schedule; shared masks by
    construction.
    """
    curve = varying(target)
    if not isinstance(curve, Schedule):
        curve = Schedule(((begin, 0.0), (end, float(curve))), "cubic")
    return Pruner(model, optimizer, Gradual(curve, every, scope), names, seed)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Prune once or several times, each layer by its own threshold; train on in between.

    ::

        pruned where |w| < quality * std(w)              (``by="quality"``), or
        pruned where |w| is among the ``share`` smallest (``by="share"``)

    ``at`` are the steps after which it happens; where there are several, the k-th of K prunes to
    ``1 - (1 - share)^(k/K)``.
    """

    amount: float | tuple[tuple[str, float], ...]
    at: tuple[int, ...]
    by: str = "share"

    def due(self, step: int, name: str) -> bool:
        return step in self.at

    def decide(self, view: PruningContext) -> NamedTensors:
        return {name: self._of(name, view) for name in view.due}

    def _of(self, name: str, view: PruningContext) -> Tensor:
        weight, mask, amount = view.weights[name], view.masks[name], of_layer(self.amount, name)
        if self.by == "quality":
            active = weight[mask].float()
            return mask & (weight.abs() >= amount * active.std(unbiased=False))
        share = 1 - (1 - amount) ** ((self.at.index(view.step) + 1) / len(self.at))
        return smallest_pruned({name: weight}, {name: mask}, share, "layer")[name]


def magnitude(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    amount: PerLayer = 0.9,
    *,
    steps: Sequence[int] = (1000,),
    by: str = "share",
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Train, prune what is small in each layer, train the survivors on from where they are.

    ``amount`` is a share of pruned weights, or with ``by="quality"`` the factor of a layer's standard
    deviation below which a weight is pruned; one number, or one per layer such as :func:`sensitivity` finds.
    ``steps``: the iterations after which it happens.

    Source: Han et al., Learning both weights and connections, NeurIPS 2015. Shrink dropout for the
    retraining with :func:`retraining_dropout`.
    """
    if by not in ("share", "quality"):
        raise DistcompError(f"by is 'share' or 'quality', not {by!r}")
    amounts = amount.values() if isinstance(amount, Mapping) else [amount]
    if any(share < 0 or (by == "share" and share >= 1) for share in amounts):
        raise DistcompError(f"a share of pruned weights is in [0, 1) and a quality 0 or more, not {amount}")
    if not steps or sorted(set(steps)) != list(steps):
        raise DistcompError(f"steps must rise, and there must be one, not {list(steps)}")
    return Pruner(model, optimizer, Magnitude(frozen(amount), tuple(steps), by), names, seed)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    loss: Callable[[], float],
    shares: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    names: Iterable[str] | None = None,
) -> dict[str, dict[float, float]]:
    """The loss when one layer alone is pruned to each share, without retraining; by name and share.

    ``loss`` evaluates the model as it is. The model is left as it was. Give :func:`magnitude` the largest
    shares that are affordable: ``affordable(sensitivity(...), by)``.
    """
    module = unwrapped(model)
    table: dict[str, dict[float, float]] = {}
    for name in weights_of(module) if names is None else names:
        parameter = module.get_parameter(name)
        before = parameter.detach().clone()
        everything = {name: torch.ones_like(before, dtype=torch.bool)}
        table[name] = {}
        for share in shares:
            parameter.copy_(before * smallest_pruned({name: before}, everything, share, "layer")[name])
            table[name][share] = float(loss())
        parameter.copy_(before)
    return table


def affordable(table: Mapping[str, Mapping[float, float]], loss: float) -> dict[str, float]:
    """Each layer's largest share that leaves it, pruned alone, at ``loss`` or below; 0 where none does."""
    return {
        name: max((share for share, loss_ in row.items() if loss_ <= loss), default=0.0)
        for name, row in table.items()
    }


def retraining_dropout(rate: float, connections: int, remaining: int) -> float:
    """The dropout rate for retraining: ``D_r = D_o sqrt(C_r / C_o)``, for fewer connections overfit less."""
    return rate * math.sqrt(remaining / connections)


@dataclass(frozen=True)
class NOfM(Criterion):
    """Of every M consecutive weights of a row the N largest live; chosen after each of the steps ``at``."""

    n: int
    m: int
    at: tuple[int, ...]

    def due(self, step: int, name: str) -> bool:
        return step in self.at

    def decide(self, view: PruningContext) -> NamedTensors:
        return {name: n_of_m(view.weights[name], self.n, self.m) for name in view.due}


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the ``n`` largest of every ``m`` consecutive elements of each row."""
    groups = weight.abs().float().reshape(-1, m)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.view_as(weight)


def nm(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    n: int = 2,
    m: int = 4,
    *,
    steps: Sequence[int] = (1000,),
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Keep the ``n`` largest of every ``m`` consecutive weights of a row: what sparse tensor cores multiply.

    Rows are the weights of one output (``weight.flatten(1)``). Where ``names`` is None, layers whose rows are
    no multiple of ``m`` stay dense; one that is named is refused. Source: Mishra et al., Accelerating sparse
    deep neural networks, 2021.
    """
    if not 0 < n < m:
        raise DistcompError(f"n of m needs 0 < n < m, not {n} of {m}; the usual is 2 of 4")
    module = unwrapped(model)
    chosen = weights_of(module) if names is None else list(names)
    fits = {name: _row(module, name) % m == 0 for name in chosen}
    if names is not None and not all(fits.values()):
        odd = next(name for name in chosen if not fits[name])
        raise DistcompError(f"rows of {odd} are no multiple of {m} weights; leave it out of names")
    return Pruner(model, optimizer, NOfM(n, m, tuple(steps)), [name for name in chosen if fits[name]], seed)


def _row(module: nn.Module, name: str) -> int:
    weight = module.get_parameter(name)
    return weight.numel() // max(1, weight.shape[0])


@dataclass(frozen=True)
class DenseSparseDense(Criterion):
    """Prune each layer to ``share`` after step ``sparse_from``, let all come back after ``dense_from``."""

    share: float | tuple[tuple[str, float], ...]
    sparse_from: int
    dense_from: int

    def due(self, step: int, name: str) -> bool:
        return step in (self.sparse_from, self.dense_from)

    def decide(self, view: PruningContext) -> NamedTensors:
        if view.step == self.dense_from:
            return {name: torch.ones_like(view.masks[name]) for name in view.due}
        masks: NamedTensors = {}
        for name in view.due:
            share = of_layer(self.share, name)
            masks |= smallest_pruned({name: view.weights[name]}, {name: view.masks[name]}, share, "layer")
        return masks


def dsd(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    share: PerLayer = 0.3,
    *,
    sparse_from: int,
    dense_from: int,
    names: Iterable[str] | None = None,
    seed: int = 0,
) -> Pruner:
    """Train dense, prune once and train sparse, then let pruned weights return at zero and train dense again.

    The aim is a better dense model, not a smaller one. In the last phase the paper trains at a tenth of the
    learning rate: that is your scheduler's to do. Weights that come back have no momentum.

    Source: Han et al., DSD, ICLR 2017.
    """
    if not 0 <= sparse_from < dense_from:
        raise DistcompError(f"sparse_from={sparse_from} must come before dense_from={dense_from}")
    criterion = DenseSparseDense(frozen(share), sparse_from, dense_from)
    return Pruner(model, optimizer, criterion, names, seed)


@dataclass(frozen=True)
class Fixed(Criterion):
    """Masks that were decided beforehand; they stay."""

    def due(self, step: int, name: str) -> bool:
        return False

    def decide(self, view: PruningContext) -> NamedTensors:
        return {}


def fixed(model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> Pruner:
    """A pruner whose masks are given, by parameter name, and stay: train what survives."""
    pruner = Pruner(model, optimizer, Fixed(), list(masks))
    pruner._set({name: mask.bool() for name, mask in masks.items()})
    return pruner


def random_masks(weights: NamedTensors, sparsity: float, key: Key) -> NamedTensors:
    """Masks drawn at random from a key, each layer with the same share of pruned weights."""
    masks: NamedTensors = {}
    for name, weight in weights.items():
        draw = torch.rand(
            weight.numel(), generator=key.fold("initial", name).generator(), dtype=torch.float32
        )
        kept = keep_largest(draw, round((1 - sparsity) * weight.numel()))
        masks[name] = kept.view(weight.shape).to(weight.device)
    return masks
