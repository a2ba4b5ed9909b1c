"""N workers in one process, stepped in lock-step: exact, without sockets or threads.

Two workers that ask different things in the same round are an error naming both, where a cluster would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distcomp.collectives import Group, Request
from distcomp.errors import Mismatch
from distcomp.payload import PayloadHeader, check_header
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.channel import TRUE, Answer, Channel, finite_flag
from distcomp.runtime.ledger import Ledger


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
        """Called with what all workers ask, round by round."""
        self.ledgers = [Ledger() for _ in range(size)]
        self._seats = [_Seat(rank, size) for rank in range(size)]
        self._channels = [
            Channel(seat, fingerprint, ledger) for seat, ledger in zip(self._seats, self.ledgers, strict=True)
        ]

    def run(self, aggregations: Sequence[Aggregation]) -> None:
        """Carry every worker's exchange to its end, one request of each per round.

        Raises Mismatch when workers ask different things, or when some are done while others still ask.
        """
        answers: list[Answer | None] = [None] * self.size
        while True:
            requests = [
                aggregation.ask(answer) for aggregation, answer in zip(aggregations, answers, strict=True)
            ]
            if all(request is None for request in requests):
                return
            _check_alike(requests)
            if self.listen is not None:
                self.listen(requests)
            for channel, request, aggregation in zip(self._channels, requests, aggregations, strict=True):
                assert request is not None
                channel.prepare(request, aggregation.finite).start()
            answers = list(self._answers(aggregations))

    def _answers(self, aggregations: Sequence[Aggregation]) -> Iterator[Answer]:
        """What each worker receives. What all of a group receive alike is opened and added up once."""
        asked: list[Any] = [seat.asked for seat in self._seats]
        mail = _Mail(asked, self._channels)
        for rank, aggregation in enumerate(aggregations):
            yield mail.answer(rank, aggregation.watch)


class _Mail:
    """All requests of one round, every payload opened and checked once."""

    def __init__(self, asked: Sequence[Any], channels: Sequence[Channel]) -> None:
        self._asked = asked
        self._finite = {
            id(payload): check_header(payload, PayloadHeader(rank, channel.fingerprint, channel.exchange))
            for rank, (request, channel) in enumerate(zip(asked, channels, strict=True))
            for payload in dict.fromkeys(request.sends())
        }
        self._all_finite = all(self._finite.values())
        self._common: dict[tuple[Group | None, bool], tuple[Any, torch.Tensor]] = {}

    def answer(self, rank: int, watch: bool) -> Answer:
        """What this rank receives; where all of a group receive alike, it is delivered once."""
        request = self._asked[rank]
        if not request.alike:
            delivered, finite = self._delivered(rank, watch)
        else:
            key = (request.group, watch)
            if key not in self._common:
                self._common[key] = self._delivered(rank, watch)
            delivered, finite = self._common[key]
        return Answer(request.read(delivered), finite)

    def _delivered(self, rank: int, watch: bool) -> tuple[Any, torch.Tensor]:
        request = self._asked[rank]
        delivered = request.delivered(rank, self._asked)
        if not request.sealed:
            return delivered, finite_flag(delivered) if watch else TRUE
        if self._all_finite:
            return delivered, TRUE
        return delivered, torch.tensor(
            all(bool(self._finite[id(payload)]) for payload in delivered), dtype=torch.bool
        )


def _signature(request: Request | None) -> tuple[object, ...]:
    """What must be alike on all ranks of a group."""
    return ("nothing (it is done)",) if request is None else (type(request).__name__, *request.signature())


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
        if request is not None:
            request.check_against(rank, requests)
