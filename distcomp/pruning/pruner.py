"""Which weights exist while we train: a criterion decides, a pruner asks it at the right time, on all ranks
alike.

**The clock** is the iteration (:mod:`distcomp.training.clock`). Masks change at the
beginning of the next training forward; never in between, and never with an optimizer step, which a GradScaler
may skip.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distcomp.errors import DistcompError, Mismatch
from distcomp.pruning.active import ActiveMasks, MaskSnapshot
from distcomp.pruning.masks import Mask, Pruned, digest, put_masks, unwrapped, weights_of
from distcomp.randomness import Key
from distcomp.training import Listener, clock_of

NamedTensors = dict[str, Tensor]


@dataclass(frozen=True)
class PruningContext:
    """What a criterion decides from: the same on every rank."""

    step: int
    due: tuple[str, ...]
    weights: NamedTensors
    """Trained values by name, pruned ones included; their mean over ranks where ranks differ."""
    masks: NamedTensors
    gradients: NamedTensors
    """What the optimizer last saw, where the criterion asks for it."""
    key: Key
    memory: NamedTensors
    """What the criterion keeps between decisions; it may write here. Saved with the pruner."""


class Criterion(ABC):
    """Decides which weights live. Subclasses are frozen dataclasses: their ``repr`` is what ranks compare."""

    wants_dense: bool = False
    """Whether gradients of pruned weights are needed when a mask is due to change."""
    keeps_dense_grad: bool = False
    """Whether pruned weights are trained too: what is not sent of their gradients is owed until it is."""
    restarts: bool = True
    """Whether a weight that comes back begins at zero; otherwise where it was left."""
    wants_gradients: bool = False
    """Whether ``PruningContext.gradients`` is filled."""
    wants_optimizer: bool = False

    def mask_for(self, parameter: Tensor) -> Mask:
        """The parametrization of a parameter."""
        return Mask(parameter)

    def begin(self, weights: NamedTensors, key: Key) -> NamedTensors:
        """Masks before the first step, where they are not all ones."""
        return {}

    @abstractmethod
    def due(self, step: int, name: str) -> bool:
        """Whether this parameter's mask may change after iteration ``step`` (counted from 0).

        A function of its arguments and the settings alone: the wire asks it beforehand.
        """

    @abstractmethod
    def decide(self, view: PruningContext) -> NamedTensors:
        """New masks (bool) of parameters in ``view.due``; those left out stay."""

    def after_step(self, step: int, pruned: Mapping[str, Pruned], rates: Mapping[int, float]) -> None:
        """What happens to the weights after each optimizer step; ``rates`` are learning rates by parameter
        id."""
        return


class SupportsConsensus(Protocol):
    """How a pruner asks the other ranks, where a method is attached."""

    replicated: bool
    """Whether weights are the same on every rank anyway."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a flat float32 tensor over the ranks."""

    def numbers(self, own: int) -> list[int]:
        """Every rank's number, in rank order."""


@dataclass
class Change:
    """That masks changed after iteration ``step``: the share of pruned weights by name, from then on."""

    step: int
    sparsity: dict[str, float]


