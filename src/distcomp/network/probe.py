"""From measured message times to a :class:`~distcomp.network.fabric.Fabric`, and what its model misses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distcomp.network.fabric import Fabric
from distcomp.network.isotonic import isotonic_fit
from distcomp.network.model import Excess, gather, ring

Times = Sequence[Sequence[float]]


def curve(times_s: Times) -> NDArray[np.float64]:
    """Seconds for each size, from repeated measurements, ``[sizes, repeats]``: a rising curve that outliers
    do not move. Fitted to the logarithm, for noise grows with what is measured."""
    return np.asarray(np.exp(isotonic_fit(np.log(np.maximum(times_s, 1e-9)))))


def excess_of(
    sizes: Sequence[float], direct_s: Times, ring_s: Times, fabric: Fabric
) -> tuple[Excess, Excess]:
    """What exchanges between all ranks took beyond the fluid model, per hop: direct ones, and around a ring.

    ``sizes``: bytes that each rank sent.
    """
    ranks, group = fabric.ranks, tuple(range(fabric.ranks))
    nbytes = tuple(map(float, sizes))
    modelled = [gather([one / (ranks - 1)] * ranks, group, fabric).cost(fabric) for one in nbytes]
    around = [ring(one * ranks / (2 * (ranks - 1)), group, fabric) for one in nbytes]
    beyond = np.maximum(0, curve(direct_s) - [one.seconds for one in modelled])
    beyond_ring = np.maximum(0, curve(ring_s) - [one.cost(fabric).seconds for one in around])
    per_hop = beyond_ring / around[0].hops
    return Excess(nbytes, tuple(beyond.tolist())), Excess(nbytes, tuple(per_hop.tolist()))
