"""N workers in one process, stepped in lock-step: exact, without sockets or threads.

Two workers that ask different things in the same round are an error naming both, where a cluster would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distcomp.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    Group,
    NeighborExchange,
    Request,
    SharedAnswers,
)
from distcomp.errors import Mismatch
from distcomp.payload import PayloadHeader, check_header
from distcomp.runtime.channel import TRUE, Answer, Channel, finite_flag, payloads_of
from distcomp.runtime.exchange import Exchange
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.sums import in_rank_order


class _Seat:
    """One worker's end of the line, as a transport that keeps what is asked; the answer comes from
    :class:`_Mail`."""

    started_s = finished_s = 0.0

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.asked: Request | None = None

    def start(self, request: Request) -> _Seat:
        self.asked = request
        return self

    def wait(self) -> Any:
        raise NotImplementedError("in lock-step nobody waits")


class Lockstep:
    """Carries the exchanges of ``size`` workers. ``ledgers`` holds one ledger per worker."""

    def __init__(self, size: int, fingerprint: int = 0) -> None:
        self.size = size
        self.listen: Callable[[Sequence[Request | None]], None] | None = None
        """Is told what all ask, round by round."""
        self.ledgers = [Ledger() for _ in range(size)]
        self._seats = [_Seat(rank, size) for rank in range(size)]
        self._channels = [
            Channel(seat, fingerprint, ledger) for seat, ledger in zip(self._seats, self.ledgers, strict=True)
        ]

    def run(self, exchanges: Sequence[Exchange]) -> None:
        """Carry every worker's exchange to its end, one request of each per round.

        Raises Mismatch when workers ask different things, or when some are done while others still ask.
        """
        answers: list[Answer | None] = [None] * self.size
        while True:
            requests = [exchange.ask(answer) for exchange, answer in zip(exchanges, answers, strict=True)]
            if all(request is None for request in requests):
                return
            _check_alike(requests)
            if self.listen is not None:
                self.listen(requests)
            for channel, request, exchange in zip(self._channels, requests, exchanges, strict=True):
                assert request is not None
                channel.prepare(request, exchange.finite).start()
            answers = list(self._answers(exchanges))

    def _answers(self, exchanges: Sequence[Exchange]) -> Iterator[Answer]:
        """What each worker hears. What all of a group hear alike is opened and added up once for all."""
        asked: list[Any] = [seat.asked for seat in self._seats]
        mail = _Mail(asked, self._channels)
        for rank, (request, exchange) in enumerate(zip(asked, exchanges, strict=True)):
            if isinstance(request, AllToAll):
                yield mail.swapped(rank)
            elif isinstance(request, NeighborExchange):
                yield mail.mixed(rank)
            else:
                yield mail.common(rank, exchange.watch)


class _Mail:
    """All requests of one round, every payload opened and checked once."""

    def __init__(self, asked: Sequence[Any], channels: Sequence[Channel]) -> None:
        self._asked = asked
        self._finite = {
            id(payload): check_header(payload, PayloadHeader(rank, channel.fingerprint, channel.exchange))
            for rank, (request, channel) in enumerate(zip(asked, channels, strict=True))
            for payload in dict.fromkeys(payloads_of(request))
        }
        self._all_finite = all(self._finite.values())
        self._common: dict[tuple[Group | None, bool], Answer] = {}

    def swapped(self, rank: int) -> Answer:
        members = self._members(rank)
        place = members.index(rank)
        return self._answer([self._asked[member].payloads[place] for member in members])

    def mixed(self, rank: int) -> Answer:
        return self._answer([self._asked[neighbour].payload for neighbour in self._asked[rank].neighbours])

    def common(self, rank: int, watch: bool) -> Answer:
        """A sum is a copy for each: it is the asker's buffer."""
        request = self._asked[rank]
        key = (request.group, watch)
        if key not in self._common:
            self._common[key] = self._shared(rank, watch)
        answer = self._common[key]
        return Answer(answer.value.clone(), answer.finite) if isinstance(request, AllReduce) else answer

    def _shared(self, rank: int, watch: bool) -> Answer:
        request = self._asked[rank]
        if isinstance(request, Broadcast):
            (payload,) = (answer := self._answer([self._asked[request.source].payload])).value
            return Answer(payload, answer.finite)
        members = [self._asked[member] for member in self._members(rank)]
        if isinstance(request, AllReduce):
            total = in_rank_order([member.x for member in members])
            return Answer(total, finite_flag(total) if watch else TRUE)
        return self._answer(SharedAnswers(member.payload for member in members))

    def _members(self, rank: int) -> Sequence[int]:
        group: Group | None = self._asked[rank].group
        return group if group is not None else range(len(self._asked))

    def _answer(self, payloads: list[Any]) -> Answer:
        if self._all_finite:
            return Answer(payloads, TRUE)
        return Answer(payloads, torch.tensor(all(bool(self._finite[id(one)]) for one in payloads)))


def _signature(request: Request | None) -> tuple[object, ...]:
    """What must be alike on all ranks of a group."""
    if request is None:
        return ("nothing (it is done)",)
    kind = type(request).__name__
    if isinstance(request, AllReduce):
        return (kind, tuple(request.x.shape), request.x.dtype, request.group)
    if isinstance(request, AllGather):
        return (kind, request.parts or request.payload.parts, request.group)
    if isinstance(request, AllToAll):
        return (kind, tuple(payload.parts for payload in request.payloads), request.group)
    if isinstance(request, NeighborExchange):
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
        if isinstance(request, NeighborExchange):
            _check_mutual(rank, request, requests)


def _check_mutual(rank: int, request: NeighborExchange, requests: Sequence[Any]) -> None:
    for neighbour in request.neighbours:
        if rank not in requests[neighbour].neighbours:
            raise Mismatch(
                f"rank {rank} mixes with rank {neighbour}, which does not mix with rank {rank}; "
                "neighbourhood must be mutual: give every rank the same topology"
            )
