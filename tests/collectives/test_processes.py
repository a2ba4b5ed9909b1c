"""The same script over Gloo, between real processes: point to point, over sockets, and by torch's own
collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.collectives import ReduceScatter, Rounds
from distcomp.methods import StepContext
from distcomp.transports.gloo_p2p import GlooP2P
from distcomp.transports.heartbeat import Heartbeat
from distcomp.transports.sockets import SocketP2P, connected
from distcomp.transports.torchdist import TorchDist
from tests.collectives import script
from tests.collectives.toys import Maximum
from tests.lockstep import together


def over_sockets(group: Any, heartbeat: Heartbeat, timeout_s: float) -> GlooP2P:
    transport = connected(group, heartbeat, timeout_s, group.get_group_store())
    assert isinstance(transport, SocketP2P)
    return transport


CARRIERS = {"direct": GlooP2P, "sockets": over_sockets, "torchdist": TorchDist}


def carried(rank: int, size: int, name: str, lines: Any, spoilt: int | None = None) -> Any:
    """The script over one of the carriers; rank ``spoilt`` says that its tensor is not finite."""
    group = dist.group.WORLD
    heartbeat = Heartbeat(group.get_group_store(), rank, size, name)
    transport = CARRIERS[name](group, heartbeat, 60.0)
    try:
        answers = script.over(transport, lines, script.NOT_FINITE if rank == spoilt else script.FINITE)
        dist.barrier()  # rank 0 holds the store in which others may still be making the last group
        return answers
    finally:
        transport.close()
        heartbeat.close()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CARRIERS)
def test_every_answer_of_the_script_is_right(name: str, size: int, cluster) -> None:
    lockstep = together(script.script, [torch.ones(4)] * size)
    for rank, (right, sent, finite) in enumerate(cluster(size).run(carried, name, script.script)):
        assert len(right) == 2 * (len(script.DTYPES) + 1)
        assert [what for what, good in right.items() if not good] == []
        assert sent == dict(lockstep.ledgers[rank].sent_bytes)
        assert finite


def empty_piece(context: StepContext) -> Rounds[int]:
    piece: Tensor = yield ReduceScatter(torch.ones(4), (0, 4))
    return piece.numel()


@pytest.mark.parametrize("name", CARRIERS)
def test_the_owner_of_an_empty_piece_learns_of_a_nan_too(name: str, cluster) -> None:
    answers = cluster(2).run(carried, name, empty_piece, 1)
    assert [(numel, finite) for numel, _, finite in answers] == [(0, False), (4, False)]


def largest(context: StepContext) -> Rounds[list[float]]:
    answer: Tensor = yield Maximum(torch.tensor([1.0, -5.0]) * (context.rank + 1))
    return answer.tolist()


@pytest.mark.parametrize("name", CARRIERS)
def test_a_collective_that_nobody_knows_is_carried_between_processes(name: str, cluster) -> None:
    assert cluster(2).run(carried, name, largest) == [([2.0, -5.0], {"header": 32, "values": 8}, True)] * 2
