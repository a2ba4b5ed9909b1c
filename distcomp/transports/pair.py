"""Two ranks of a transport as a world of their own: what one sends the other passes all others by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from distcomp.collectives import Group, Pending, Primitives, Request
from distcomp.transports.gloo_p2p import GlooP2P, Then
from distcomp.transports.mpi.transport import MPITransport


class Couple:
    """The sender is rank 0 here and the receiver rank 1. Only gathers and all-to-alls are asked of it."""

    size = 2

    def __init__(self, whole: GlooP2P | MPITransport, sender: int, receiver: int) -> None:
        self._whole = whole
        self.rank = (sender, receiver).index(whole.rank)
        self._other = (sender, receiver)[1 - self.rank]

    def start(self, request: Request) -> Pending:
        """Raises PeerLost where the connection is gone already."""
        return self._whole.start(request, cast(Primitives, self))

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Pending:
        """As :meth:`distcomp.collectives.Primitives.all_gather`."""
        return self.all_to_all([wire, wire], sizes, group)

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Pending:
        """As :meth:`distcomp.collectives.Primitives.all_to_all`."""
        there, own = 1 - self.rank, wires[self.rank]
        message = self._whole.neighbor_exchange([wires[there]], [self._other], [sizes[there]], None)
        return Then(message, lambda received: [received[0], own] if there == 0 else [own, received[0]])
