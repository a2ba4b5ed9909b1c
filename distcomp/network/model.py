"""How long will an exchange take on a :class:`Fabric`? Pure functions: bytes in, seconds out.

A fluid model. Everything that an exchange sends is under way at once; every link, each way, carries what
crosses it at its own rate; the exchange is over when the busiest link is::

    transfer_s = max over links of  8 bytes / rate        links: out of and into each rank, and each rack
    latency_s  = hops * delay + messages * message        of the pair that is farthest apart

``bytes`` are what Ethernet is charged: payload, headers, and the acknowledgements of what comes back
(:mod:`distcomp.network.framing`). ``message`` is the host's work to send and receive one,
``Host.message_s``, of which a rank has so many one behind the other.

============================  =====================================  ============  ========  ================
exchange                      bytes sent per rank, payload P         hops          messages  of
============================  =====================================  ============  ========  ================
:func:`ring_all_reduce`       2 (n-1)/n P                            2 (n-1)       2 (n-1)   a huge sum
:func:`piecewise_all_reduce`  2 (n-1)/n P                            2             2 (n-1)   a sum
:func:`direct_all_reduce`     (n-1) P                                1             n-1       a small sum
:func:`ring_all_gather`       (n-1) P                                n-1           n-1       shards to all
:func:`all_gather`            (n-1) P                                1             n-1       payloads to all
:func:`all_to_all`            (n-1)/n P                              1             n-1       chunks to owners
:func:`neighbor_exchange`     degree P                               1             degree    neighbours
:func:`uneven_all_to_all`     what each sends to each                1             the most  uneven parts
:func:`broadcast`             P at the source, (n-1)/n P on average  ceil(log2 n)  as hops   one to all
============================  =====================================  ============  ========  ================

Assumed: TCP shares links without loss and without waste; a rank sends and receives at once; ranks of a rack
share nothing but its uplink; there is no other traffic. Where ranks share a machine, its cores carry the
bytes, too (``Host.byte_s``), and computing takes longer (``Host.oversubscription``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from distcomp.collectives import Group
from distcomp.network.fabric import Fabric
from distcomp.network.framing import acknowledged_bytes, framed_bytes

LinkBytes = NDArray[np.float64]
Edge = tuple[int, int]


@dataclass(frozen=True)
class Overhead:
    """What exchanges really took, against the bytes that a rank sends in one: ``late_s`` per hop beyond the
    fluid model (flows that share a link unfairly, timers, threads that wake up late), and ``core_s`` of a
    core. On a line between two sizes, below the smallest as there."""

    nbytes: tuple[float, ...]
    late_s: tuple[float, ...]
    core_s: tuple[float, ...]

    def hop_s(self, nbytes: float) -> float:
        """Of a hop, too late; above the largest size as there."""
        return float(np.interp(nbytes, self.nbytes, self.late_s))

    def carried_s(self, nbytes: float) -> float:
        """Of a core; above the largest size in proportion to it."""
        beyond = max(1.0, nbytes / self.nbytes[-1])
        return beyond * float(np.interp(nbytes, self.nbytes, self.core_s))


@dataclass(frozen=True)
class Host:
    """What ranks that share a machine share: ``cores`` for all ``ranks`` on it.

    Of a core: ``exchange_s`` to begin and end an exchange, ``message_s`` and ``byte_s`` to send and receive a
    message, and a byte of it. ``direct`` and ``around``, where :mod:`distcomp.advice.calibrate` measured
    them, are what direct exchanges and rings really took, and stand for all three.
    """

    ranks: int = 1
    cores: int = 1
    message_s: float = 0.0
    byte_s: float = 0.0
    direct: Overhead | None = None
    around: Overhead | None = None
    exchange_s: float = 0.0

    @property
    def oversubscription(self) -> float:
        """How many times longer computing takes than on a core of one's own, with everybody computing."""
        return max(1.0, self.ranks / self.cores)

    @property
    def shared(self) -> bool:
        """Whether a rank has less than a core for each of its two threads that compute."""
        return self.ranks > 1 and 2 * self.ranks > self.cores


ALONE = Host()
"""A machine per rank, to which messages are no work."""


