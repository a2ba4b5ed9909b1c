"""A collective as somebody would add one: all of it in this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from distcomp.collectives import Group, Pending, Primitives, Sealed, Traffic
from distcomp.collectives.base import Bytes, counted
from distcomp.payload import Part, Parts, Payload, wire_bytes


@dataclass(frozen=True, eq=False)
class Maximum(Sealed):
    """Ask for the largest value over the ranks, element by element, of the flat ``x``."""

    x: Tensor
    group: Group | None = None

    alike: ClassVar[bool] = True

    @cached_property
    def payload(self) -> Payload:
        payload = Payload.empty(self.parts)
        payload["values"].copy_(self.x)
        return payload

    @property
    def parts(self) -> Parts:
        return (Part("values", self.x.dtype, self.x.numel()),)

    def signature(self) -> tuple[object, ...]:
        return (self.parts, self.group)

    def sends(self) -> tuple[Payload, ...]:
        return (self.payload,)

    def payload_to(self, place: int) -> Payload:
        return self.payload

    def expected(self, rank: int, size: int) -> Sequence[Parts]:
        return [self.parts] * len(self.members(size))

    def read(self, delivered: list[Any]) -> Tensor:
        return torch.stack([payload["values"] for payload in delivered]).amax(0)

    def sent_bytes(self, rank: int, size: int) -> Bytes:
        return counted(self.parts, len(self.members(size)) - 1)

    def mean_sent_bytes(self, size: int) -> float:
        return (len(self.members(size)) - 1) * wire_bytes(self.parts)

    def traffic(self, size: int) -> Traffic:
        return Traffic("all_gather", tuple(self.wire_sizes(0, size)))

    def drive(self, line: Primitives) -> Pending:
        return line.all_gather(self.payload.wire, self.wire_sizes(line.rank, line.size), self.group)
