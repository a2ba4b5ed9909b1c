"""N workers in one process, stepped in lock-step: exact, without sockets or threads.

Two workers that ask different things in the same round are an error naming both, where a cluster would hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distcomp.errors import Mismatch
from distcomp.exchange import Gather, Mix, Request, Sum, Swap
from distcomp.transports.base import Answer, Channel, OpenExchange
from distcomp.transports.conversation import Conversation
from distcomp.transports.ledger import Ledger


class _Ready:
    """A pending request whose answer the switchboard fills in."""

    value: Any = None
    started_s = finished_s = 0.0

    def wait(self) -> Any:
        return self.value


class _Seat:
    """One worker's end of the switchboard, as a transport."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.asked: Request | None = None
        self.ready = _Ready()

    def start(self, request: Request) -> _Ready:
        self.asked = request
        self.ready = _Ready()
        return self.ready


class Lockstep:
    """Carries the conversations of ``size`` workers. ``ledgers`` holds one ledger per worker."""

    def __init__(self, size: int, fingerprint: int = 0) -> None:
        self.size = size
        self.ledgers = [Ledger() for _ in range(size)]
        self._seats = [_Seat(rank, size) for rank in range(size)]
        self._channels = [
            Channel(seat, fingerprint, ledger) for seat, ledger in zip(self._seats, self.ledgers, strict=True)
        ]

    def run(self, conversations: Sequence[Conversation]) -> None:
        """Carry every worker's conversation to its end, one request of each per round.

        Raises Mismatch when workers ask different things, or when some are done while others still ask.
        """
        answers: list[Answer | None] = [None] * self.size
        while True:
            requests = [talk.ask(answer) for talk, answer in zip(conversations, answers, strict=True)]
            if all(request is None for request in requests):
                return
            _check_alike(requests)
            exchanges: list[OpenExchange] = []
            for channel, request, talk in zip(self._channels, requests, conversations, strict=True):
                assert request is not None
                exchanges.append(channel.prepare(request, talk.finite))
                exchanges[-1].start()
            self._answer()
            for exchange in exchanges:
                exchange.wait()
            answers = [
                exchange.open(talk.watch) for exchange, talk in zip(exchanges, conversations, strict=True)
            ]

    def _answer(self) -> None:
        requests = [seat.asked for seat in self._seats]
        for rank, seat in enumerate(self._seats):
            seat.ready.value = _answer_for(rank, requests)


def _answer_for(rank: int, requests: list[Any]) -> Any:
    asked = requests[rank]
    group = asked.group or range(len(requests))
    members = [requests[other] for other in group]
    if isinstance(asked, Sum):
        return _sum_in_rank_order([member.x for member in members])
    if isinstance(asked, Gather):
        return [member.payload.wire for member in members]
    if isinstance(asked, Swap):
        place = list(group).index(rank)
        return [member.payloads[place].wire for member in members]
    if isinstance(asked, Mix):
        return [requests[neighbour].payload.wire for neighbour in asked.neighbours]
    return [requests[asked.source].payload.wire]


def _sum_in_rank_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _signature(request: Request | None) -> tuple[object, ...]:
    """What must be alike on all ranks of a group."""
    if request is None:
        return ("nothing (it is done)",)
    kind = type(request).__name__
    if isinstance(request, Sum):
        return (kind, tuple(request.x.shape), request.x.dtype, request.group)
    if isinstance(request, Gather):
        return (kind, request.parts or request.payload.parts, request.group)
    if isinstance(request, Swap):
        return (kind, tuple(payload.parts for payload in request.payloads), request.group)
    if isinstance(request, Mix):
        return (kind, request.payload.parts, request.group)
    return (kind, request.payload.parts, request.source, request.group)


def _check_alike(requests: Sequence[Request | None]) -> None:
    """All members of a group that somebody asks within must ask the same, of the same group."""
    everyone = tuple(range(len(requests)))
    groups = {(request and request.group) or everyone: None for request in requests}
    for group in groups:
        first = _signature(requests[group[0]])
        for rank in group:
            if _signature(requests[rank]) != first:
                raise Mismatch(
                    f"rank {group[0]} asks {first} while rank {rank} asks {_signature(requests[rank])}; "
                    "every rank must run the same method with the same settings"
                )
    for rank, request in enumerate(requests):
        if isinstance(request, Mix):
            _check_mutual(rank, request, requests)


def _check_mutual(rank: int, request: Mix, requests: Sequence[Any]) -> None:
    for neighbour in request.neighbours:
        if rank not in requests[neighbour].neighbours:
            raise Mismatch(
                f"rank {rank} mixes with rank {neighbour}, which does not mix with rank {rank}; "
                "neighbourhood must be mutual: give every rank the same topology"
            )