@dataclass(frozen=True, eq=False)
class Load:
    """Bytes that cross each link: out of and into each rank, out of and into each rack."""

    out: LinkBytes
    into: LinkBytes
    up: LinkBytes
    down: LinkBytes

    @property
    def sent_bytes(self) -> float:
        """By a rank, on average."""
        return float(self.out.mean())

    def __add__(self, other: Load) -> Load:
        return Load(self.out + other.out, self.into + other.into, self.up + other.up, self.down + other.down)


@dataclass(frozen=True)
class Cost:
    """Seconds of one exchange: ``transfer_s`` occupies the wire, ``latency_s`` passes beside it; ``core_s``
    of a core are missing to whoever computes meanwhile. ``links_s``: what each link is occupied, at most
    ``transfer_s``."""

    transfer_s: float
    latency_s: float
    core_s: float
    links_s: LinkBytes

    @property
    def seconds(self) -> float:
        """From the first byte to the last."""
        return self.transfer_s + self.latency_s


@dataclass(frozen=True, eq=False)
class ExchangeLoad:
    """What an exchange asks of a network: loads one behind the other, hops of ``delay_s``, messages per rank.
    ``around``: its hops wait for each other, as on a ring. ``held_up``: the share of the ranks that wait for
    the busiest link; where ranks wait for neighbours alone, the others go on ``slack_s`` before."""

    stages: tuple[Load, ...] = ()
    hops: int = 0
    delay_s: float = 0.0
    messages: int = 0
    around: bool = False
    held_up: float = 1.0
    slack_s: float = 0.0

    def cost(self, fabric: Fabric, host: Host = ALONE) -> Cost:
        """Its seconds, with the network to itself. A ring keeps whoever carries it busy throughout: its hops
        count as transfer."""
        stages_s = [occupied_s(load, fabric) for load in self.stages]
        moved_s = sum(
            max(float(one_s.max()), load.sent_bytes * host.byte_s * host.oversubscription)
            for one_s, load in zip(stages_s, self.stages, strict=True)
        )
        links_s = np.sum(stages_s or [np.zeros(1)], axis=0)
        hops_s = self.hops * self.delay_s
        late_s = 0.0
        overhead = host.around if self.around else host.direct
        if overhead is None:
            hops_s += self.messages * host.message_s * host.oversubscription
            began_s = host.exchange_s if self.messages else 0.0
            core_s = began_s + self.messages * host.message_s + self.sent_bytes * host.byte_s
        else:
            late_s = self.hops * overhead.hop_s(self.sent_bytes)
            core_s = overhead.carried_s(self.sent_bytes)
        if self.around:
            late_s, hops_s = late_s + hops_s, 0.0
        return Cost(moved_s + late_s, hops_s, core_s, links_s + late_s)

    @property
    def sent_bytes(self) -> float:
        """By a rank, on average."""
        return sum(load.sent_bytes for load in self.stages)


def together(exchanges: Iterable[ExchangeLoad]) -> ExchangeLoad:
    """Exchanges of several groups at the same time: links carry the loads of all."""
    every = list(exchanges)
    columns = zip_longest(*(exchange.stages for exchange in every))
    return ExchangeLoad(
        tuple(_added([load for load in column if load is not None]) for column in columns),
        max((exchange.hops for exchange in every), default=0),
        max((exchange.delay_s for exchange in every), default=0.0),
        max((exchange.messages for exchange in every), default=0),
        any(exchange.around for exchange in every),
    )


def _added(loads: Sequence[Load]) -> Load:
    total = loads[0]
    for load in loads[1:]:
        total = total + load
    return total


# ------------------------------------------------------------------------------------- what crosses the links


def along(edges: Mapping[Edge, float], fabric: Fabric) -> Load:
    """The load of messages of so many bytes along edges ``(source, target)``."""
    n, racks, rack_of = fabric.ranks, max(1, len(fabric.racks)), places(fabric)
    load = Load(np.zeros(n), np.zeros(n), np.zeros(racks), np.zeros(racks))
    for (source, target), nbytes in edges.items():
        load.out[source] += nbytes
        load.into[target] += nbytes
        if rack_of[source] != rack_of[target]:
            load.up[rack_of[source]] += nbytes
            load.down[rack_of[target]] += nbytes
    return load


