"""A rank that was given up is taken in again: gossip with ``on_failure="continue"``.

It comes back between two exchanges. Whoever takes it in hands over the counts of steps and exchanges, so that
both speak of the same ones, its model, and what the method keeps replicas of. One that has no neighbour left
takes over the model of the first who opens an edge to it, for its own is as old as its absence; one that only
lost some of its edges goes on with its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.attaching.protocol import Sync
from distcomp.attaching.session import Session
from distcomp.attaching.weights import Weights
from distcomp.averaging.base import FragmentState
from distcomp.averaging.gossip import Gossip
from distcomp.transports.resilient_p2p import CutOff, Opened


@dataclass
class Rejoining:
    """Of the attached model ``weights``, whose steps ``sync`` counts. ``hands_over``: models are alike, and
    the one who comes back takes another's.

    On the wire, each way and for each edge that opens: the model, its buffers and what a replica is kept of
    (4 bytes for each number), which no ledger counts.
    """

    session: Session
    sync: Sync
    weights: Weights
    hands_over: bool = True

    def carry(self, fragment: FragmentState, exchange: Callable[[], None]) -> None:
        """Carry the exchange that is due, with those who are back.

        Raises PeerLost where this rank was given up and nobody takes it in.
        """
        while True:
            try:
                for edge in self.session.opened():
                    self._meet(fragment, edge, takes_over=False)
                exchange()
                return
            except CutOff as error:
                fragment.in_flight = None
                edge = self.session.come_back(error)
                self._meet(fragment, edge, takes_over=True)

    def _meet(self, fragment: FragmentState, edge: Opened, takes_over: bool) -> None:
        """Tell each other what an edge begins with."""
        averaging, neighbour = fragment.averaging, edge.neighbour
        assert isinstance(averaging, Gossip)
        mine = _Told.by(self, fragment, takes_over)
        wire = edge.swap(mine.wire)
        if wire is None:
            return
        theirs = mine.like(wire)
        if takes_over:
            self._take_over(fragment, theirs)
            warnings.warn(
                f"rank {self.session.rank} was given up by its neighbours and is taken in again by rank "
                f"{neighbour}: it goes on in step {self.sync.iterations}"
                + (f", with the model of rank {neighbour}" if self.hands_over else ""),
                stacklevel=2,
            )
        if averaging.replicas:
            begins_at_mine = theirs.takes_over and self.hands_over
            replica = mine.model if begins_at_mine else theirs.public
            fragment.state = averaging.with_replica(fragment.state, neighbour, replica, fragment.layout)

    def _take_over(self, fragment: FragmentState, theirs: _Told) -> None:
        averaging = fragment.averaging
        assert isinstance(averaging, Gossip)
        self.sync.iterations, fragment.last, fragment.exchanges = theirs.counts
        if not self.hands_over:
            return
        self.weights.write(self.weights.layout, theirs.model)
        self.weights.write_buffers(theirs.buffers)
        fragment.state = averaging.restart(theirs.model, fragment.state, fragment.context)


@dataclass
class _Told:
    """What one end of an edge tells the other."""

    takes_over: bool
    counts: tuple[int, int, int]
    """Iterations, the step of the last exchange, and exchanges."""
    model: Tensor
    buffers: Tensor
    public: Tensor

    @staticmethod
    def by(rejoining: Rejoining, fragment: FragmentState, takes_over: bool) -> _Told:
        averaging, weights = fragment.averaging, rejoining.weights
        assert isinstance(averaging, Gossip)
        nothing = torch.empty(0, dtype=torch.float32)
        hands_over, public = rejoining.hands_over, averaging.public(fragment.state)
        return _Told(
            takes_over,
            (rejoining.sync.iterations, fragment.last, fragment.exchanges),
            weights.read(weights.layout) if hands_over else nothing,
            weights.read_buffers() if hands_over else nothing,
            public.data if public is not None else nothing,
        )

    @property
    def wire(self) -> Tensor:
        counts = torch.tensor([self.takes_over, *self.counts], dtype=torch.int64)
        parts = (counts, self.model, self.buffers, self.public)
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])

    def like(self, wire: Tensor) -> _Told:
        """What the other end told, in as many bytes."""
        sizes = [32, *(4 * part.numel() for part in (self.model, self.buffers, self.public))]
        counts, *parts = (piece.clone() for piece in torch.split(wire, sizes))
        takes_over, *numbers = counts.view(torch.int64).tolist()
        model, buffers, public = (part.view(torch.float32) for part in parts)
        iterations, last, exchanges = numbers
        return _Told(bool(takes_over), (iterations, last, exchanges), model, buffers, public)
