"""The cost of each exchange against all of its messages, written out one by one and added up link by link."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomp.network import Fabric, Rack
from distcomp.network.model import (
    ALONE,
    ExchangeLoad,
    Host,
    all_gather_load,
    all_to_all_load,
    broadcast_load,
    direct_all_reduce,
    neighbor_exchange,
    ring_all_reduce,
    together,
)

Message = tuple[int, int, float]

RATES = [1e7, 1e8, 1e9, math.inf]


@st.composite
def fabrics(draw: st.DrawFn, ranks: int = 6) -> Fabric:
    rates = tuple(draw(st.lists(st.sampled_from(RATES), min_size=ranks, max_size=ranks)))
    if draw(st.booleans()):
        return Fabric(rates, draw(st.sampled_from([0.0, 1e-3])))
    cut = draw(st.integers(1, ranks - 1))
    order = draw(st.permutations(range(ranks)))
    racks = tuple(
        Rack(tuple(sorted(part)), draw(st.sampled_from(RATES)), draw(st.sampled_from([0.0, 5e-3])))
        for part in (order[:cut], order[cut:])
    )
    return Fabric(rates, draw(st.sampled_from([0.0, 1e-3])), racks)


def busiest_s(messages: Iterable[Message], fabric: Fabric) -> float:
    """Every message adds its frames to each link of its way, and its acknowledgements to each link back."""
    charged: dict[tuple, float] = {}

    def charge(source: int, target: int, frames: float) -> None:
        here, there = fabric.rack_of(source), fabric.rack_of(target)
        way = [("out", source), ("in", target)] + ([("up", here), ("down", there)] if here != there else [])
        for link in way:
            charged[link] = charged.get(link, 0.0) + frames

    for source, target, nbytes in messages:
        charge(source, target, nbytes * 1514 / 1448)
        charge(target, source, nbytes * 66 / 1448 / 2)
    rate = {"out": fabric.rates_bps, "in": fabric.rates_bps}
    uplinks = [rack.uplink_bps for rack in fabric.racks]
    return max((8 * n / rate.get(kind, uplinks)[i] for (kind, i), n in charged.items()), default=0.0)


def apart_s(pairs: Iterable[tuple[int, int]], fabric: Fabric) -> float:
    return max(fabric.path_delay_s(i, j) for i, j in pairs)


def everyone(group: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(place of sender, place of receiver, sender, receiver)"""
    for a, i in enumerate(group):
        for b, j in enumerate(group):
            if i != j:
                yield a, b, i, j


groups = st.sets(st.integers(0, 5), min_size=2).map(lambda ranks: tuple(sorted(ranks)))
sizes = st.lists(st.integers(0, 10**6), min_size=6, max_size=6)


def agree(
    exchange: ExchangeLoad, fabric: Fabric, stages: list[list[Message]], hops: int, apart: float
) -> None:
    moved_s = sum(busiest_s(stage, fabric) for stage in stages)
    assert exchange.cost(fabric).seconds == pytest.approx(moved_s + hops * apart)


@given(fabric=fabrics(), group=groups, bytes_=sizes)
@settings(max_examples=80, deadline=None)
def test_every_exchange_is_the_sum_of_its_messages(fabric: Fabric, group: tuple, bytes_: list[int]) -> None:
    n, p = len(group), bytes_[: len(group)]
    all_pairs = list(everyone(group))
    apart = apart_s([(i, j) for _, _, i, j in all_pairs], fabric)
    gathered = [(i, j, p[a]) for a, _, i, j in all_pairs]
    swapped = [(i, j, p[b]) for _, b, i, j in all_pairs]
    agree(all_gather_load(p, group, fabric), fabric, [gathered], 1, apart)
    agree(all_to_all_load(p, group, fabric), fabric, [swapped], 1, apart)
    agree(
        direct_all_reduce(p[0], group, fabric), fabric, [[(i, j, p[0]) for _, _, i, j in all_pairs]], 1, apart
    )

    around = [(group[i], group[(i + 1) % n]) for i in range(n)]
    chunks = [(i, j, p[0] / n) for i, j in around]
    agree(
        ring_all_reduce(p[0], group, fabric),
        fabric,
        [chunks] * (2 * (n - 1)),
        2 * (n - 1),
        apart_s(around, fabric),
    )


