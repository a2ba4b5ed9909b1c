"""Requests carried by Horovod's collectives, inside a Horovod job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import Group, Pending, Request
from distcomp.errors import DistcompError, PeerLost, require


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

    def start(self, request: Request) -> Pending:
        if request.group is not None and len(request.group) < self.size:
            raise DistcompError(
                "methods that exchange within groups (two_level) do not run over Horovod; use "
                "torch.distributed, which horovodrun can start as well"
            )
        return request.drive(self)

    def all_reduce(self, x: Tensor, group: Group | None) -> HorovodMessages:
        return self._pending_messages(
            self._hvd.allreduce_async(x, op=self._hvd.AllReduce), lambda total: total
        )

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> HorovodMessages:
        handle = self._hvd.allgather_async(wire)
        return self._pending_messages(handle, lambda everything: list(torch.split(everything, list(sizes))))

    def all_to_all(
        self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None
    ) -> HorovodMessages:
        return self._all_to_all(dict(enumerate(wires)), range(self.size))

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> HorovodMessages:
        return self._all_to_all(dict(zip(neighbors, wires, strict=True)), neighbors)

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> HorovodMessages:
        return self._pending_messages(self._hvd.broadcast_async(wire, source), lambda wire: [wire])

    def _all_to_all(self, outgoing: dict[int, Tensor], senders: Iterable[int]) -> HorovodMessages:
        """What each of ``senders`` sent here, in their order."""
        splits = torch.tensor(
            [outgoing[to].numel() if to in outgoing else 0 for to in range(self.size)], dtype=torch.int64
        )
        flat = torch.cat([outgoing[to] for to in sorted(outgoing)])
        handle = self._hvd.alltoall_async(flat, splits=splits.int())

        def received(answer: tuple[Tensor, Tensor]) -> list[Tensor]:
            pieces = torch.split(answer[0], answer[1].tolist())
            return [pieces[sender] for sender in senders]

        return self._pending_messages(handle, received)

    def _pending_messages(self, handle: Any, result: Callable[[Any], Any]) -> HorovodMessages:
        return HorovodMessages(lambda: result(self._hvd.synchronize(handle)))


class HorovodMessages:
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
