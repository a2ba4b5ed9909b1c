"""Who sends to whom, where nobody need answer: directed graphs and their column-stochastic weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError

Targets = tuple[tuple[int, ...], ...]
"""By rank: whom it sends to."""


@dataclass(frozen=True)
class Digraph:
    """The targets of each rank, in ``rounds`` that alternate, one per exchange.

    A rank keeps as large a share as it sends to each target: ``P_ji = 1 / (1 + out-degree of i)``, to itself
    and to each target *j*. The columns of P sum to 1; its rows need not.

    Raises DistcompError for edges to oneself or to no rank, and for a graph that is not strongly connected
    over its rounds.
    """

    name: str
    rounds: tuple[Targets, ...]

    def __post_init__(self) -> None:
        for targets in self.rounds:
            for rank, others in enumerate(targets):
                if (
                    rank in others
                    or len(set(others)) < len(others)
                    or not set(others) <= set(range(self.size))
                ):
                    raise DistcompError(
                        f"rank {rank} of {self.name} sends to {others}; name other ranks of 0 to "
                        f"{self.size - 1}, each once"
                    )
        if not self._strongly_connected():
            raise DistcompError(
                f"in {self.name} not everybody's word reaches everybody; add edges until it does"
            )

    @staticmethod
    def of(size: int, edges: Iterable[tuple[int, int]]) -> Digraph:
        """One round, from pairs of a sender and its target."""
        targets: list[list[int]] = [[] for _ in range(size)]
        for source, target in edges:
            if not 0 <= source < size:
                raise DistcompError(
                    f"({source}, {target}) begins at none of {size} ranks; number them from 0"
                )
            targets[source].append(target)
        return Digraph("graph", (tuple(tuple(sorted(others)) for others in targets),))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.rounds[0])

    def targets(self, rank: int, step: int) -> tuple[int, ...]:
        """Whom a rank sends to in the exchange number ``step``."""
        return self.rounds[step % len(self.rounds)][rank]

    def sources(self, rank: int, step: int) -> tuple[int, ...]:
        """Who sends to it, in rank order."""
        return _sources(self.rounds[step % len(self.rounds)])[rank]

    def matrix(self, step: int) -> NDArray[np.float64]:
        """``P``: float64 ``[size, size]``, of the exchange number ``step``."""
        weights = np.zeros((self.size, self.size))
        for rank in range(self.size):
            others = self.targets(rank, step)
            weights[[rank, *others], rank] = 1 / (1 + len(others))
        return weights

    def _strongly_connected(self) -> bool:
        ahead = [{j for targets in self.rounds for j in targets[i]} for i in range(self.size)]
        behind: list[set[int]] = [set() for _ in range(self.size)]
        for source, others in enumerate(ahead):
            for target in others:
                behind[target].add(source)
        return all(_reached(edges) == self.size for edges in (ahead, behind))


def _reached(edges: list[set[int]]) -> int:
    """How many ranks rank 0 reaches."""
    seen, frontier = {0}, [0]
    while frontier:
        new = edges[frontier.pop()] - seen
        seen |= new
        frontier += new
    return len(seen)


@lru_cache(maxsize=256)
def _sources(targets: Targets) -> Targets:
    senders: list[list[int]] = [[] for _ in targets]
    for source, others in enumerate(targets):
        for target in others:
            senders[target].append(source)
    return tuple(map(tuple, senders))


def _hops(size: int, hops: Iterable[int]) -> Targets:
    return tuple(tuple(sorted({(rank + hop) % size for hop in hops} - {rank})) for rank in range(size))


def directed_ring(size: int) -> Digraph:
    """Everybody sends to the next one."""
    return Digraph("directed_ring", (_hops(size, [1]),))


def directed_exponential(size: int) -> Digraph:
    """One target per exchange, 1, 2, 4, ... places ahead in turn, below ``size``.

    Source: Assran et al., ICML 2019: what is 1, 2, ..., 2^floor(log2(n-1)) hops away, one at a time.
    """
    turns = math.floor(math.log2(size - 1)) + 1 if size > 1 else 1
    return Digraph("directed_exponential", tuple(_hops(size, [1 << turn]) for turn in range(turns)))


def directed_exponential_all(size: int) -> Digraph:
    """All of these targets in every exchange."""
    hops = {hop for turn in directed_exponential(size).rounds for hop in turn[0]}
    return Digraph("directed_exponential_all", (_hops(size, hops),))


DIGRAPHS: dict[str, Callable[[int], Digraph]] = {
    "directed_exponential": directed_exponential,
    "directed_exponential_all": directed_exponential_all,
    "directed_ring": directed_ring,
}


def check_digraph(name: str) -> None:
    """Raise DistcompError unless there is a directed graph of that name."""
    if name not in DIGRAPHS:
        known = ", ".join(DIGRAPHS)
        raise DistcompError(f"there is no directed graph {name[:80]!r}; use one of {known}, or a Digraph")


@lru_cache
def resolve_digraph(given: str | Digraph, size: int) -> Digraph:
    """The directed graph that a setting means for ``size`` ranks.

    Raises DistcompError for one of another size.
    """
    made = DIGRAPHS[given](size) if isinstance(given, str) else given
    if made.size != size:
        raise DistcompError(f"{made.name} is for {made.size} ranks and there are {size}; make one for {size}")
    return made