class Pruner(Listener):
    """Keeps the masks of ``model`` as ``criterion`` decides, from the next iteration on.

    Args:
        model: a module, DistributedDataParallel around it, or torch.compile around that. Create the pruner
            after DDP and before ``distcomp.attach``.
        optimizer: of its parameters; needed by proximal methods and by regrowth.
        criterion: what decides.
        names: of the parameters to prune; None: the weights of linear layers, convolutions and embeddings.
        seed: of all draws; the same on every rank.

    Raises DistcompError for a name that is no parameter, a shared or already parametrized one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        criterion: Criterion,
        names: Iterable[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.name = f"pruner {next(_NUMBERS)}"
        """In this process: under it masks are handed to the methods that send what they keep."""
        _PRUNERS[self.name] = self
        self.criterion = criterion
        self.seed = seed
        self.step = 0
        self.history: list[Change] = []
        self.consensus: SupportsConsensus | None = None
        self.memory: NamedTensors = {}
        self._model = model
        self._optimizer = optimizer
        self._gradients: NamedTensors = {}
        self._pending = False
        self._snapshot: tuple[object, MaskSnapshot] | None = None
        if optimizer is None and (criterion.wants_optimizer or criterion.wants_gradients):
            raise DistcompError(f"{criterion} needs the optimizer; pass it after the model")
        chosen = weights_of(unwrapped(model)) if names is None else list(names)
        if not chosen:
            raise DistcompError("the model has no linear layer or convolution to prune; name its parameters")
        self.pruned = put_masks(model, chosen, criterion.mask_for)
        self._set(criterion.begin(self.weights, self._key()))
        self._open()
        clock_of(model).listen(self)

    def __repr__(self) -> str:
        shares = "" if not self.pruned else f", {len(self.pruned)} parameters"
        return f"Pruner({self.criterion}, seed={self.seed}{shares})"

    # ------------------------------------------------------------------------------------ what there is now

    @property
    def masks(self) -> NamedTensors:
        """The masks by name (bool; do not write to them)."""
        return {name: pruned.mask for name, pruned in self.pruned.items()}

    @property
    def weights(self) -> NamedTensors:
        """The trained values by name, pruned ones included."""
        return {name: pruned.parameter.detach() for name, pruned in self.pruned.items()}

    @property
    def version(self) -> tuple[int, ...]:
        """Changes whenever a mask is written to, by whomever."""
        return tuple(pruned.mask._version for pruned in self.pruned.values())

    @property
    def sparsity(self) -> dict[str, float]:
        """The share of pruned weights of each parameter."""
        return {name: 1 - pruned.mask.float().mean().item() for name, pruned in self.pruned.items()}

    @property
    def density(self) -> float:
        """The share of weights that live, of all that may be pruned."""
        active = sum(int(pruned.mask.sum()) for pruned in self.pruned.values())
        return active / max(1, sum(pruned.mask.numel() for pruned in self.pruned.values()))

    def needs_dense(self, step: int, name: str) -> bool:
        """Whether the gradients of pruned weights of this parameter are exchanged in iteration ``step``."""
        return self.criterion.wants_dense and self.criterion.due(step, name)

    def snapshot(self) -> MaskSnapshot:
        """The masks as they are now, and whose gradients the coming iteration wants whole: what does not
        change any more."""
        dense = frozenset(
            pruned.wire_name for name, pruned in self.pruned.items() if self.needs_dense(self.step, name)
        )
        made_of = (self.version, dense)
        if self._snapshot is None or self._snapshot[0] != made_of:
            masks = {pruned.wire_name: pruned.mask.detach().cpu().clone() for pruned in self.pruned.values()}
            self._snapshot = (made_of, MaskSnapshot(masks, dense))
        return self._snapshot[1]

    def active_parameters(self, dense: bool = True) -> ActiveMasks:
        """What the masks keep, as a source of active parameters (:func:`distcomp.averaging.active_only`).

        It holds today's masks, and is handed newer ones where it is attached.

        ``dense``: all coordinates are active in steps in which the criterion wants their gradients.
        """
        return ActiveMasks(self.name, self.snapshot(), self.criterion.keeps_dense_grad, dense)

    # -------------------------------------------------------------------------------------------- the clock

    source = "parameters"

    def forward_begins(self) -> None:
        self.settle()

    def backward_ended(self) -> None:
        self._pending = True

    def before_step(self, optimizer: Optimizer) -> None:
        if optimizer is self._optimizer and self.criterion.wants_gradients and self._pending:
            for name, pruned in self.pruned.items():
                if self.criterion.due(self.step, name) and pruned.parameter.grad is not None:
                    self._gradients[name] = pruned.parameter.grad.detach().float().clone()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if optimizer is not self._optimizer:
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.criterion.after_step(self.step, self.pruned, rates)

    def settle(self) -> None:
        """Let the masks change that the last iteration left to be changed, if it did.

        Called by the next training forward; call it yourself, on every rank, before the model is evaluated
        or saved for the last time.
        """
        if not self._pending:
            return
        self._pending = False
        due = tuple(name for name in self.pruned if self.criterion.due(self.step, name))
        if due:
            self._change(due)
        self._gradients = {}
        self.step += 1
        self._open()

    def _open(self) -> None:
        """Let gradients of pruned weights through where the coming iteration wants them."""
        for name, pruned in self.pruned.items():
            pruned.parametrization.dense_grad = self.criterion.keeps_dense_grad or self.needs_dense(
                self.step, name
            )

    # ------------------------------------------------------------------------------------------- the change

    @torch.no_grad()
    def _change(self, due: tuple[str, ...]) -> None:
        weights = self._agreed(self.weights)
        gradients = self._agreed(self._full_gradients()) if self.criterion.wants_gradients else {}
        view = PruningContext(
            self.step, due, weights, self.masks, gradients, self._key("step", self.step), self.memory
        )
        self._set(self.criterion.decide(view), weights)
        self.history.append(Change(self.step, self.sparsity))
        self._verify()

    def _agreed(self, own: NamedTensors) -> NamedTensors:
        """The mean over ranks, where a rank has its own."""
        if self.consensus is None or self.consensus.replicated:
            return own
        mean = self.consensus.mean(torch.cat([values.float().reshape(-1) for values in own.values()]))
        pieces = torch.split(mean, [values.numel() for values in own.values()])
        return {name: piece.view_as(own[name]) for name, piece in zip(own, pieces, strict=True)}

    def _full_gradients(self) -> NamedTensors:
        return {
            name: self._gradients.get(name, torch.zeros_like(weight, dtype=torch.float32))
            for name, weight in self.weights.items()
        }

    def _set(self, masks: NamedTensors, agreed: NamedTensors | None = None) -> None:
        """Write new masks. What comes back begins at zero (or where all ranks agree it was), without
        momentum."""
        for name, mask in masks.items():
            pruned = self.pruned[name]
            grown = mask & ~pruned.mask
            if not torch.equal(mask, pruned.mask):
                pruned.mask.copy_(mask)
            if agreed is not None and grown.any():
                value = (
                    torch.zeros((), dtype=torch.float32) if self.criterion.restarts else agreed[name][grown]
                )
                pruned.parameter.data[grown] = value.to(pruned.parameter)
                self._forget(pruned.parameter, grown)

    def _forget(self, parameter: nn.Parameter, grown: Tensor) -> None:
        """Clear what the optimizer remembers of weights that begin anew."""
        if self._optimizer is None or not self.criterion.restarts:
            return
        for value in self._optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[grown] = 0

    def _verify(self) -> None:
        """Raise Mismatch unless every rank holds the same masks."""
        if self.consensus is None:
            return
        digests = self.consensus.numbers(digest(self.masks))
        odd = [rank for rank, number in enumerate(digests) if number != digests[0]]
        if odd:
            raise Mismatch(
                f"the masks of rank {odd[0]} differ from those of rank 0 after iteration {self.step}; start "
                "all ranks from the same weights and pruning settings, or from the same checkpoint"
            )

    def _key(self, *parts: int | str) -> Key:
        return Key.of(self.seed).fold("pruning", *parts)

    # ------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The step and what the criterion remembers. Masks are in the model's own ``state_dict()``.

        Tensors, numbers and text only. Call it on every rank: a change that is due happens first.
        """
        self.settle()
        return {
            "criterion": repr(self.criterion),
            "seed": self.seed,
            "step": self.step,
            "memory": {name: value.clone() for name, value in self.memory.items()},
            "history": [(change.step, dict(change.sparsity)) for change in self.history],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stopped, bit for bit; load the model's ``state_dict`` as well.

        Raises DistcompError where it was saved by another criterion.
        """
        if saved["criterion"] != repr(self.criterion):
            raise DistcompError(
                f"the checkpoint is of {saved['criterion']}, this pruner is {self.criterion}; use the same "
                "settings"
            )
        self._pending = False
        self.seed, self.step = int(saved["seed"]), int(saved["step"])
        self.memory = {name: value.clone() for name, value in saved["memory"].items()}
        self.history = [Change(int(step), dict(shares)) for step, shares in saved["history"]]
        self._open()

    def detach(self) -> None:
        """Stop pruning. The masks stay as they are; :func:`distcomp.pruning.materialize` takes them off."""
        clock_of(self._model).leave(self)


_NUMBERS = itertools.count()
_PRUNERS: WeakValueDictionary[str, Pruner] = WeakValueDictionary()


def pruner_named(name: str) -> Pruner:
    """The pruner of this process that goes by a name.

    Raises DistcompError where it is gone, or lives in another process.
    """
    if name not in _PRUNERS:
        raise DistcompError(
            f"a method sends what {name} keeps, which is not in this process; make the method here, with "
            "distcomp.masked(pruner, ...)"
        )
    return _PRUNERS[name]
