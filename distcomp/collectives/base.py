"""What every collective declares: who takes part, what it sends, how it is carried, what its answer is.

A collective is a small frozen dataclass in one file. The channel, the ledger, every transport, lock-step, the
prices of :mod:`distcomp.network` and the two-level method ask it what they need to know, by the methods of
:class:`Request`; none of them looks at its type. One that sends sealed payloads derives from :class:`Sealed`,
which answers most of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.payload import Parts, Payload, body_bytes, wire_bytes

Group = tuple[int, ...]
"""Ranks that take part in a request, in rising order; None stands for all of them."""

Bytes = Counter[str]
"""Bytes by kind (values, codes, scales, indices, header)."""

SealFor = Callable[[int, Payload], None]
"""Writes the header of a payload that comes from a given rank."""

Unseal = Callable[[int, Parts, Tensor], Payload]
"""Checks a buffer that came from a given rank and must hold given parts; raises CorruptPayload."""


class Pending(Protocol):
    """A request under way."""

    @property
    def started_s(self) -> float:
        """When the network began with it (``time.perf_counter``); known once it has been waited for."""

    @property
    def finished_s(self) -> float:
        """When the network was done with it; known once it has been waited for."""

    def wait(self) -> Any:
        """Block until the answer is there. Raises PeerLost if it never will be."""


class Primitives(Protocol):
    """What a transport can do; every collective is carried by these.

    Buffers are flat uint8 tensors. Sizes are in bytes and never zero: a payload has a header. ``group`` names
    the ranks that take part (None: all); lists are in the order of its ranks.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor, group: Group | None) -> Pending:
        """The sum over the ranks of a tensor of any shape and dtype; ``x`` may be used as a buffer."""

    def all_gather(self, wire: Tensor, sizes: Sequence[int], group: Group | None) -> Pending:
        """The buffer of every rank, one's own included, the i-th of at least ``sizes[i]`` bytes."""

    def all_to_all(self, wires: Sequence[Tensor], sizes: Sequence[int], group: Group | None) -> Pending:
        """Send ``wires[i]`` to the i-th rank. What each rank sent here, ``sizes[i]`` bytes from the i-th."""

    def neighbor_exchange(
        self, wires: Sequence[Tensor], neighbors: Sequence[int], sizes: Sequence[int], group: Group | None
    ) -> Pending:
        """Send ``wires[k]`` to rank ``neighbors[k]`` and receive ``sizes[k]`` bytes from it. None for a
        neighbor that is lost, where the transport goes on without it."""

    def broadcast(self, wire: Tensor, source: int, group: Group | None) -> Pending:
        """The buffer of rank ``source``, in a list of one; the others' ``wire`` may be used for it."""


@dataclass(frozen=True)
class Traffic:
    """What a request puts on a network, in bytes: what :mod:`distcomp.network` prices.

    ``pattern``: all_reduce, all_gather, all_to_all, neighbor_exchange or broadcast. ``sizes``: bytes that
    each member sends (all_gather), that go to each member (all_to_all), or one number. ``chunked``: the
    sizes are cuts of something that all members cover together.
    """

    pattern: str
    sizes: tuple[float, ...]
    chunked: bool = False


