"""A method's generator under way: what it asks next, what it came to, and whether every rank's tensor was
finite."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from distcomp.compressors.base import Compressor
from distcomp.exchange import Request, Talk
from distcomp.methods.base import Method, Outcome, State, Turn
from distcomp.transports.base import TRUE, Answer, finite_flag


class Talker(Protocol):
    """Whoever converses about a slab: a Method, or an averaging of models."""

    @property
    def transparent(self) -> bool:
        """Whether a NaN or an infinity in ``x`` reaches the estimate by itself."""

    def talk(self, x: Tensor, state: State, turn: Turn) -> Talk[Outcome]:
        """The conversation."""


class Conversation:
    """One talk about one slab. ``ask`` gives the next request until ``outcome`` is there."""

    def __init__(self, method: Talker, x: Tensor, state: State, turn: Turn) -> None:
        self.watch = not method.transparent
        self._x = x
        self._method = method
        self._state = state
        self._turn = turn
        self._talk: Talk[Outcome] | None = None
        self._outcome: Outcome | None = None
        self.finite: Tensor = TRUE
        """Of this rank and of all others, as far as the exchanges so far have told."""

    @property
    def title(self) -> str:
        """The method and what it is made of, without its settings: ``ErrorFeedback(PowerSGD)``."""
        return _title(self._method)

    @property
    def outcome(self) -> Outcome | None:
        return self._outcome

    def ask(self, answer: Answer | None) -> Request | None:
        """Take in the answer to the last request; return the next one, or None when the talk is over."""
        try:
            if self._talk is None:
                if self.watch:
                    self.finite = finite_flag(self._x)
                self._talk = self._method.talk(self._x, self._state, self._turn)
                return next(self._talk)
            assert answer is not None
            self.finite = self.finite & answer.finite
            return self._talk.send(answer.value)
        except StopIteration as stop:
            self._outcome = self._poisoned(stop.value)
            return None

    def _poisoned(self, outcome: Outcome) -> Outcome:
        """A non-finite value anywhere becomes a non-finite estimate everywhere, so that every scaler
        sees it."""
        if not self.watch:
            return outcome
        estimate = outcome.estimate
        if estimate.device.type == "cpu":
            if not self.finite:
                estimate = estimate.fill_(float("nan"))
        else:
            estimate = torch.where(self.finite, estimate, torch.full_like(estimate, float("nan")))
        return replace(outcome, estimate=estimate)


def _title(thing: object) -> str:
    parts = [getattr(thing, part.name) for part in fields(thing)] if is_dataclass(thing) else []
    inside = ", ".join(_title(part) for part in parts if isinstance(part, Method | Compressor))
    return f"{type(thing).__name__}({inside})" if inside else type(thing).__name__
