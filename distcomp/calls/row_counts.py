"""How many rows does each rank send to each other? One small message before rows are routed."""

from __future__ import annotations

import torch
from torch import Tensor

from distcomp.calls.line import REMEDY, Call, line_of
from distcomp.calls.tensors import begin, nothing
from distcomp.collectives import AllToAll, Rounds
from distcomp.errors import DistcompError
from distcomp.methods.base import StepContext
from distcomp.payload import Part, Parts, Payload
from distcomp.runtime.unanimous import digest_of_words, same_words
from distcomp.transports.types import ProcessGroup

MOST_ROWS = 2**31 - 1
"""A count is an int32."""


def count_parts(pieces: int) -> Parts:
    """What one rank tells another: a digest of what it is about to do, and so many counts."""
    return (Part("digest", torch.int64, 1), Part("counts", torch.int32, pieces))


def exchange_counts(counts: Tensor, words: str, *, group: ProcessGroup | None = None) -> Tensor:
    """Tell rank j ``counts[j]``, of whole numbers ``[world size, numbers]``; returned is what each rank told
    this one, int64 ``[world size, numbers]`` on the CPU.

    ``words``: what the ranks are about to do, which is compared on the way: what they then call with
    ``agreed=True`` need not be. On the wire: ``(n-1) (32 + 8 + 4 numbers)`` bytes, in multiples of 8.

    Raises Mismatch on every rank, in the same words, where ``words`` differ; DistcompError for a count above
    2^31 - 1, or another shape; PeerLost.
    """
    line = line_of(group)
    told = counts.to(torch.int64).cpu()
    if told.ndim != 2 or len(told) != line.session.size or bool((told > MOST_ROWS).any()):
        raise DistcompError(
            f"counts of rows are [{line.session.size} ranks, numbers up to {MOST_ROWS}]; these are of shape "
            f"{tuple(told.shape)}"
        )
    received = torch.empty_like(told)

    def asked(context: StepContext) -> Rounds[Tensor]:
        parts = count_parts(told.shape[1])
        payloads = tuple(_payload(parts, words, row) for row in told)
        answers: list[Payload] = yield AllToAll(payloads)
        digests = [int(answer["digest"]) for answer in answers]
        yield from same_words(digests, words, REMEDY, torch.device("cpu"))
        return torch.cat([answer["counts"].to(torch.int64) for answer in answers])

    begin(line, Call(words, asked, exact=True, agreed=True), nothing(told.device), [received], False)
    return received


def _payload(parts: Parts, words: str, counts: Tensor) -> Payload:
    payload = Payload.empty(parts)
    payload["digest"].fill_(digest_of_words(words))
    payload["counts"].copy_(counts)
    return payload
