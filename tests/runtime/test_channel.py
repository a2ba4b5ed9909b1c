"""The door: what is sealed on one side is opened on the other, and what was spoilt between is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, Request
from distcomp.errors import CorruptPayload
from distcomp.payload import Part, Payload
from distcomp.runtime.channel import Answer, Channel, finite_flag
from distcomp.runtime.ledger import Ledger

PARTS = (Part("values", torch.float32, 4),)
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


class Wire:
    """A transport whose answers are given beforehand: ``waiting`` holds what the others sent."""

    started_s = finished_s = 0.0

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.waiting: Any = None

    def start(self, request: Request) -> Wire:
        if isinstance(request, AllReduce) and self.waiting is None:
            self.waiting = request.x
        return self

    def wait(self) -> Any:
        return self.waiting


def payload(value: float) -> Payload:
    made = Payload.empty(PARTS)
    made["values"].fill_(value)
    return made


def sealed_by(rank: int, fingerprint: int = 9, exchanges: int = 1, finite: Tensor = TRUE) -> Tensor:
    """What a rank puts on the wire in its ``exchanges``-th exchange."""
    channel = Channel(Wire(rank, 3), fingerprint, Ledger())
    for _ in range(exchanges):
        sent = payload(float(rank))
        channel.prepare(AllGather(sent), finite)
    return sent.wire


def receive(request: Request, wires: Any, rank: int = 0, finite: Tensor = TRUE) -> Answer:
    wire = Wire(rank, 3)
    wire.waiting = wires
    exchange = Channel(wire, 9, Ledger()).prepare(request, finite)
    exchange.start()
    exchange.wait()
    return exchange.open(watch=True)


def values(answer: Answer) -> list[float]:
    return [float(one["values"][0]) for one in answer.value]


def test_payloads_are_opened_in_the_order_of_their_senders() -> None:
    own = payload(0.0)
    answer = receive(AllGather(own), [own.wire, sealed_by(1), sealed_by(2)])
    assert values(answer) == [0, 1, 2]
    assert bool(answer.finite)
    answer = receive(AllToAll((own, payload(5), payload(6))), [own.wire, sealed_by(1), sealed_by(2)])
    assert values(answer) == [0, 1, 2]
    assert values(receive(NeighborExchange(payload(0.0), (2, 1)), [sealed_by(2), sealed_by(1)])) == [2, 1]
    assert float(receive(Broadcast(payload(0.0), 2), [sealed_by(2)]).value["values"][0]) == 2


def test_in_a_group_senders_are_its_members() -> None:
    answer = receive(AllGather(payload(0.0), group=(1, 2)), [sealed_by(1), sealed_by(2)], rank=1)
    assert values(answer) == [1, 2]


def test_a_longer_buffer_than_needed_is_cut() -> None:
    """Transports receive into equal slots; a chunk may be shorter than its slot."""
    padded = torch.cat([sealed_by(1), torch.zeros(64, dtype=torch.uint8)])
    assert values(receive(NeighborExchange(payload(0.0), (1,)), [padded])) == [1]


def flip(at: int) -> Callable[[Tensor], Tensor]:
    def spoil(wire: Tensor) -> Tensor:
        wire = wire.clone()
        wire[at] ^= 4
        return wire

    return spoil


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (flip(0), "magic"),
        (flip(16), "length"),
        (flip(24), "checksum"),
        (flip(33), "checksum"),
        (lambda _: sealed_by(1, fingerprint=10), "settings fingerprint is 10, expected 9"),
        (lambda _: sealed_by(1, exchanges=2), "exchange number is 2, expected 1"),
        (lambda _: sealed_by(2), "rank is 2, expected 1"),
    ],
    ids=["magic", "length", "checksum", "body", "fingerprint", "exchange", "rank"],
)
def test_what_was_spoilt_on_the_wire_is_an_error_naming_the_sender(
    spoil: Callable[[Tensor], Tensor], what: str
) -> None:
    with pytest.raises(CorruptPayload, match=f"rank 1 in exchange 1 is corrupt: {what}"):
        receive(NeighborExchange(payload(0.0), (1,)), [spoil(sealed_by(1))])


def test_one_senders_flag_makes_the_answer_non_finite() -> None:
    own = payload(0.0)
    answer = receive(AllGather(own), [own.wire, sealed_by(1), sealed_by(2, finite=FALSE)])
    assert not bool(answer.finite)
    assert values(answer) == [0, 1, 2]


def test_what_a_rank_that_is_not_finite_adds_to_a_sum_is_nan() -> None:
    answer = receive(AllReduce(torch.ones(3)), None, finite=FALSE)
    assert answer.value.isnan().all()
    assert not bool(answer.finite)
    answer = receive(AllReduce(torch.ones(3)), None)
    assert torch.equal(answer.value, torch.ones(3))
    assert bool(answer.finite)


def test_exchanges_are_numbered_and_the_number_comes_round() -> None:
    channel = Channel(Wire(0, 2), 9, Ledger())
    channel.exchange = 2**32 - 1
    sent = payload(1.0)
    channel.prepare(AllGather(sent), TRUE)
    assert channel.exchange == 0
    assert int.from_bytes(sent.wire[12:16].numpy().tobytes(), "little") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_finite_flag_sees_every_non_finite_value_of_every_type(dtype: torch.dtype) -> None:
    for numel in (0, 1, 7, 1000):
        x = torch.ones(numel, dtype=dtype)
        assert bool(finite_flag(x))
        if numel and dtype.is_floating_point:
            for value in (float("nan"), float("inf"), float("-inf")):
                for at in (0, numel - 1):
                    spoilt = x.clone()
                    spoilt[at] = value
                    assert not bool(finite_flag(spoilt))


def test_finite_flag_of_what_is_not_contiguous() -> None:
    x = torch.ones(4, 4)
    x[:, 1] = float("nan")
    assert bool(finite_flag(x[:, 0]))
    assert not bool(finite_flag(x[:, 1]))
