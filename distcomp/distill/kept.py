"""How much of what is trained is kept? What is dropped at the end is sent in training, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from distcomp.distill.taps import HEADS
from distcomp.pruning.masks import unwrapped


@runtime_checkable
class TrainsMore(Protocol):
    """A module that trains more than is kept of it: :class:`MutualLearners`, :class:`OnTheFlyEnsemble`,
    :class:`KDGAN` and :class:`TeacherAndApprentice`, and yours with a method ``kept_after_training()``."""

    def kept_after_training(self) -> Sequence[nn.Module]:
        """The parts that are there after training."""
        ...


@dataclass(frozen=True)
class TrainingSummary:
    """Parameters that are ``trained``, all of which a gradient method sends, and those that are ``kept``."""

    trained: int
    kept: int

    @property
    def factor(self) -> float:
        """How many are trained, and sent, for each one that is kept."""
        return self.trained / self.kept if self.kept else 1.0

    def __str__(self) -> str:
        return (
            f"{self.trained:,} parameters are trained and {self.kept:,} kept: a gradient method sends "
            f"{self.factor:.2f} times what training the kept ones alone would"
        )


def summary(model: nn.Module) -> TrainingSummary:
    """What is trained of ``model``, and what is kept: networks that teach each other, or a student with heads
    on. Wrapped or plain; of any other model all is kept. Parameters that are frozen count for nothing."""
    inner = unwrapped(model)
    trained = _count([inner])
    if isinstance(inner, TrainsMore):
        return TrainingSummary(trained, _count(inner.kept_after_training()))
    heads = getattr(inner, HEADS, None)
    return TrainingSummary(trained, trained - (_count([heads]) if heads is not None else 0))


def _count(modules: Sequence[nn.Module]) -> int:
    """Parameters that are trained, each once."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return sum(p.numel() for p in parameters.values())
