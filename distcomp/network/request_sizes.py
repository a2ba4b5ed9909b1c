"""What all ranks ask of each other in one round, as sizes: what :mod:`distcomp.network.model` prices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distcomp.collectives import Group, Request, is_summed_directly, is_summed_in_pieces
from distcomp.errors import DistcompError
from distcomp.network.fabric import Fabric
from distcomp.network.framing import window_bytes
from distcomp.network.model import (
    Edge,
    ExchangeLoad,
    all_gather_load,
    all_to_all_load,
    broadcast_load,
    direct_all_reduce,
    neighbor_exchange,
    piecewise_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    together,
    uneven_all_to_all,
)
from distcomp.payload import HEADER

Groups = tuple[Group, ...]
"""Groups that ask side by side."""

REQUEST_KINDS = (
    "all_reduce", "ring_all_reduce", "ring_all_gather", "ring_reduce_scatter", "all_gather", "all_to_all",
    "neighbor_exchange", "broadcast",
)  # fmt: skip
"""What :mod:`distcomp.network.model` has a price for."""

LATE_IN_A_RING = 1 / 3
"""Of what one word for a message waits, what a ring waits in all: fitted to the steps of FSDP2 by itself on
four ranks in ``benchmarks/results/sharded_advice.json``."""


@dataclass(frozen=True)
class RequestSizes:
    """One round.

    ``kind``: all_reduce, ring_all_reduce (one that goes around whatever its size), ring_all_gather and
    ring_reduce_scatter (of the whole, as those of PyTorch's backends), all_gather, all_to_all,
    neighbor_exchange or broadcast. ``sizes``: bytes that each member sends (all_gather), that go to each
    member (all_to_all), or one number. ``groups`` ask side by side; None is one group of all. ``chunked``:
    the sizes are cuts of something that all members cover together. ``messages``: (from, to, bytes), where
    ranks send different sizes; they stand for the sizes then.

    Raises DistcompError for another kind.
    """

    kind: str
    sizes: tuple[float, ...]
    groups: Groups | None = None
    edges: frozenset[Edge] = frozenset()
    chunked: bool = False
    messages: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in REQUEST_KINDS:
            raise DistcompError(
                f"there is no price for {self.kind!r}; a request's traffic is one of "
                f"{', '.join(REQUEST_KINDS)}"
            )

    def exchange(self, fabric: Fabric) -> ExchangeLoad:
        """What it asks of a network of ``fabric.ranks`` ranks."""
        groups = self.groups or (tuple(range(fabric.ranks)),)
        if self.messages:
            return uneven_all_to_all(self.messages, fabric)
        if self.kind == "neighbor_exchange":
            return neighbor_exchange(self.sizes[0], self.edges, fabric)
        return together(self._within(group, fabric) for group in groups)

    def _within(self, group: Group, fabric: Fabric) -> ExchangeLoad:
        size = self.sizes[0]
        if self.kind == "all_reduce":
            if is_summed_directly(size, len(group)):
                return direct_all_reduce(size, group, fabric)
            pieces = is_summed_in_pieces(size, len(group))
            return (piecewise_all_reduce if pieces else ring_all_reduce)(size, group, fabric)
        if self.kind == "ring_all_reduce":
            return ring_all_reduce(size, group, fabric)
        if self.kind in ("ring_all_gather", "ring_reduce_scatter"):
            return ring_all_gather(size / len(group), group, fabric)
        if self.kind == "broadcast":
            return broadcast_load(size, group, fabric)
        return (all_gather_load if self.kind == "all_gather" else all_to_all_load)(self.sizes, group, fabric)

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that a rank sends, on average."""
        members = self._members(ranks)
        if self.messages:
            return sum(nbytes for _, _, nbytes in self.messages) / ranks
        if self.kind == "neighbor_exchange":
            return 2 * len(self.edges) / ranks * self.sizes[0]
        if self.kind in ("all_reduce", "ring_all_reduce"):
            direct_ = self.kind == "all_reduce" and is_summed_directly(self.sizes[0], members)
            return (members - 1 if direct_ else 2 * (members - 1) / members) * self.sizes[0]
        if self.kind in ("broadcast", "ring_all_gather", "ring_reduce_scatter"):
            return (members - 1) / members * self.sizes[0]
        return (members - 1) / members * sum(self.sizes)

    @property
    def in_a_ring(self) -> bool:
        """As collectives of a backend go."""
        return self.kind.startswith("ring")

    def announced_s(self, transfer_s: float, fabric: Fabric, emulated: bool) -> float:
        """What Gloo adds to a ring that has the network to itself and takes ``transfer_s``.

        A message is sent when its receiver's word has come that there is room for it. Where the receiver has
        begun to send itself, that word stands behind the message that is under way on its link, on an
        emulated network behind a window of it at most; around a ring most words are sent ahead. Between two
        ranks the word comes over the very connection that the shards cross, behind the first half of the
        receiver's own. Payloads need no word.
        """
        if not self.in_a_ring:
            return 0.0
        members = self._members(fabric.ranks)
        if self.kind == "ring_all_gather" and members == 2:
            return transfer_s / 2
        slowest_bps = min(fabric.rates_bps)
        if not emulated or math.isinf(slowest_bps):
            return 0.0
        window = min(self.sizes[0] / members, window_bytes(slowest_bps, fabric.delay_s))
        return LATE_IN_A_RING * 8 * window / slowest_bps

    def _members(self, ranks: int) -> int:
        return len(self.groups[0]) if self.groups else ranks

    def placed(self, groups: Groups) -> RequestSizes:
        """The same round, asked among as many as a group has, in each of ``groups`` side by side."""
        inner = self.groups or (tuple(range(len(groups[0]))),)
        return replace(
            self,
            groups=tuple(tuple(group[member] for member in members) for group in groups for members in inner),
            messages=tuple(
                (group[source], group[target], nbytes)
                for group in groups
                for source, target, nbytes in self.messages
            ),
        )

    def among(self, ranks: int, edges: frozenset[Edge] = frozenset()) -> RequestSizes:
        """The same round among another number of ranks, all in one group.

        Chunks get smaller and keep their headers; whatever else is sent stays as large as it is.
        """
        if not self.chunked:
            return replace(
                self, sizes=self.sizes[:1] * (ranks if self.kind == "all_gather" else 1), edges=edges
            )
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
    between = edges if traffic.pattern == "neighbor_exchange" else frozenset()
    return RequestSizes(traffic.pattern, traffic.sizes, groups, between, traffic.chunked, messages)


def uneven(request: Request, rank: int, ranks: int) -> bool:
    """Whether it takes every rank's request to tell what is sent."""
    return bool(request.messages(rank, ranks))


def request_groups(requests: Sequence[Request]) -> Groups | None:
    """The groups in which all ranks ask, each once; None where they ask as one."""
    if requests[0].group is None:
        return None
    return tuple(sorted({request.group for request in requests if request.group is not None}))
