"""From measured message times to a :class:`~distcomp.network.fabric.Fabric`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distcomp.errors import DistcompError
from distcomp.network.fabric import Fabric, Rack
from distcomp.network.framing import framed_bytes
from distcomp.network.isotonic import isotonic_fit, noise
from distcomp.network.units import UNSHAPED

PairTimes = Sequence[Sequence[float]]


def curve(times_s: PairTimes) -> NDArray[np.float64]:
    """Seconds for each size, from repeated measurements, ``[sizes, repeats]``: a rising curve that outliers
    do not move. Fitted to the logarithm, for noise grows with what is measured."""
    return np.asarray(np.exp(isotonic_fit(np.log(np.maximum(times_s, 1e-9)))))


@dataclass(frozen=True)
class LinkFit:
    """What was measured between two ranks with nobody else talking: one way, and its rate. ``spread``: the
    relative noise of repeated measurements; 0.1 means that a tenth either way says nothing."""

    latency_s: float
    rate_bps: float
    spread: float
    curve_s: tuple[float, ...]


def link_of(sizes: Sequence[int], times_s: PairTimes) -> LinkFit:
    """The link behind message times: latency at the smallest size, rate between the two largest.

    Raises DistcompError where there are fewer than two sizes.
    """
    if len(sizes) < 2:
        raise DistcompError("a link is fitted to two message sizes or more; measure more of them")
    seconds = curve(times_s)
    grown_s = float(seconds[-1] - seconds[-2])
    rate_bps = 8 * framed_bytes(sizes[-1] - sizes[-2]) / grown_s if grown_s > 0 else UNSHAPED
    spread = noise(np.log(np.maximum(times_s, 1e-9)))
    return LinkFit(float(seconds[0]), rate_bps, spread, tuple(seconds.tolist()))


APART = 1.5
"""Ranks are in different racks where messages take so many times longer than between the nearest."""


def racks_of(seconds: NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    """Ranks clustered by how long a message takes between two, ``[ranks, ranks]``: single linkage, cut at the
    widest gap between the pairs' times, where they differ by a factor of 1.5 there; else one cluster."""
    ranks = len(seconds)
    both = np.maximum(seconds, seconds.T)
    times = np.sort(both[np.triu_indices(ranks, 1)])
    if len(times) < 2:
        return (tuple(range(ranks)),)
    ratios = times[1:] / times[:-1]
    widest = int(ratios.argmax())
    if ratios[widest] < APART:
        return (tuple(range(ranks)),)
    near = both <= times[widest]
    racks: list[tuple[int, ...]] = []
    left = set(range(ranks))
    while left:
        rack, frontier = set(), [min(left)]
        while frontier:
            here = frontier.pop()
            if here not in rack:
                rack.add(here)
                frontier += [other for other in left if near[here, other]]
        left -= rack
        racks.append(tuple(sorted(rack)))
    return tuple(racks)


def fabric_from(
    links: Mapping[tuple[int, int], LinkFit], racks: Sequence[tuple[int, ...]], uplinks_bps: Sequence[float]
) -> Fabric:
    """The fabric that the links of all pairs make.

    A rank's rate is the best that it reached with anybody. The delay is the median within racks; a rack's is
    half of what crossing adds. ``uplinks_bps``: what left each rack when all of its ranks sent at once.
    """
    ranks = 1 + max(rank for pair in links for rank in pair)
    rates = tuple(
        float(f"{max(link.rate_bps for pair, link in links.items() if rank in pair):.3g}")
        for rank in range(ranks)
    )
    rack_of = {rank: index for index, rack in enumerate(racks) for rank in rack}
    inside = [link.latency_s for (i, j), link in links.items() if rack_of[i] == rack_of[j]]
    across = [link.latency_s for (i, j), link in links.items() if rack_of[i] != rack_of[j]]
    delay_s = _microseconds(float(np.median(inside or across)))
    if len(racks) == 1:
        return Fabric(rates, delay_s)
    added_s = _microseconds(max(0.0, float(np.median(across)) - delay_s) / 2)
    uplinks = (float(f"{bps:.3g}") for bps in uplinks_bps)
    return Fabric(
        rates, delay_s, tuple(Rack(rack, bps, added_s) for rack, bps in zip(racks, uplinks, strict=True))
    )


def _microseconds(seconds: float) -> float:
    return round(seconds, 6)
