"""Gossip in pairs that are drawn anew for every exchange: nobody waits for more than one other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from distcomp.averaging.base import AveragingContext
from distcomp.averaging.gossip import Gossip
from distcomp.averaging.topology import MixingRow, Topology
from distcomp.layout import Layout
from distcomp.randomness import Key


@dataclass(frozen=True)
class Pairs(Gossip):
    """What gossip in random pairs has in common: all ranks draw the same pairs from the key that they share.

    ``W_ii = W_ij = 1/2`` for *i* and its partner *j*; of an odd number of ranks one stays alone, with
    ``W_ii = 1``. What disagreement is left of an exchange, squared and in expectation: ``1 - m/(n-1)`` of it,
    ``m`` being the number of pairs, a half of it for many ranks.

    Bytes: one payload, however many ranks there are.
    """

    topology: str | Topology = "complete"
    """Who may ever meet whom: everybody."""

    def row(self, context: AveragingContext) -> MixingRow:
        partner = partners(context.shared, context.size)[context.rank]
        if partner == context.rank:
            return MixingRow(context.rank, (), (), 1.0)
        return MixingRow(context.rank, (partner,), (0.5,), 0.5).without(context.absent)

    def conditions(self, layout: Layout, size: int) -> dict[str, Any]:
        rho = math.sqrt(1 - (size // 2) / (size - 1)) if size > 1 else 0.0
        return {"topology": "random pairs", "rho": rho, "spectral_gap": 1 - rho}


@lru_cache(maxsize=64)
def partners(key: Key, size: int) -> tuple[int, ...]:
    """Everybody's partner, by rank: its own number for the one that is left over."""
    order = torch.randperm(size, generator=key.fold("pairs").generator()).tolist()
    met = list(range(size))
    for one, other in zip(order[0::2], order[1::2], strict=False):
        met[one], met[other] = other, one
    return tuple(met)