@given(fabric=fabrics(), nbytes=st.integers(1, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_tree_doubles_those_who_know(fabric: Fabric, nbytes: int) -> None:
    down = [[(0, 1, nbytes)], [(0, 2, nbytes), (1, 3, nbytes)], [(0, 4, nbytes), (1, 5, nbytes)]]
    apart = apart_s([(i, j) for stage in down for i, j, _ in stage], fabric)
    group = tuple(range(6))
    agree(broadcast_load(nbytes, group, fabric), fabric, down, 3, apart)


@given(fabric=fabrics(), nbytes=st.integers(1, 10**6))
@settings(max_examples=40, deadline=None)
def test_neighbours_send_to_neighbours_only(fabric: Fabric, nbytes: int) -> None:
    edges = [(0, 1), (1, 2), (0, 5), (1, 4)]
    both = edges + [(j, i) for i, j in edges]
    exchange = neighbor_exchange(nbytes, edges, fabric)
    agree(exchange, fabric, [[(i, j, nbytes) for i, j in both]], 1, apart_s(both, fabric))
    assert exchange.messages == 3


@given(fabric=fabrics(), nbytes=st.integers(1, 10**6))
@settings(max_examples=40, deadline=None)
def test_groups_at_the_same_time_share_links(fabric: Fabric, nbytes: int) -> None:
    evens, odds = (0, 2, 4), (1, 3, 5)
    messages = [(i, j, nbytes) for group in (evens, odds) for _, _, i, j in everyone(group)]
    both = together([all_gather_load([nbytes] * 3, group, fabric) for group in (evens, odds)])
    assert both.cost(fabric).transfer_s == pytest.approx(busiest_s(messages, fabric))


def test_a_ring_of_4_at_100_mbit_by_hand() -> None:
    """1.5 times 16,793,600 bytes; 1514 + 66/2 bytes of frames for each 1448; 12.5 MB a second."""
    fabric = Fabric.uniform(4, "100mbit", "1ms")
    cost = ring_all_reduce(16_793_600, (0, 1, 2, 3), fabric).cost(fabric)
    assert cost.seconds == pytest.approx(1.5 * 16_793_600 * (1514 + 33) / 1448 / 12.5e6 + 6e-3)


def test_an_uplink_is_shared_by_all_who_cross_it() -> None:
    racks = (Rack((0, 1), 1e8), Rack((2, 3), 1e8))
    fabric = Fabric((1e9,) * 4, 0.0, racks)
    payload = [1e6] * 4
    crossing = 4 * 1e6 * (1514 + 33) / 1448 * 8 / 1e8  # 2 ranks to 2 ranks
    assert all_gather_load(payload, (0, 1, 2, 3), fabric).cost(fabric).transfer_s == pytest.approx(crossing)
    alone = ring_all_reduce(4e6, (0, 1, 2, 3), fabric).cost(fabric).transfer_s
    assert alone == pytest.approx(1.5 * 4e6 * (1514 + 33) / 1448 * 8 / 1e8)  # one edge of the ring crosses


def test_a_crowded_host_takes_longer() -> None:
    fabric, group = Fabric.uniform(4, "1gbit"), (0, 1, 2, 3)
    busy = Host(ranks=4, cores=2, message_s=1e-3, byte_s=1e-7)
    exchange = all_gather_load([1e6] * 4, group, fabric)
    assert exchange.cost(fabric, busy).latency_s == pytest.approx(3 * 1e-3 * 2)
    assert exchange.cost(fabric, busy).transfer_s == pytest.approx(3e6 * 1e-7 * 2)
    assert exchange.cost(fabric, ALONE).transfer_s < exchange.cost(fabric, busy).transfer_s


def test_one_rank_alone_sends_nothing() -> None:
    fabric = Fabric.uniform(3, "1mbit", "1s")
    alone = [
        ring_all_reduce(1e6, (1,), fabric), all_gather_load([1e6], (1,), fabric),
        broadcast_load(1e6, (1,), fabric), all_to_all_load([1e6], (1,), fabric),
        neighbor_exchange(1e6, [], fabric),
    ]  # fmt: skip
    assert {one.cost(fabric).seconds for one in alone} == {0.0}


def test_thousands_of_ranks_are_no_work() -> None:
    fabric, group = Fabric.uniform(4096, "25gbit", "50us"), tuple(range(4096))
    loads = all_gather_load([1e3] * 4096, group, fabric).stages[0]
    assert np.allclose(loads.out, 4095e3)
