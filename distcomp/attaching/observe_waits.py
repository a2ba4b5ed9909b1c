"""A step that waits for other ranks: how long is each exchange, where the network is not the limit?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from distcomp.attaching.observe import WARM_UP
from distcomp.errors import DistcompError
from distcomp.network.request_sizes import RequestSizes
from distcomp.runtime.channel import CarriedRequest, watch_requests


@dataclass(frozen=True)
class Wait:
    """An exchange that computing waits for. ``after_s``: of computing, since the wait before it; ``took_s``:
    on a network without limits, of the rank that came last; 0 where nobody measured it."""

    ask: RequestSizes
    after_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True)
class WaitingStep:
    """A step on a network without limits, and what it waited for in order."""

    step_s: float
    waits: tuple[Wait, ...]
    wake_s: float = 0.0
    """What computing loses after a wait that a network makes longer: by then the core has gone idle, and its
    caches are somebody else's. Told by a step with delays (:meth:`delayed`); 0 where nobody measured it."""

    def delayed(self, step_s: float, delay_s: float) -> WaitingStep:
        """With ``wake_s`` from the same step, which took ``step_s`` on a network that delays all messages."""
        waited_s = len(self.waits) * delay_s
        wake_s = (step_s - waited_s - self.step_s) / len(self.waits) if self.waits else 0.0
        return replace(self, wake_s=max(0.0, wake_s))

    @property
    def least_s(self) -> float:
        """What an exchange takes however small."""
        return min((wait.took_s for wait in self.waits), default=0.0)


@dataclass(frozen=True)
class OneStep:
    """As one rank saw it: when it began and was over, and what it was waiting for."""

    begin_s: float
    end_s: float
    carried: tuple[CarriedRequest, ...]


def observe_waits(step: Callable[[], object], repeats: int = 11) -> WaitingStep:
    """All ranks at once, on a network that is not the limit: medians over ``repeats`` of ``step``, which
    begins together on all ranks.

    Raises DistcompError where not all ranks and steps ask as often.
    """
    mine = [_one_step(step) for _ in range(WARM_UP + repeats)][WARM_UP:]
    everyone: list[list[OneStep]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    by_step = list(zip(*everyone, strict=True))
    asked = {len(one.carried) for ranks in by_step for one in ranks}
    if len(asked) != 1:
        raise DistcompError(
            f"between {min(asked)} and {max(asked)} exchanges were seen in a step; let all ranks make the "
            "same ones in every step"
        )
    step_s = statistics.median(max(one.end_s - one.begin_s for one in ranks) for ranks in by_step)
    return WaitingStep(step_s, tuple(_wait(by_step, place) for place in range(asked.pop())))


def _one_step(step: Callable[[], object]) -> OneStep:
    dist.barrier()
    with watch_requests() as seen:
        begin_s = time.perf_counter()
        step()
        dist.barrier()
        end_s = time.perf_counter()
    return OneStep(begin_s, end_s, tuple(sorted(seen, key=lambda one: one.started_s)))


def _wait(by_step: Sequence[Sequence[OneStep]], place: int) -> Wait:
    """Of the exchange at this place in each step."""
    took_s, after_s = [], []
    for ranks in by_step:
        of_ranks = [one.carried[place] for one in ranks]
        took_s.append(min(one.finished_s - one.started_s for one in of_ranks))
        before_s = [one.carried[place - 1].finished_s if place else one.begin_s for one in ranks]
        after_s.append(max(0.0, min(o.started_s - b for o, b in zip(of_ranks, before_s, strict=True))))
    asks = [_ask([one.carried[place] for one in ranks]) for ranks in by_step]
    return Wait(_middle(asks), statistics.median(after_s), statistics.median(took_s))


def _ask(of_ranks: Sequence[CarriedRequest]) -> RequestSizes:
    """What all ranks asked of each other."""
    messages = tuple(
        (rank, to, float(nbytes)) for rank, one in enumerate(of_ranks) for to, nbytes in one.messages
    )
    traffic = of_ranks[0].traffic
    return RequestSizes(traffic.pattern, traffic.sizes, chunked=traffic.chunked, messages=messages)


def _middle(asks: Sequence[RequestSizes]) -> RequestSizes:
    """That of the step in which as many bytes were sent as in the middle one."""
    return sorted(asks, key=lambda ask: ask.sent_bytes(2))[len(asks) // 2]
