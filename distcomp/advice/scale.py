"""A method among any number of ranks: profiled where that is quick, extended from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from distcomp.advice.predict import PREDICTED_HOOKS, ProfiledMethod, SharedCost, profile_method
from distcomp.advice.profile import ProfiledExchange, ProfiledRound
from distcomp.advice.sharded import profile_sharded
from distcomp.attaching.observe_shards import ObservedShardedSteps
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.topology import resolve
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods import parse
from distcomp.network.model import Edge

MOST_IN_A_CLIQUE = 64
"""Ranks that all exchange with one another: their number of edges grows with its square."""
PROFILED, FEW, MANY, GROWN = 8, 16, 32, 1.25
"""Up to so many ranks a method is profiled among just as many; beyond, it is extended from two sizes."""


class Rehearsals:
    """A method's exchanges about these buckets.

    Beyond 8 ranks arithmetic is extended on a line through 16 and 32 (a gather decodes n payloads, a chunk's
    owner n chunks), and requests by :meth:`distcomp.network.request_sizes.RequestSizes.among`.
    """

    def __init__(self, method: str, layouts: Sequence[Layout], shared: SharedCost | None = None) -> None:
        self.method = method
        self._layouts = layouts
        self._at = lru_cache(maxsize=None)(lambda ranks: profile_method(method, layouts, ranks, shared))

    def edges(self, ranks: int) -> frozenset[Edge]:
        """Who talks to whom, where only neighbours do."""
        return _edges(self.method, ranks)

    def among(self, ranks: int) -> ProfiledMethod:
        """As if it had been profiled among so many."""
        if ranks <= PROFILED:
            return self._at(ranks)
        few, many = self._at(FEW), self._at(MANY)
        edges = self.edges(ranks)
        profiles = (_extended(a, b, ranks, edges) for a, b in zip(few.profiles, many.profiles, strict=True))
        return replace(many, ranks=ranks, profiles=tuple(profiles))


class ShardedRehearsals(Rehearsals):
    """A setting's exchanges of a sharded model, over all ranks or, with ``shards``, over so many of them.

    Shards get smaller with more ranks, and what a rank decodes stays a whole model.
    """

    def __init__(self, setting: str, observed: ObservedShardedSteps, shards: int | None = None) -> None:
        self.method = setting
        self._shards = shards
        self._at = lru_cache(maxsize=None)(
            lambda ranks: profile_sharded(setting, observed, ranks, shards or ranks)
        )

    def edges(self, ranks: int) -> frozenset[Edge]:
        return frozenset()

    def among(self, ranks: int) -> ProfiledMethod:
        if self._shards is not None:
            return self._at(ranks)
        return replace(super().among(ranks), shards=ranks)


def _extended(
    few: ProfiledExchange, many: ProfiledExchange, ranks: int, edges: frozenset[Edge]
) -> ProfiledExchange:
    same = [round_.ask.kind for round_ in few.rounds] == [round_.ask.kind for round_ in many.rounds]
    earlier = few if same else many

    def work_s(at_few: float, at_many: float) -> float:
        grown = at_many > GROWN * at_few  # less is noise: an all-reduce thinks as long among any number
        slope = (at_many - at_few) / (MANY - FEW) if grown else 0.0
        return at_many + slope * (ranks - MANY)

    rounds = tuple(
        ProfiledRound(work_s(a.work_s, b.work_s), b.ask.among(ranks, edges), b.leads)
        for a, b in zip(earlier.rounds, many.rounds, strict=True)
    )
    return ProfiledExchange(rounds, work_s(earlier.last_s, many.last_s), many.share)


def _edges(method: str, ranks: int) -> frozenset[Edge]:
    parsed = None if method in PREDICTED_HOOKS else parse(method)
    if not isinstance(parsed, Gossip):
        return frozenset()
    if parsed.topology == "ring":  # a matrix of thousands of ranks is no way to find their neighbours
        return frozenset((i, (i + 1) % ranks) for i in range(ranks))
    if parsed.topology == "complete" and ranks > MOST_IN_A_CLIQUE:
        raise DistcompError(
            f"{method} lets each of {ranks} ranks talk to every other, which is not predicted beyond "
            f"{MOST_IN_A_CLIQUE}; use a topology of few neighbours, such as exponential"
        )
    return resolve(parsed.topology, ranks).edges
