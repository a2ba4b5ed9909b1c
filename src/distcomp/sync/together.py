"""Many workers in one process, averaging in lock-step: the same algorithms without sockets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distcomp.layout import Layout
from distcomp.methods.base import Outcome
from distcomp.sync.averaging import Averaging, Landing, Levels, gather, scatter, tracks_of
from distcomp.transports.lockstep import Lockstep


class Workers:
    """``size`` workers that start from one model and average it as ``averaging`` says.

    Call :meth:`step` after every worker has updated its model. ``net.ledgers`` counts what each has sent.
    """

    def __init__(
        self, averaging: Averaging | Levels, x: Tensor, size: int, layout: Layout | None = None, seed: int = 0
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
        self.tracks = [tracks_of(averaging, self.layout, rank, size) for rank in range(size)]
        for tracks, model in zip(self.tracks, self.models, strict=True):
            for track in tracks:
                track.start(gather(self._views(model), track.layout))

    def step(self) -> None:
        """One iteration is over: exchange what is due."""
        self.steps += 1
        for number in range(len(self.tracks[0])):
            self._land(number)
            self._talk(number)

    def _talk(self, number: int) -> None:
        tracks = [tracks[number] for tracks in self.tracks]
        if not tracks[0].due(self.steps):
            return
        talks = [
            track.talk(gather(self._views(model), track.layout), self.steps, self.seed, self._missed(rank))
            for rank, (track, model) in enumerate(zip(tracks, self.models, strict=True))
        ]
        self.net.run(talks)
        for track, talk in zip(tracks, talks, strict=True):
            track.landing = Landing(self.steps + track.averaging.overlap, _known(talk.outcome))
        self._land(number)

    def _land(self, number: int) -> None:
        for tracks, model in zip(self.tracks, self.models, strict=True):
            track, views = tracks[number], self._views(model)
            if track.landing is not None and track.landing.at <= self.steps:
                scatter(views, track.layout, track.land(track.landing.outcome(), gather(views, track.layout)))

    def _missed(self, rank: int) -> frozenset[int]:
        return self.absent.get(rank, frozenset())

    def _views(self, model: Tensor) -> dict[str, Tensor]:
        return {segment.name: piece for segment, piece in self.layout.pieces(model)}

    @property
    def mean(self) -> Tensor:
        """The average of all workers' models."""
        return self.stacked.mean(0)

    @property
    def spread(self) -> float:
        """The mean squared distance of a worker's model from the average."""
        return float((self.stacked - self.mean).square().mean())


def _known(outcome: Outcome | None) -> Callable[[], Outcome]:
    assert outcome is not None
    return lambda: outcome
