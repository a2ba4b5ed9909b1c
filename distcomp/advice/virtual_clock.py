"""Virtual time: when would each worker be where, on a network that does not exist?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from distcomp.advice.scenario import Scenario
from distcomp.collectives import Request
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host
from distcomp.network.request_sizes import RequestSizes, request_groups, sizes_of, uneven


class VirtualClock:
    """``now_s[i]`` is worker i's time. Workers wait for those they receive from, and for nobody else.

    An exchange takes what :mod:`distcomp.network.model` says with the network to itself. What compressing
    takes is not on the clock.
    """

    def __init__(self, fabric: Fabric, scenario: Scenario, host: Host = ALONE) -> None:
        self.now_s = np.zeros(fabric.ranks)
        self.waited_s = np.zeros(fabric.ranks)
        """Of all its time, what each worker has spent in exchanges."""
        self._fabric, self._scenario, self._host = fabric, scenario, host
        self._seconds = lru_cache(maxsize=4096)(self._priced)

    def compute(self, step: int, share: float = 1.0) -> None:
        """Every worker computes: a step, or a ``share`` of one."""
        self.now_s += share * self._scenario.computing_s(step, len(self.now_s))

    def unheard(self) -> frozenset[int]:
        """Workers whose link is down now."""
        return frozenset(
            rank for rank, now_s in enumerate(self.now_s) if self._scenario.back_s(rank, now_s) > now_s
        )

    def exchange(self, requests: Sequence[Request | None]) -> None:
        """One request of every worker is carried."""
        asked: list[Any] = list(requests)
        before_s = self.now_s.copy()
        if asked[0].neighbors_only is not None:
            self._mix(asked)
        else:
            groups = request_groups(asked) or (tuple(range(len(asked))),)
            first = groups[0][0]
            everyone = asked if uneven(asked[first], first, len(asked)) else []
            ask = sizes_of(asked[first], len(asked), request_groups(asked), frozenset(), everyone)
            seconds = self._seconds(ask)
            ready_s = self._ready_s()
            for group in groups:
                members = list(group)
                self.now_s[members] = ready_s[members].max() + (seconds if len(group) > 1 else 0.0)
        self.waited_s += self.now_s - before_s

    def _mix(self, asked: list[Any]) -> None:
        edges = frozenset(
            (rank, other)
            for rank, request in enumerate(asked)
            for other in request.neighbors_only
            if rank < other
        )
        seconds = self._seconds(sizes_of(asked[0], len(asked), None, edges))
        talking = np.array([bool(request.neighbors_only) for request in asked])
        ready_s = np.where(talking, self._ready_s(), self.now_s)
        self.now_s = np.array(
            [
                max(ready_s[[rank, *request.neighbors_only]]) + (seconds if request.neighbors_only else 0.0)
                for rank, request in enumerate(asked)
            ]
        )

    def _ready_s(self) -> Any:
        back_s = self._scenario.back_s
        return np.array([back_s(rank, now_s) for rank, now_s in enumerate(self.now_s)])

    def _priced(self, ask: RequestSizes) -> float:
        return ask.exchange(self._fabric).cost(self._fabric, self._host).seconds
