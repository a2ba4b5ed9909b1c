"""One script of requests for lock-step, real processes and MPI; the answers by plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distcomp.collectives import AllToAll, Group, ReduceScatter, Rounds, within
from distcomp.layout import Layout
from distcomp.methods import StepContext
from distcomp.payload import Part, Parts, Payload
from distcomp.randomness import Key
from distcomp.runtime.channel import Answer, Channel, Transport
from distcomp.runtime.ledger import Ledger

LAYOUT = Layout.of([("w", (4,))])
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64)


def over(transport: Transport, lines: Callable[[StepContext], Rounds[Any]], finite: Tensor = FINITE) -> Any:
    """The script over a transport: (what it returned, the ledger, whether all were finite)."""
    ledger = Ledger()
    channel = Channel(transport, 0, ledger)
    asking = lines(StepContext(transport.rank, transport.size, LAYOUT, 0, Key.of(0)))
    all_finite = finite
    try:
        request = next(asking)
        while True:
            exchange = channel.prepare(request, finite)
            exchange.start()
            exchange.wait()
            answer: Answer = exchange.open(watch=True)
            all_finite = all_finite & answer.finite
            request = asking.send(answer.value)
    except StopIteration as stop:
        return stop.value, dict(ledger.sent_bytes), bool(all_finite)


# -------------------------------------------------------------------------------- the script, and the answers


def pieces(size: int) -> tuple[int, ...]:
    """Uneven, one of them empty, one large."""
    return (0, 5, 70_001, 1)[:size] if size > 1 else (3,)


def tensor(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    x = torch.randint(-9, 10, (numel,), generator=torch.Generator().manual_seed(rank))
    return (x / 7).to(dtype) if dtype.is_floating_point else x.to(dtype)


def parts(sender: int, to: int) -> Parts:
    """What ``sender`` sends to ``to``: of many sizes, none symmetric, some empty, one large."""
    codes = 60_000 if (sender, to) == (1, 0) else (5 * sender + 3 * to * to) % 7 - 1
    return (
        Part("scales", torch.float32, (sender + 2 * to) % 3),
        Part("codes", torch.uint8, max(0, codes)),
    )


def message(sender: int, to: int) -> Payload:
    payload = Payload.empty(parts(sender, to))
    payload["scales"].fill_(sender + to / 16)
    payload["codes"].copy_(torch.arange(payload["codes"].numel()) % 97 + 8 * sender + to)
    return payload


def uneven_swap(rank: int, members: Sequence[int]) -> AllToAll:
    """Every one of ``members`` its message; what must come is declared."""
    return AllToAll(
        tuple(message(rank, to) for to in members), parts=tuple(parts(sender, rank) for sender in members)
    )


def same_message(got: Payload, wanted: Payload) -> bool:
    return got.parts == wanted.parts and all(torch.equal(got[p.kind], wanted[p.kind]) for p in wanted.parts)


def scattered(rank: int, members: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Of the sum in rank order, the piece of one of ``members``."""
    sizes = pieces(len(members))
    total = tensor(members[0], sum(sizes), dtype)
    for other in members[1:]:
        total = total + tensor(other, sum(sizes), dtype)
    return torch.split(total, list(sizes))[members.index(rank)]


def script(context: StepContext) -> Rounds[dict[str, bool]]:
    """Reduce-scatters and uneven all-to-alls among all, then within two groups: the first and the last rank,
    and whoever is between. Whether each answer is right."""
    right: dict[str, bool] = {}
    everyone = tuple(range(context.size))
    edge = tuple(dict.fromkeys((0, context.size - 1)))
    group: Group = edge if context.rank in edge else tuple(rank for rank in everyone if rank not in edge)
    yield from _checked(right, "all", context.rank, everyone)
    yield from within(group, _checked(right, "group", context.rank, group))
    return right


def _checked(right: dict[str, bool], name: str, rank: int, members: Group) -> Rounds[None]:
    sizes = pieces(len(members))
    for dtype in DTYPES:
        piece = yield ReduceScatter(tensor(rank, sum(sizes), dtype), sizes)
        right[f"{name}: reduce-scatter of {dtype}"] = torch.equal(piece, scattered(rank, members, dtype))
    received = yield uneven_swap(rank, members)
    right[f"{name}: all-to-all"] = len(received) == len(members) and all(
        same_message(got, message(sender, rank)) for got, sender in zip(received, members, strict=True)
    )
