"""What the ledger counts, by arithmetic."""

from __future__ import annotations

import pytest
import torch

from distcomp.collectives import AllGather, AllReduce, AllToAll, Broadcast, NeighborExchange, Request
from distcomp.payload import Part, Payload, wire_bytes
from distcomp.runtime.ledger import Ledger

LARGE = 10_000
"""float32 values: more than is summed in one hop."""


def payload(codes: int) -> Payload:
    return Payload.empty((Part("scales", torch.float32, 2), Part("codes", torch.uint8, codes)))


def counted(request: Request, rank: int = 0, size: int = 4) -> dict[str, int]:
    ledger = Ledger()
    ledger.count(request, rank, size)
    assert ledger.requests == {type(request).__name__: 1}
    assert ledger.total_bytes == sum(ledger.sent_bytes.values())
    return {kind: count for kind, count in ledger.sent_bytes.items() if count}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_a_large_sum_is_a_ring(size: int) -> None:
    nbytes = 2 * (size - 1) / size * 4 * LARGE
    assert counted(AllReduce(torch.ones(LARGE)), size=size).get("values", 0) == round(nbytes)


def test_a_sum_is_counted_under_its_kind_in_its_type_and_group() -> None:
    assert counted(AllReduce(torch.ones(LARGE, dtype=torch.bfloat16), kind="codes")) == {"codes": 3 * LARGE}
    assert counted(AllReduce(torch.ones(LARGE), group=(1, 3)), rank=1) == {"values": 4 * LARGE}


def test_a_gather_is_the_payload_to_every_other() -> None:
    assert counted(AllGather(payload(8))) == {"header": 3 * 32, "scales": 3 * 8, "codes": 3 * 8}


def test_padding_is_counted_as_header() -> None:
    sent = counted(AllGather(payload(5)))
    assert sent == {"header": 3 * (32 + 3), "scales": 3 * 8, "codes": 3 * 5}
    assert sum(sent.values()) == 3 * wire_bytes(payload(5).parts)


def test_a_swap_is_all_payloads_but_ones_own() -> None:
    payloads = tuple(payload(codes) for codes in (8, 16, 24, 32))
    assert counted(AllToAll(payloads), rank=1) == {"header": 3 * 32, "scales": 3 * 8, "codes": 8 + 24 + 32}
    assert counted(AllToAll(payloads[:2], group=(1, 3)), rank=3)["codes"] == 8


def test_mix_is_one_payload_per_neighbour() -> None:
    assert counted(NeighborExchange(payload(8), (1, 3))) == {"header": 64, "scales": 16, "codes": 16}
    assert counted(NeighborExchange(payload(8), ())) == {}


def test_a_broadcast_is_shared_out_over_the_ranks() -> None:
    ranks = [counted(Broadcast(payload(8), 0), rank=rank) for rank in range(4)]
    assert sum(sum(sent.values()) for sent in ranks) == 3 * wire_bytes(payload(8).parts)


def test_counts_add_up() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.count(AllGather(payload(8)), 0, 2)
    assert ledger.total_bytes == 3 * 48
    assert ledger.requests == {"AllGather": 3}


def test_alone_nothing_is_sent() -> None:
    everything = [
        AllReduce(torch.ones(5)),
        AllGather(payload(8)),
        AllToAll((payload(8),)),
        NeighborExchange(payload(8), ()),
    ]
    assert all(counted(request, size=1) == {} for request in [*everything, Broadcast(payload(8), 0)])