class Request(ABC):
    """What one worker asks of the others. Subclasses are frozen dataclasses with a field ``group``."""

    group: Group | None

    sealed: ClassVar[bool] = True
    """Whether all that is sent has a header, which tells if the sender's tensor was finite."""

    alike: ClassVar[bool] = False
    """Whether all ranks of the group are answered the same; in lock-step it is made once for all."""

    # ---------------------------------------------------------------------------------------- who takes part

    def members(self, size: int) -> Group:
        """The ranks that take part, of ``size`` in all."""
        return self.group or tuple(range(size))

    def position(self, rank: int) -> int:
        """Where a rank stands among the members."""
        return self.group.index(rank) if self.group else rank

    @property
    def neighbors_only(self) -> Group | None:
        """The ranks that this one waits for, where it does not wait for the whole group."""
        return None

    @property
    def leads(self) -> bool:
        """Whether it says only how long the next request is, which then follows as soon as it is answered."""
        return False

    def within(self, group: Group) -> Self:
        """The same, asked inside a group: ranks that it names were places in the group."""
        return replace(self, group=group)  # type: ignore[type-var]

    @abstractmethod
    def signature(self) -> tuple[object, ...]:
        """What all members must have in common, beside the type."""

    def check_against(self, rank: int, asked: Sequence[Any]) -> None:  # noqa: B027  (most have nothing more)
        """Raise Mismatch where ``rank``, which asks this, does not fit with what others ask (by rank)."""

    def check_one_each(self, count: int, size: int) -> None:
        """Raise DistcompError unless there are as many of what goes to each member as there are members."""
        members = len(self.members(size))
        if count != members:
            raise DistcompError(
                f"{type(self).__name__} among {members} ranks was given {count} pieces; "
                "give one for each rank, an empty one where there is nothing to send"
            )

    # ------------------------------------------------------------------------------------------ what is sent

    def sends(self) -> tuple[Payload, ...]:
        """The payloads to be sealed; one that goes to many may be named once or often."""
        return ()

    def poisoned(self, finite: Tensor) -> Self:
        """The request as it is sent: what has no header becomes NaN where the rank's tensor is not finite."""
        return self

    @abstractmethod
    def sent_bytes(self, rank: int, size: int) -> Bytes:
        """What this rank sends."""

    @abstractmethod
    def mean_sent_bytes(self, size: int) -> float:
        """What a rank sends, on average over the ranks, where all others ask alike."""

    @abstractmethod
    def traffic(self, size: int) -> Traffic:
        """What all ranks send, where all others ask alike."""

    def messages(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        """(to which rank, how many bytes), where :meth:`traffic` of one rank does not give it for all: then
        every rank's request must be asked. Empty otherwise."""
        return ()

    def hops(self, size: int) -> int:
        """Messages that wait for one another."""
        return 1

    @abstractmethod
    def drive(self, line: Primitives) -> Pending:
        """Begin to carry it by a transport's primitives."""

    # -------------------------------------------------------------------------------------- what is received

    @abstractmethod
    def open(self, received: Any, rank: int, size: int, check_header: Unseal) -> Any:
        """The answer, from what :meth:`drive` brought."""

    @abstractmethod
    def delivered(self, rank: int, asked: Sequence[Any]) -> Any:
        """What reaches ``rank`` when all ask (by rank) in one process: payloads, or a tensor."""

    @abstractmethod
    def read(self, delivered: Any) -> Any:
        """The answer, from what was delivered."""

    @abstractmethod
    def echo(self, rank: int, size: int, write_header: SealFor) -> Any:
        """What :meth:`drive` would bring if every rank sent what this rank sends; zeros where that does not
        fit."""

    def made_up(self, rank: int, size: int) -> Any:
        """An answer of the right shape, without anybody else: that of :meth:`echo`."""
        received = self.echo(rank, size, lambda sender, payload: None)
        return self.open(received, rank, size, lambda sender, parts, wire: Payload(wire, parts))

    # ---------------------------------------------------------------------------------- carried by several

    def share(self, index: int, count: int) -> Self:
        """The ``index``-th of ``count`` equal parts of the request; its answer is such a part of the answer.

        Raises DistcompError where it cannot be cut.
        """
        raise DistcompError(
            f"{type(self).__name__} between nodes is not carried in parts (gossip is not); give across a "
            "method of gradients"
        )

    def answer_parts(self, rank: int, size: int) -> Sequence[Parts]:
        """What the answer consists of, as payloads."""
        raise NotImplementedError

    def mean_answer_parts(self, size: int) -> Sequence[Parts]:
        """As :meth:`answer_parts`, on average over the ranks where they differ."""
        return self.answer_parts(0, size)

    def packed(self, answer: Any) -> list[Payload]:
        """The answer as payloads."""
        raise NotImplementedError

    def unpacked(self, payloads: list[Payload]) -> Any:
        """The answer that was packed."""
        raise NotImplementedError


class SharedAnswers(list[Any]):
    """What all of a group receive alike: one list for many workers in one process."""

    def __init__(self, said: Iterable[Any]) -> None:
        super().__init__(said)
        self.made: dict[Hashable, Tensor] = {}


class Sealed(Request):
    """A request that sends payloads. A subclass declares who sends (by default all members), what is sent to
    whom, and what must arrive."""

    def senders(self, size: int) -> Group:
        """The ranks whose payloads are received, in the order of the answer."""
        return self.members(size)

    @abstractmethod
    def sends(self) -> tuple[Payload, ...]: ...

    @abstractmethod
    def payload_to(self, position: int) -> Payload:
        """What the member at ``position`` is sent by who asks this."""

    @abstractmethod
    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        """What each sender's payload to ``rank`` consists of."""

    def wire_sizes(self, rank: int, size: int) -> list[int]:
        """The bytes that come from each sender."""
        return [wire_bytes(parts) for parts in self.expected(rank, size)]

    def open(self, received: Any, rank: int, size: int, check_header: Unseal) -> Any:
        senders, expected = self.senders(size), self.expected(rank, size)
        return self.read(
            [
                None if wire is None else check_header(sender, parts, wire)  # None: a neighbor that is lost
                for sender, parts, wire in zip(senders, expected, received, strict=True)
            ]
        )

    def delivered(self, rank: int, asked: Sequence[Any]) -> list[Payload]:
        position = self.position(rank)
        payloads = [asked[sender].payload_to(position) for sender in self.senders(len(asked))]
        # One list for all: what every rank computes alike from it is then computed once (collectives.once).
        return SharedAnswers(payloads) if self.alike else payloads

    def read(self, delivered: list[Any]) -> Any:
        return delivered

    def echo(self, rank: int, size: int, write_header: SealFor) -> list[Tensor]:
        # A copy for each sender, for each is given a header of its own.
        own, wires = self.payload_to(self.position(rank)), []
        for sender, parts in zip(self.senders(size), self.expected(rank, size), strict=True):
            said = Payload(own.wire.clone(), parts) if parts == own.parts else zeros(parts)
            write_header(sender, said)
            wires.append(said.wire)
        return wires

    def answer_parts(self, rank: int, size: int) -> Sequence[Parts]:
        return self.expected(rank, size)

    def packed(self, answer: Any) -> list[Payload]:
        payloads: list[Payload] = answer
        return payloads

    def unpacked(self, payloads: list[Payload]) -> Any:
        return self.read(payloads)


def zeros(parts: Parts) -> Payload:
    """A payload of zeros."""
    return Payload(torch.zeros(wire_bytes(parts), dtype=torch.uint8), parts)


def counted(parts: Parts, times: float) -> Bytes:
    """The bytes of a payload of these parts sent so many times; padding counts as header."""
    return Counter(_counted(parts, times))


@lru_cache(maxsize=4096)
def _counted(parts: Parts, times: float) -> Bytes:
    """As :func:`counted`, and the same for all who ask."""
    sent: Bytes = Counter(header=round((wire_bytes(parts) - body_bytes(parts)) * times))
    for part in parts:
        sent[part.kind] += round(part.nbytes * times)
    return sent
