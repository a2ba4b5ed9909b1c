"""A method's generator under way: its next request, its result, and whether all tensors were finite."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from distcomp.collectives import Request, Rounds
from distcomp.compressors.base import Compressor
from distcomp.grammar import Written
from distcomp.layout import Layout
from distcomp.methods.base import AggregateResult, Method, State, StepContext
from distcomp.runtime.channel import TRUE, Answer, finite_flag


class Aggregator(Protocol):
    """What exchanges a flat buffer: a Method, or an averaging of models."""

    @property
    def propagates_nonfinite(self) -> bool:
        """Whether a NaN or an infinity in ``x`` reaches the estimate by itself."""

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        """The exchange."""


class Aggregation:
    """One exchange of one flat buffer. ``ask`` gives the next request until ``result`` is there."""

    def __init__(self, method: Aggregator, x: Tensor, state: State, context: StepContext) -> None:
        self.watch = not method.propagates_nonfinite
        self._shown_by_sums = isinstance(method, Method) and method.sums_nonfinite
        self.before = state
        """The state that it began from: what is kept where a rank was not finite."""
        self._x = x
        self._method = method
        self._context = context
        self._rounds: Rounds[AggregateResult] | None = None
        self._result: AggregateResult | None = None
        self.finite: Tensor = TRUE
        """Whether this rank's tensor is finite, and those of all others as far as answers have announced."""

    @property
    def title(self) -> str:
        """The method's text, ``powersgd:rank=2``; of one put together by hand, what it is made of."""
        text = self._method.text if isinstance(self._method, Written) else None
        return text or _title(self._method)

    @property
    def layout(self) -> Layout:
        """Of the buffer that is exchanged."""
        return self._context.layout

    @property
    def step(self) -> int:
        """In which it takes place."""
        return self._context.step

    @property
    def result(self) -> AggregateResult | None:
        """The result; None while the exchange is under way."""
        return self._result

    def finished(self) -> AggregateResult:
        """The result. Only a caller that has carried the exchange to its end may ask for it."""
        if self._result is None:
            raise RuntimeError(f"the exchange of {self.title} is still under way; carry it to its end first")
        return self._result

    def ask(self, answer: Answer | None) -> Request | None:
        """Take in the answer to the last request; return the next one, or None when the exchange is over."""
        try:
            if self._rounds is None:
                if self.watch and not self._shown_by_sums:
                    # Before the method sees x: a mask, a clamp or a top-k may hide a NaN from the rest.
                    self.finite = finite_flag(self._x)
                self._rounds = self._method.aggregate(self._x, self.before, self._context)
                return next(self._rounds)
            if answer is None:
                raise RuntimeError(f"{self.title} was asked for its next request without the last answer")
            self.finite = self.finite & answer.finite
            return self._rounds.send(answer.value)
        except StopIteration as stop:
            self._result = self._poisoned(stop.value)
            return None

    def _poisoned(self, result: AggregateResult) -> AggregateResult:
        """A non-finite value anywhere becomes a non-finite estimate everywhere, so that every scaler
        sees it."""
        if not self.watch:
            return result
        estimate = result.estimate
        if estimate.device.type == "cpu":
            if not self.finite:
                estimate = torch.full_like(estimate, float("nan"))  # not in place: a state may hold it
        else:
            estimate = torch.where(self.finite, estimate, torch.full_like(estimate, float("nan")))
        return replace(result, estimate=estimate)


def _title(thing: object) -> str:
    parts = [getattr(thing, part.name) for part in fields(thing)] if is_dataclass(thing) else []
    inside = ", ".join(_title(part) for part in parts if isinstance(part, Method | Compressor))
    return f"{type(thing).__name__}({inside})" if inside else type(thing).__name__
