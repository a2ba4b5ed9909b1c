"""Neighbours whose messages cross no busy link work while the others wait: against ranks on shared cores, on
the clock."""

from __future__ import annotations

import pytest

from distcomp.advice.overlap import Timing, averaging_step
from distcomp.advice.profile import ProfiledExchange, ProfiledRound
from distcomp.network import Fabric, Rack
from distcomp.network.model import Host, neighbor_exchange
from distcomp.network.request_sizes import RequestSizes

N = 8
RING = frozenset((i, (i + 1) % N) for i in range(N))
TWO_RACKS = Fabric((1e8,) * N, 0.0, (Rack((0, 1, 2, 3), 5e7), Rack((4, 5, 6, 7), 5e7)))
NBYTES = 2e6


def on_the_clock(
    cores: int, core_s: float, message_s: dict[tuple[int, int], float], steps: int = 60
) -> float:
    """Seconds of a step of ranks in a ring: each works ``core_s`` of a core, as fast as all who work share
    them, sends to both neighbours, and goes on when both of theirs are there."""
    left_s, step, now_s = [core_s] * N, [0] * N, 0.0
    there_s: dict[tuple[int, int, int], float] = {}
    ends_s: list[float] = []

    def beside(rank: int) -> tuple[int, int]:
        return (rank - 1) % N, (rank + 1) % N

    def begins_s(rank: int) -> float | None:
        """When a rank that has worked may go on; None where that is not known yet."""
        known = [there_s.get((other, rank, step[rank])) for other in beside(rank)]
        return None if None in known else max(at for at in known if at is not None)

    while len(ends_s) < steps:
        busy = [rank for rank in range(N) if left_s[rank] > 0]
        pace = min(1.0, cores / max(1, len(busy)))
        waiting = [begins_s(rank) for rank in range(N) if left_s[rank] == 0]
        passed_s = min(
            [left_s[rank] / pace for rank in busy] + [at - now_s for at in waiting if at is not None]
        )
        now_s += max(0.0, passed_s)
        for rank in busy:
            left_s[rank] -= pace * passed_s
            if left_s[rank] <= 1e-12:
                left_s[rank] = 0.0
                for other in beside(rank):
                    link_free_s = there_s.get((rank, other, step[rank] - 1), 0.0)
                    there_s[rank, other, step[rank]] = max(now_s, link_free_s) + message_s[rank, other]
        for rank in range(N):
            at = begins_s(rank) if left_s[rank] == 0 else None
            if at is not None and at <= now_s + 1e-12:
                left_s[rank], step[rank] = core_s, step[rank] + 1
                ends_s += [now_s] if rank == 0 else []
    return (ends_s[-1] - ends_s[steps // 3]) / (steps - 1 - steps // 3)


@pytest.mark.parametrize("core_s", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("cores", [2, 4, 8])
@pytest.mark.parametrize("fabric", [TWO_RACKS, Fabric.uniform(N, "100mbit")], ids=["two racks", "uniform"])
def test_who_has_slack_works_while_the_others_wait(fabric: Fabric, cores: int, core_s: float) -> None:
    profile = ProfiledExchange(
        (ProfiledRound(0.0, RequestSizes("neighbor_exchange", (NBYTES,), edges=RING)),), 0.0
    )
    exchange = neighbor_exchange(NBYTES, RING, fabric)
    slow_s = exchange.cost(fabric).seconds
    racked = bool(fabric.racks)
    message_s = {
        (i, j): slow_s if not racked or {i, j} in ({3, 4}, {7, 0}) else slow_s - exchange.slack_s
        for a, b in RING
        for i, j in ((a, b), (b, a))
    }
    step_s = core_s * N / cores
    predicted = averaging_step(Timing((step_s,), step_s), [profile], fabric, Host(N, cores))
    assert predicted.step_s == pytest.approx(on_the_clock(cores, core_s, message_s), rel=0.02)


def test_the_slack_is_that_between_the_busiest_link_and_the_next_one_that_others_wait_for() -> None:
    """Two messages each way through an uplink of half a rank's rate; a rank sends and receives two."""
    exchange = neighbor_exchange(NBYTES, RING, TWO_RACKS)
    alike = Fabric.uniform(N, 1e8)
    rank_s = neighbor_exchange(NBYTES, RING, alike).cost(alike).seconds
    assert exchange.held_up == 0.5  # ranks 0, 3, 4 and 7
    assert exchange.cost(TWO_RACKS).seconds == pytest.approx(2 * rank_s)
    assert exchange.slack_s == pytest.approx(rank_s)


def test_one_slow_rank_holds_up_itself_and_its_neighbours() -> None:
    exchange = neighbor_exchange(NBYTES, RING, Fabric((1e7, *(1e8,) * (N - 1)), 0.0))
    assert exchange.held_up == 3 / N


def test_where_all_links_are_alike_nobody_has_slack() -> None:
    exchange = neighbor_exchange(NBYTES, RING, Fabric.uniform(N, 1e8))
    assert (exchange.held_up, exchange.slack_s) == (1.0, 0.0)
