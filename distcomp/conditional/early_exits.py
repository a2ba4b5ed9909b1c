"""BranchyNet: classifiers on the way, at which easy examples leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from distcomp.attaching.target import is_sharded
from distcomp.errors import DistcompError
from distcomp.pruning.masks import unwrapped


@dataclass(frozen=True)
class Answers:
    """What a batch was answered, and where."""

    scores: Tensor
    """``[N, classes]``: of each example, those of the exit that it took."""
    exits: Tensor
    """Which exit: int64 ``[N]``; the number of heads is the end of the network."""


class Exits:
    """Side classifiers ("heads") after named modules of ``model``.

    ::

        training    L = sum_n w_n CE(head_n(h_n), y) + w_end CE(z, y)
        inference   an example leaves at the first exit whose entropy -sum_c p_c log p_c is below its
        threshold

    Heads become submodules of the model (``exits.0``, ``exits.1``, ..), so that wrappers, optimizers and
    checkpoints know them: make the exits first. They add their parameters to what is sent, and nothing else.

    Inference really drops rows: after an exit only the examples that stay go on. It calls the model and cuts
    the activation at the exits, so modules after them must treat each example alone.

    Args:
        model: any module whose forward passes one activation through the named modules, in order.
        heads: by name of a module, the classifier of what it returns.
        weights: of the heads' losses, in order, and of the end's loss last.

    Source: Teerapittayanon et al., "BranchyNet", ICPR 2016. We differ: thresholds are calibrated to a wanted
    share of examples (:meth:`calibrate`), not given as entropies.

    Raises DistcompError for names that are no modules, and weights that are not one each and one for the end.
    """

    def __init__(
        self, model: nn.Module, heads: Mapping[str, nn.Module], weights: Sequence[float] | None = None
    ) -> None:
        self.model = model
        module = unwrapped(model)
        known = dict(module.named_modules())
        for name in heads:
            if name not in known:
                raise DistcompError(f"the model has no module {name!r}; name one as named_modules() does")
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(heads) + (1.0,)
        if len(self.weights) != len(heads) + 1:
            raise DistcompError(
                f"{len(heads)} heads and the end of the network need {len(heads) + 1} weights, not "
                f"{len(self.weights)}"
            )
        if hasattr(module, "exits"):
            raise DistcompError("the model has something called exits already; give it another name")
        self.thresholds: tuple[float, ...] = (0.0,) * len(heads)
        """Entropies in nats below which examples leave, by head."""
        module.add_module("exits", _Heads(heads.values()))
        self._module = module
        self._places = [known[name] for name in heads]
        self._seen: dict[int, Tensor] = {}
        self._leave: Callable[[int, Tensor], Tensor] | None = None
        self._hooks = [
            place.register_forward_hook(self._hook(number)) for number, place in enumerate(self._places)
        ]
        self._hooks.append(module.register_forward_pre_hook(self._forget))

    @property
    def heads(self) -> list[nn.Module]:
        """The side classifiers, in order."""
        heads = self._module.exits
        assert isinstance(heads, nn.ModuleList)
        return list(heads)

    def _hook(self, number: int) -> Callable[..., Any]:
        def at_exit(module: nn.Module, arguments: object, out: Tensor) -> Tensor | None:
            if self._leave is not None:
                return self._leave(number, out)
            if module.training and number not in self._seen:  # not again where it is recomputed
                self._seen[number] = self.heads[number](out)
            return None

        return at_exit

    def _forget(self, module: nn.Module, arguments: object) -> None:
        """A forward begins: what another one left, whose loss nobody took, is no part of it."""
        if module.training:
            self._seen = {}

    # ---------------------------------------------------------------------------------------- training

    def loss(
        self, scores: Tensor, labels: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    ) -> Tensor:
        """The joint weighted loss of the forward that gave ``scores``, heads included.

        Raises DistcompError where no training forward has just passed all heads.
        """
        seen, self._seen = self._seen, {}
        if len(seen) != len(self._places):
            raise DistcompError(
                f"{len(seen)} of {len(self._places)} heads saw the last forward; call loss() once after each "
                "training forward"
            )
        losses = [criterion(head, labels) for head in (*(seen[number] for number in sorted(seen)), scores)]
        weighted = [weight * loss for weight, loss in zip(self.weights, losses, strict=True)]
        return torch.stack(weighted).sum()

    # --------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, shares: Sequence[float]) -> tuple[float, ...]:
        """Choose thresholds such that of ``inputs`` (examples not trained on) ``shares[n]`` of all leave at
        head n.

        Raises DistcompError for shares that are negative, or sum to more than 1, or are not one per head.
        """
        if len(shares) != len(self._places) or min(shares) < 0 or sum(shares) > 1:
            raise DistcompError(
                f"shares of {list(shares)} cannot leave at {len(self._places)} heads; give one each, in all "
                "at most 1"
            )
        thresholds: list[float] = []

        def choose(number: int, entropies: Tensor) -> Tensor:
            ordered = entropies.sort().values
            if not len(ordered):  # all have left, and the rest is run for the ranks that gather from here
                thresholds.append(0.0)
                return entropies < 0
            count = min(round(shares[number] * len(inputs)), len(ordered))
            below = ordered[count - 1] if count else ordered[0] - 1
            above = ordered[count] if count < len(ordered) else ordered[-1] + 1
            thresholds.append(float((below + above) / 2))
            return entropies < thresholds[-1]

        self.answer(inputs, choose)
        thresholds += [0.0] * (len(shares) - len(thresholds))
        self.thresholds = tuple(thresholds)
        return self.thresholds

    @torch.no_grad()
    def answer(self, inputs: Tensor, leaves: Callable[[int, Tensor], Tensor] | None = None) -> Answers:
        """Each example's scores, from the exit that it takes. Rows that have left are computed no further.

        ``leaves(number, entropies)`` says which of those that came to an exit leave there (bool); by default
        those below the threshold. The model is to be in evaluation mode.
        """
        if self.model.training:
            raise DistcompError("the model is in training mode; call model.eval() before it answers")
        decide = leaves or (lambda number, entropies: entropies < self.thresholds[number])
        waiting = torch.arange(len(inputs), device=inputs.device)
        left: list[tuple[int, Tensor, Tensor]] = []
        # Weights that other ranks gather from here are gathered to the end, also for no rows.
        sharded = any(is_sharded(part) for part in self._module.modules())

        def at_exit(number: int, out: Tensor) -> Tensor:
            nonlocal waiting
            scores = self.heads[number](out)
            gone = decide(number, entropy(scores))
            left.append((number, waiting[gone], scores[gone]))
            waiting = waiting[~gone]
            if not len(waiting) and not sharded:
                raise _AllGone
            return out[~gone]

        with self._leaving(at_exit):
            try:
                rest = self.model(inputs)
                left.append((len(self._places), waiting, rest))
            except _AllGone:
                pass
        scores = torch.empty(len(inputs), left[0][2].shape[1], dtype=left[0][2].dtype, device=inputs.device)
        exits = torch.empty(len(inputs), dtype=torch.int64, device=inputs.device)
        for number, rows, own in left:
            scores[rows], exits[rows] = own, number
        return Answers(scores, exits)

    @contextmanager
    def _leaving(self, at_exit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        self._leave = at_exit
        try:
            yield
        finally:
            self._leave = None

    def remove(self) -> None:
        """Leave the model: heads go, and it runs to its end."""
        for hook in self._hooks:
            hook.remove()
        del self._module.exits


class _Heads(nn.ModuleList):
    """The side classifiers. An nn.Sequential calls what is put into it: they hand on what they are given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _AllGone(Exception):
    """No example is left that would need the rest of the network."""


def exits(model: nn.Module, heads: Mapping[str, nn.Module], weights: Sequence[float] | None = None) -> Exits:
    """Put side classifiers after named modules; see :class:`Exits`."""
    return Exits(model, heads, weights)


def entropy(scores: Tensor) -> Tensor:
    """``-sum_c p_c log p_c`` of each row's softmax, in nats."""
    log_p = log_softmax(scores, -1)
    return -(log_p.exp() * log_p).sum(-1)


def average_products(to_exit: Sequence[float], exits_taken: Tensor) -> float:
    """Multiplications of an example, on average, where reaching (and asking) exit n takes ``to_exit[n]``."""
    counts = torch.bincount(exits_taken, minlength=len(to_exit)).double()
    return float((counts * torch.tensor(to_exit, dtype=torch.float64)).sum() / counts.sum())
