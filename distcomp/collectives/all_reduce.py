"""All-reduce: the sum of a tensor over the ranks, on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from distcomp.collectives.base import Bytes, Group, Pending, Primitives, Request, SealFor, Traffic, Unseal
from distcomp.collectives.partition import share_of, share_width
from distcomp.payload import Part, Parts, Payload

DIRECT_BYTES = 8192
"""A tensor up to this size is summed by sending it to everyone: its cost is hops, not bytes."""
PIECES_BYTES = 64 << 20
"""Up to here each rank adds a piece and sends it to everyone: two hops, and memory for the others' terms. A
larger sum goes around a ring."""
PIECES_MEMBERS = 64
"""With more members, each would hold too many connections."""
DIRECT_MEMBERS = 8
"""With more members, the copies cost more than a ring's hops."""


@dataclass(frozen=True, eq=False)
class AllReduce(Request):
    """Ask for the sum of ``x`` over the ranks: a plain all-reduce. Answer: a tensor like ``x``.

    The transport may use ``x`` as its buffer: the asker gives it away. There is no header, so a rank whose
    tensor is not finite adds NaN, if ``x`` is floating point. On the wire: :func:`all_reduce_sent_bytes`.
    """

    x: Tensor
    kind: str = "values"
    group: Group | None = None

    sealed: ClassVar[bool] = False
    alike: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.x.numel() * self.x.element_size()

    def signature(self) -> tuple[object, ...]:
        return (tuple(self.x.shape), self.x.dtype, self.group)

    def poisoned(self, finite: Tensor) -> Self:
        x = self.x
        if not x.is_floating_point():
            return self
        if x.device.type == "cpu":
            # The buffer was given away, so it may be overwritten; no copy in the usual case, either.
            return self if finite else replace(self, x=x.fill_(float("nan")))
        return replace(
            self, x=torch.where(finite, x, torch.full((), float("nan"), dtype=x.dtype, device=x.device))
        )

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        return Counter({self.kind: all_reduce_sent_bytes(self.nbytes, len(self.members(size)))})

    def mean_sent_bytes(self, size: int) -> float:
        return all_reduce_sent_bytes(self.nbytes, len(self.members(size)))

    def traffic(self, size: int) -> Traffic:
        return Traffic("all_reduce", (self.nbytes,))

    def hops(self, size: int) -> int:
        """The steps of a ring, or one."""
        members = len(self.members(size))
        if is_summed_directly(self.nbytes, members):
            return 1
        return 2 if is_summed_in_pieces(self.nbytes, members) else 2 * (members - 1)

    def drive(self, line: Primitives) -> Pending:
        return line.all_reduce(self.x, self.group)

    def open(self, received: Any, rank: int, size: int, check_header: Unseal) -> Any:
        return received

    def delivered(self, rank: int, asked: Sequence[Any]) -> Tensor:
        return in_rank_order([asked[member].x for member in self.members(len(asked))])

    def read(self, delivered: Tensor) -> Tensor:
        """A copy for each: it is the asker's buffer."""
        return delivered.clone()

    def echo(self, rank: int, size: int, write_header: SealFor) -> Tensor:
        return self.x

    def share(self, index: int, count: int) -> Self:
        width = share_width(self.x.numel(), count)
        return replace(self, x=share_of(self.x.reshape(-1), index, self.x.new_empty(width)))

    def answer_parts(self, rank: int, size: int) -> Sequence[Parts]:
        return [(Part(self.kind, self.x.dtype, self.x.numel()),)]

    def packed(self, answer: Tensor) -> list[Payload]:
        payload = Payload.empty((Part(self.kind, answer.dtype, answer.numel()),), answer.device)
        payload[self.kind].copy_(answer.reshape(-1))
        return [payload]

    def unpacked(self, payloads: list[Payload]) -> Tensor:
        return payloads[0][self.kind].view_as(self.x)


def is_summed_directly(nbytes: float, members: int) -> bool:
    """Whether a sum of this size is carried in one hop, by everyone to everyone, instead of around a ring."""
    return nbytes <= DIRECT_BYTES and members <= DIRECT_MEMBERS


def is_summed_in_pieces(nbytes: float, members: int) -> bool:
    """Whether each rank adds one piece of a sum of this size, where a transport can."""
    fits = nbytes <= PIECES_BYTES and members <= PIECES_MEMBERS
    return fits and not is_summed_directly(nbytes, members)


def all_reduce_sent_bytes(nbytes: float, members: int) -> int:
    """What each rank sends for the sum of a tensor: ``2 (n-1)/n`` of it around a ring, ``n-1`` times it
    directly."""
    if is_summed_directly(nbytes, members):
        return round((members - 1) * nbytes)
    return round(2 * (members - 1) / members * nbytes)


def in_rank_order(terms: Sequence[Tensor]) -> Tensor:
    """``((x_0 + x_1) + x_2) + ...``, in a tensor of its own: the same bits on every rank and over every
    transport."""
    # Floating-point addition is not associative: who adds in another order holds another model.
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total
