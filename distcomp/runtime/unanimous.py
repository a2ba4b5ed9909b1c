"""Are all ranks about to ask the same? Digests are compared; where they differ, ranks say what they ask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distcomp.collectives import AllGather, Rounds
from distcomp.errors import Mismatch
from distcomp.methods.base import AggregateResult, State, StepContext
from distcomp.payload import Part, Payload

LONGEST_WORDS = 512


@dataclass(frozen=True)
class Numbers:
    """Every rank sends a number of 63 bits; the estimate holds them all, in rank order."""

    own: int
    propagates_nonfinite: bool = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        numbers = yield from numbers_of_all([self.own], x.device)
        return AggregateResult(numbers[:, 0], lambda: numbers[:, 0], state)


@dataclass(frozen=True)
class Unanimous:
    """An exchange of nothing but :func:`unanimous`."""

    words: str
    remedy: str
    propagates_nonfinite: bool = True

    def aggregate(self, x: Tensor, state: State, context: StepContext) -> Rounds[AggregateResult]:
        yield from unanimous(self.words, self.remedy, x.device)
        return AggregateResult(x, lambda: x, state)


def numbers_of_all(own: list[int], device: torch.device) -> Rounds[Tensor]:
    """Every rank's numbers of 63 bits, as many of each: int64 ``[world size, len(own)]``."""
    payload = Payload.empty((Part("digest", torch.int64, len(own)),), device)
    payload["digest"].copy_(torch.tensor(own, dtype=torch.int64))
    payloads: list[Payload] = yield AllGather(payload)
    return torch.stack([payload["digest"] for payload in payloads])


def unanimous(
    words: str, remedy: str, device: torch.device, names: Sequence[int] | None = None
) -> Rounds[None]:
    """Raise Mismatch on every rank, in the same words, unless all were given these ``words``.

    ``names``: what ranks are called in the message, where they are not numbered from 0. On the wire: a digest
    of 8 bytes and its header to every other rank; the words where they differ.
    """
    digests = (yield from numbers_of_all([digest_of_words(words)], device))[:, 0].tolist()
    yield from same_words(digests, words, remedy, device, names)


def digest_of_words(words: str) -> int:
    """A number of 56 bits."""
    return _digest(words.encode())


def digest_of_values(x: Tensor) -> int:
    """A number of 56 bits: of the bytes of a tensor, which is contiguous."""
    return _digest(x.detach().cpu().view(torch.uint8).numpy().data)


def _digest(of: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.sha256(of).digest()[:7], "little")


def same_words(
    digests: Sequence[int],
    words: str,
    remedy: str,
    device: torch.device,
    names: Sequence[int] | None = None,
) -> Rounds[None]:
    """Raise Mismatch, as :func:`unanimous`, where the ranks' digests differ. On the wire: nothing; the words
    where they differ."""
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not odd:
        return
    payload = Payload.empty((Part("words", torch.uint8, LONGEST_WORDS),), device)
    encoded = words.encode()[:LONGEST_WORDS].ljust(LONGEST_WORDS)
    payload["words"].copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    payloads: list[Payload] = yield AllGather(payload)
    texts = [bytes(one["words"].tolist()).decode(errors="replace").strip() for one in payloads]
    called = range(len(texts)) if names is None else names
    raise Mismatch(
        f"ranks ask to exchange different things: rank {called[0]} {texts[0]}, rank {called[odd[0]]} "
        f"{texts[odd[0]]}; {remedy}"
    )
