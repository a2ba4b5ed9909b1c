"""Many workers in one process, averaging in lock-step: the same algorithms without sockets."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from distcomp.averaging.base import Averaging, InFlight, MultiLevel, fragment_states, gather, known, scatter
from distcomp.layout import Layout
from distcomp.methods.base import StepContext
from distcomp.methods.scheduled import EXACT
from distcomp.randomness import Key
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.driver import in_lock_step
from distcomp.runtime.lockstep import Lockstep


class Workers:
    """``size`` workers that start from one model and average it as ``averaging`` says.

    Call :meth:`step` after every worker has updated its model. ``net.ledgers`` counts what each has sent.
    """

    def __init__(
        self,
        averaging: Averaging | MultiLevel,
        x: Tensor,
        size: int,
        layout: Layout | None = None,
        seed: int = 0,
    ) -> None:
        self.layout = layout or Layout.of([("x", (1, x.numel()))])
        self.seed = seed
        self.steps = 0
        self.net = Lockstep(size)
        self.stacked = x.repeat(size, 1)
        """Row i is worker i's model (float32, ``[size, layout.numel]``); update them in place."""
        self.models = list(self.stacked.unbind())
        self.absent: dict[int, frozenset[int]] = {}
        """Whom a worker cannot reach in the next exchange, where its averaging goes on without them."""
        self.moments: dict[str, Tensor] = {}
        """The optimizers' state by its name, a row per worker as in ``stacked``; averaged in place where the
        averaging asks for it."""
        self._averaging = averaging
        self.fragments = [fragment_states(averaging, self.layout, rank, size) for rank in range(size)]
        for fragments, model in zip(self.fragments, self.models, strict=True):
            for fragment in fragments:
                fragment.start(gather(self._views(model), fragment.layout))

    def step(self) -> None:
        """One iteration is over: exchange what is due."""
        self.steps += 1
        for number in range(len(self.fragments[0])):
            self._apply(number)  # first what has arrived: an exchange must begin from the model with it
            self._exchange(number)
        self._average_moments()

    def _exchange(self, number: int) -> None:
        fragments = [fragments[number] for fragments in self.fragments]
        if not fragments[0].due(self.steps):
            return
        aggregations = [
            fragment.aggregate(
                gather(self._views(model), fragment.layout), self.steps, self.seed, self._missed(rank)
            )
            for rank, (fragment, model) in enumerate(zip(fragments, self.models, strict=True))
        ]
        for fragment, model in zip(fragments, self.models, strict=True):
            departed = fragment.departed()
            if departed is not None:
                scatter(self._views(model), fragment.layout, departed)
        for fragment, result in zip(fragments, in_lock_step(self.net, aggregations), strict=True):
            fragment.in_flight = InFlight(self.steps + fragment.averaging.overlap, known(result))
        self._apply(number)

    def _apply(self, number: int) -> None:
        for fragments, model in zip(self.fragments, self.models, strict=True):
            fragment, views = fragments[number], self._views(model)
            if fragment.in_flight is not None and fragment.in_flight.at <= self.steps:
                scatter(
                    views,
                    fragment.layout,
                    fragment.apply_result(
                        fragment.in_flight.result(), partial(gather, views, fragment.layout)
                    ),
                )

    def _average_moments(self) -> None:
        whole, size = Layout.of([("moment", (self.layout.numel,))]), len(self.models)
        for level in self._averaging.levels():
            for name, every in level.moment_periods.items():
                if name not in self.moments or self.steps % every:
                    continue
                rows = self.moments[name].unbind()
                key = Key.of(self.seed, self.steps)
                aggregations = [
                    Aggregation(EXACT, row, {}, StepContext(rank, size, whole, self.steps, key))
                    for rank, row in enumerate(rows)
                ]
                for row, result in zip(rows, in_lock_step(self.net, aggregations), strict=True):
                    row.copy_(result.estimate)

    def _missed(self, rank: int) -> frozenset[int]:
        return self.absent.get(rank, frozenset())

    def _views(self, model: Tensor) -> dict[str, Tensor]:
        return {param.name: piece for param, piece in self.layout.pieces(model)}

    @property
    def mean(self) -> Tensor:
        """The average of all workers' models."""
        return self.stacked.mean(0)

    @property
    def spread(self) -> float:
        """The mean squared distance of a worker's model from the average."""
        return float((self.stacked - self.mean).square().mean())
