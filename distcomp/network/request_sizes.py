"""What all ranks ask of each other in one round, as sizes: what :mod:`distcomp.network.model` prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distcomp.collectives import Group, Request, is_summed_directly
from distcomp.network.fabric import Fabric
from distcomp.network.model import (
    Edge,
    ExchangeLoad,
    cast,
    direct,
    gather,
    mix,
    pairs,
    ring,
    swap,
    together,
)
from distcomp.payload import HEADER

Groups = tuple[Group, ...]


@dataclass(frozen=True)
class RequestSizes:
    """One round.

    ``kind``: sum, ring (a sum, whatever its size), gather, swap, mix or cast. ``sizes``: bytes that each
    member sends (gather), that go to each member (swap), or one number. ``groups`` ask side by side; None is
    one group of all. ``chunked``: the sizes are cuts of something that all members cover together.
    ``messages``: (from, to, bytes), where ranks send different sizes; they stand for the sizes then.
    """

    kind: str
    sizes: tuple[float, ...]
    groups: Groups | None = None
    edges: frozenset[Edge] = frozenset()
    chunked: bool = False
    messages: tuple[tuple[int, int, float], ...] = ()

    def exchange(self, fabric: Fabric) -> ExchangeLoad:
        """What it asks of a network of ``fabric.ranks`` ranks."""
        groups = self.groups or (tuple(range(fabric.ranks)),)
        if self.messages:
            return pairs(self.messages, fabric)
        if self.kind == "mix":
            return mix(self.sizes[0], self.edges, fabric)
        return together(self._within(group, fabric) for group in groups)

    def _within(self, group: Group, fabric: Fabric) -> ExchangeLoad:
        size = self.sizes[0]
        if self.kind == "sum":
            return (direct if is_summed_directly(size, len(group)) else ring)(size, group, fabric)
        if self.kind == "ring":
            return ring(size, group, fabric)
        if self.kind == "cast":
            return cast(size, group, fabric)
        return (gather if self.kind == "gather" else swap)(self.sizes, group, fabric)

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that a rank sends, on average."""
        members = len(self.groups[0]) if self.groups else ranks
        if self.messages:
            return sum(nbytes for _, _, nbytes in self.messages) / ranks
        if self.kind == "mix":
            return 2 * len(self.edges) / ranks * self.sizes[0]
        if self.kind in ("sum", "ring"):
            direct_ = self.kind == "sum" and is_summed_directly(self.sizes[0], members)
            return (members - 1 if direct_ else 2 * (members - 1) / members) * self.sizes[0]
        if self.kind == "cast":
            return (members - 1) / members * self.sizes[0]
        return (members - 1) / members * sum(self.sizes)

    def among(self, ranks: int, edges: frozenset[Edge] = frozenset()) -> RequestSizes:
        """The same round among another number of ranks, all in one group.

        Chunks get smaller and keep their headers; whatever else is sent stays as large as it is.
        """
        if not self.chunked:
            return replace(self, sizes=self.sizes[:1] * (ranks if self.kind == "gather" else 1), edges=edges)
        bodies = sum(self.sizes) - HEADER.size * len(self.sizes)
        return replace(self, sizes=(HEADER.size + bodies / ranks,) * ranks, messages=())


def sizes_of(
    request: Request,
    ranks: int,
    groups: Groups | None,
    edges: frozenset[Edge],
    everyone: Sequence[Request] = (),
) -> RequestSizes:
    """The round in which one rank asks ``request``, and every other its own like it; ``everyone`` holds those
    of all ranks, where :func:`uneven`."""
    traffic = request.traffic(ranks)
    messages = tuple(
        (rank, to, nbytes)
        for rank, asked in enumerate(everyone)
        for to, nbytes in asked.messages(rank, ranks)
    )
    between = edges if traffic.pattern == "mix" else frozenset()
    return RequestSizes(traffic.pattern, traffic.sizes, groups, between, traffic.chunked, messages)


def uneven(request: Request, rank: int, ranks: int) -> bool:
    """Whether it takes every rank's request to tell what is sent."""
    return bool(request.messages(rank, ranks))


def groups_of(requests: Sequence[Request]) -> Groups | None:
    """The groups in which all ranks ask, each once; None where they ask as one."""
    if requests[0].group is None:
        return None
    return tuple(sorted({request.group for request in requests if request.group is not None}))
