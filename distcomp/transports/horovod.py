"""Requests carried by Horovod's collectives, inside a Horovod job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, Request
from distcomp.errors import DistcompError, PeerLost, require
from distcomp.payload import wire_bytes


class Horovod:
    """Carries requests of all ranks of the job.

    Horovod has no message from one rank to another: neighbours are reached by an all-to-all that is empty for
    all others. A request among some of the ranks needs process sets, which a job must declare when it starts:
    it is refused.
    """

    def __init__(self) -> None:
        self._hvd = require("horovod.torch", "horovod")
        self.rank: int = self._hvd.rank()
        self.size: int = self._hvd.size()

    def start(self, request: Request) -> PendingMessages:
        if request.group is not None and len(request.group) < self.size:
            raise DistcompError(
                "methods that talk in groups (hierarchical) do not run over Horovod; use torch.distributed, "
                "which horovodrun can start as well"
            )
        return self._begin(request)

    def _begin(self, request: Request) -> PendingMessages:
        if isinstance(request, AllReduce):
            return self._pending_messages(
                self._hvd.allreduce_async(request.x, op=self._hvd.AllReduce), lambda total: total
            )
        if isinstance(request, AllGather):
            parts = request.parts or (request.payload.parts,) * self.size
            sizes = [wire_bytes(one) for one in parts]
            handle = self._hvd.allgather_async(request.payload.wire)
            return self._pending_messages(handle, lambda everything: list(torch.split(everything, sizes)))
        if isinstance(request, AllToAll):
            wires = {to: payload.wire for to, payload in enumerate(request.payloads)}
            return self._all_to_all(wires, range(self.size))
        if isinstance(request, NeighborExchange):
            neighbours = request.neighbours
            return self._all_to_all(dict.fromkeys(neighbours, request.payload.wire), neighbours)
        assert isinstance(request, Broadcast)
        handle = self._hvd.broadcast_async(request.payload.wire, request.source)
        return self._pending_messages(handle, lambda wire: [wire])

    def _all_to_all(self, outgoing: dict[int, Tensor], senders: Iterable[int]) -> PendingMessages:
        """What each of ``senders`` sent here, in their order."""
        splits = torch.tensor([outgoing[to].numel() if to in outgoing else 0 for to in range(self.size)])
        flat = torch.cat([outgoing[to] for to in sorted(outgoing)])
        handle = self._hvd.alltoall_async(flat, splits=splits.int())

        def received(answer: tuple[Tensor, Tensor]) -> list[Tensor]:
            pieces = torch.split(answer[0], answer[1].tolist())
            return [pieces[sender] for sender in senders]

        return self._pending_messages(handle, received)

    def _pending_messages(self, handle: Any, result: Callable[[Any], Any]) -> PendingMessages:
        return PendingMessages(lambda: result(self._hvd.synchronize(handle)))


class PendingMessages:
    """A collective that Horovod's own thread carries."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer
        self.started_s = time.perf_counter()
        self.finished_s = 0.0

    def wait(self) -> Any:
        """Raises PeerLost when Horovod gives up."""
        try:
            answer = self._answer()
        except RuntimeError as error:
            raise PeerLost(f"Horovod lost a rank ({error}); start the job again from a checkpoint") from error
        self.finished_s = time.perf_counter()
        return answer
