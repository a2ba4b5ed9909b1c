"""What one worker may ask of the others: a closed set of frozen requests.

A method is a generator that *yields* requests and is *sent* the answers. It does no I/O. Who carries a
request (torch.distributed, MPI, or N workers stepped in one process) is decided by a transport.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from distcomp.payload import Parts, Payload

Group = tuple[int, ...]
"""Ranks that take part in a request, in rising order; None stands for all of them."""


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Ask for the sum of ``x`` over the ranks: a plain all-reduce. Answer: a tensor like ``x``.

    The transport may use ``x`` as its buffer: the asker gives it away. On the wire:
    :func:`all_reduce_sent_bytes`.
    """

    x: Tensor
    kind: str = "values"
    group: Group | None = None


@dataclass(frozen=True, eq=False)
class AllGather:
    """Send ``payload`` to every rank. Answer: the payloads of all ranks, in rank order.

    ``parts`` names what each rank sends where that differs from rank to rank. On the wire: ``(n-1)``
    payloads.
    """

    payload: Payload
    parts: tuple[Parts, ...] | None = None
    group: Group | None = None


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Send ``payloads[i]`` to rank *i* (all-to-all). Answer: what each rank sent here, in rank order.

    Everything sent here has the parts of ``payloads[own rank]``. On the wire: all payloads but one's own.
    """

    payloads: tuple[Payload, ...]
    group: Group | None = None


@dataclass(frozen=True, eq=False)
class NeighborExchange:
    """Exchange ``payload`` with some neighbours only. Answer: their payloads, in the order of ``neighbours``.

    ``neighbours`` are ranks of the whole, also where a group is named: all of them belong to it.
    A neighbour that is lost answers None, where the transport was opened to go on without it. Neighbours are
    mutual. On the wire: one payload per neighbour, however many workers there are.
    """

    payload: Payload
    neighbours: tuple[int, ...]
    group: Group | None = None


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Take ``payload`` from rank ``source``. Answer: its payload (on every rank, the source included)."""

    payload: Payload
    source: int
    group: Group | None = None


Request = AllReduce | AllGather | AllToAll | NeighborExchange | Broadcast

DIRECT_BYTES = 8192
"""A tensor up to this size is summed by sending it to everyone: its cost is hops, not bytes."""


def is_summed_directly(nbytes: float, members: int) -> bool:
    """Whether a Sum of this size is carried in one hop, by everyone to everyone, instead of around a ring."""
    return nbytes <= DIRECT_BYTES and members <= 8


def all_reduce_sent_bytes(nbytes: float, members: int) -> int:
    """What each rank sends for the sum of a tensor: ``2 (n-1)/n`` of it around a ring, ``n-1`` times it
    directly."""
    if is_summed_directly(nbytes, members):
        return round((members - 1) * nbytes)
    return round(2 * (members - 1) / members * nbytes)


T = TypeVar("T")


class SharedAnswers(list[Any]):
    """What all of a group hear alike: one list for many workers in one process."""

    def __init__(self, said: Iterable[Any]) -> None:
        super().__init__(said)
        self.made: dict[Hashable, Tensor] = {}


def once(answers: Sequence[Any], name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, which every rank makes alike of what all have heard: in lock-step the first of them makes
    it, and the others get copies."""
    if not isinstance(answers, SharedAnswers):
        return make()
    if name not in answers.made:
        answers.made[name] = make()
    return answers.made[name].clone()


Rounds = Generator[Request, Any, T]
"""A exchange: yields requests, is sent their answers, returns a T."""


def within(group: Group, exchange: Rounds[T]) -> Rounds[T]:
    """The same exchange, held inside a group of ranks only. A source or a neighbour that it names is a
    place in the group."""
    try:
        request = next(exchange)
        while True:
            if isinstance(request, Broadcast):
                request = replace(request, source=group[request.source])
            elif isinstance(request, NeighborExchange):
                request = replace(request, neighbours=tuple(group[place] for place in request.neighbours))
            answer = yield replace(request, group=group)
            request = exchange.send(answer)
    except StopIteration as stop:
        value: T = stop.value
        return value