def among(
    sends: Sequence[float] | LinkBytes, shares: Sequence[float] | LinkBytes, group: Group, fabric: Fabric
) -> Load:
    """The load when member i sends ``sends[i] * shares[j]`` bytes to every other member j.

    An all-gather has ``shares`` of 1; an all-to-all of chunks ``sends`` of 1. Computed from sums: any number
    of ranks.
    """
    members, rack_of = np.array(group), places(fabric)[list(group)]
    a, b = np.asarray(sends, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    racks = max(1, len(fabric.racks))
    rack_a, rack_b = np.bincount(rack_of, a, racks), np.bincount(rack_of, b, racks)
    out, into = np.zeros(fabric.ranks), np.zeros(fabric.ranks)
    out[members] = a * (b.sum() - b)
    into[members] = b * (a.sum() - a)
    return Load(out, into, rack_a * (b.sum() - rack_b), rack_b * (a.sum() - rack_a))


def occupied_s(load: Load, fabric: Fabric) -> LinkBytes:
    """How long each link carries the load: out of and into the ranks, out of and into the racks."""
    rates, uplinks = links(fabric)
    pairs = ((load.out, load.into, rates), (load.up, load.down, uplinks))
    return np.concatenate(
        [8 * charged(sent, back) / rate for a, b, rate in pairs for sent, back in ((a, b), (b, a))]
    )


def charged(sent: LinkBytes, back: LinkBytes) -> LinkBytes:
    """Bytes that a link's queue is charged: a stream, and acknowledgements of what comes the other way."""
    return np.asarray(framed_bytes(1) * sent + acknowledged_bytes(1) * back)


@lru_cache(maxsize=64)
def places(fabric: Fabric) -> NDArray[np.int64]:
    """The rack of each rank; 0 for all where there are none."""
    rack_of = np.zeros(fabric.ranks, dtype=np.int64)
    for index, rack in enumerate(fabric.racks):
        rack_of[list(rack.ranks)] = index
    return rack_of


@lru_cache(maxsize=64)
def links(fabric: Fabric) -> tuple[LinkBytes, LinkBytes]:
    """The rates of ranks' links and of racks' uplinks."""
    uplinks = [rack.uplink_bps for rack in fabric.racks] or [math.inf]
    return np.array(fabric.rates_bps), np.array(uplinks)


def delay_s(pairs: Sequence[Edge], fabric: Fabric) -> float:
    """One way between the pair that is farthest apart."""
    rack_of, racks = places(fabric), _rack_delays(fabric)
    source, target = np.array(pairs).T
    crossing = rack_of[source] != rack_of[target]
    return fabric.delay_s + float(((racks[rack_of[source]] + racks[rack_of[target]]) * crossing).max())


def farthest_s(group: Group, fabric: Fabric) -> float:
    """One way between the members that are farthest apart."""
    present = np.unique(places(fabric)[list(group)])
    return fabric.delay_s + (
        float(np.sort(_rack_delays(fabric)[present])[-2:].sum()) if len(present) > 1 else 0
    )


def _rack_delays(fabric: Fabric) -> LinkBytes:
    return np.array([rack.delay_s for rack in fabric.racks] or [0.0])


# ------------------------------------------------------------------------------------------------- exchanges


def ring_all_reduce(nbytes: float, group: Group, fabric: Fabric) -> ExchangeLoad:
    """A sum of ``nbytes`` around a ring in the order of ranks: scatter-reduce, then gather."""
    n = len(group)
    if n == 1:
        return ExchangeLoad()
    edges = [(group[i], group[(i + 1) % n]) for i in range(n)]
    load = along(dict.fromkeys(edges, 2 * (n - 1) / n * nbytes), fabric)
    return ExchangeLoad((load,), 2 * (n - 1), delay_s(edges, fabric), 2 * (n - 1), around=True)


def direct_all_reduce(nbytes: float, group: Group, fabric: Fabric) -> ExchangeLoad:
    """A sum of ``nbytes`` that everybody sends to everybody."""
    return all_gather_load([nbytes] * len(group), group, fabric)


def piecewise_all_reduce(nbytes: float, group: Group, fabric: Fabric) -> ExchangeLoad:
    """A sum of ``nbytes`` of which every member adds one piece and sends it to everybody."""
    n = len(group)
    if n == 1:
        return ExchangeLoad()
    pieces = np.full(n, nbytes / n)
    load = among(np.ones(n), pieces, group, fabric) + among(pieces, np.ones(n), group, fabric)
    return ExchangeLoad((load,), 2, farthest_s(group, fabric), 2 * (n - 1))


def all_gather_load(payload_bytes: Sequence[float], group: Group, fabric: Fabric) -> ExchangeLoad:
    """Member i sends ``payload_bytes[i]`` to every other."""
    return _at_once(among(payload_bytes, np.ones(len(group)), group, fabric), group, fabric)


def ring_all_gather(nbytes: float, group: Group, fabric: Fabric) -> ExchangeLoad:
    """Every member's ``nbytes`` to all, handed on around a ring: Gloo's and NCCL's own. A reduce-scatter of
    n times as much is the same the other way around."""
    n = len(group)
    if n == 1:
        return ExchangeLoad()
    edges = [(group[i], group[(i + 1) % n]) for i in range(n)]
    load = along(dict.fromkeys(edges, (n - 1) * nbytes), fabric)
    return ExchangeLoad((load,), n - 1, delay_s(edges, fabric), n - 1, around=True)


def all_to_all_load(chunk_bytes: Sequence[float], group: Group, fabric: Fabric) -> ExchangeLoad:
    """Every member sends ``chunk_bytes[j]`` to member j."""
    return _at_once(among(np.ones(len(group)), chunk_bytes, group, fabric), group, fabric)


def uneven_all_to_all(sent: Iterable[tuple[int, int, float]], fabric: Fabric) -> ExchangeLoad:
    """Messages (from, to, bytes), all at once, at most one from a rank to another."""
    edges = {(source, target): nbytes for source, target, nbytes in sent}
    if not edges:
        return ExchangeLoad()
    most = int(np.bincount([source for source, _ in edges]).max())
    return ExchangeLoad((along(edges, fabric),), 1, delay_s(list(edges), fabric), most)


def neighbor_exchange(nbytes: float, edges: Iterable[Edge], fabric: Fabric) -> ExchangeLoad:
    """Neighbours send each other ``nbytes``; each edge is named once."""
    both = [pair for i, j in edges for pair in ((i, j), (j, i))]
    if not both:
        return ExchangeLoad()
    degree, load = int(np.bincount([i for i, _ in both]).max()), along(dict.fromkeys(both, nbytes), fabric)
    waits_s = _waits_s(both, occupied_s(load, fabric), fabric)
    held_up = waits_s >= waits_s.max()
    slack_s = 0.0 if held_up.all() else float(waits_s.max() - waits_s[~held_up].max())
    return ExchangeLoad((load,), 1, delay_s(both, fabric), degree, False, float(held_up.mean()), slack_s)


def _waits_s(pairs: Sequence[Edge], links_s: LinkBytes, fabric: Fabric) -> LinkBytes:
    """Of each rank, how long the busiest link is occupied that a message of it crosses; pairs are both ways,
    and so are links."""
    n, racks, rack_of = fabric.ranks, max(1, len(fabric.racks)), places(fabric)
    out, into, up, down = np.split(links_s, [n, 2 * n, 2 * n + racks])
    waits_s = np.zeros(n)
    for source, target in pairs:
        a, b = rack_of[source], rack_of[target]
        crossed_s = [out[source], into[target], *((up[a], down[b]) if a != b else ())]
        waits_s[source] = max(waits_s[source], *crossed_s)
    return waits_s


def broadcast_load(nbytes: float, group: Group, fabric: Fabric) -> ExchangeLoad:
    """The first member's ``nbytes`` to all, down a binomial tree: in round k, 2^k members send."""
    n, stages, slowest_s, reached = len(group), [], 0.0, 1
    while reached < n:
        edges = [(group[i], group[i + reached]) for i in range(min(reached, n - reached))]
        stages.append(along(dict.fromkeys(edges, nbytes), fabric))
        slowest_s = max(slowest_s, delay_s(edges, fabric))
        reached *= 2
    return ExchangeLoad(tuple(stages), len(stages), slowest_s, len(stages), around=True)


def _at_once(load: Load, group: Group, fabric: Fabric) -> ExchangeLoad:
    n = len(group)
    return ExchangeLoad((load,), 1, farthest_s(group, fabric), n - 1) if n > 1 else ExchangeLoad()
