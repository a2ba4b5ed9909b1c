"""What ranks do that watch themselves wait."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp import calls
from distcomp.attaching.observe_waits import WaitingStep, observe_waits
from distcomp.conditional import keep_experts_local
from distcomp.conditional.expert_traffic import balance_call_bytes, count_call_bytes, row_call_bytes
from tests.conditional.expert_jobs import EXPERTS, WIDTH, loss_of, mixture, tokens_of


def observed(rank: int, size: int) -> tuple[WaitingStep, list[tuple[int, int, float]], float]:
    """A mixture's steps; the messages of its first rows, and the mean bytes of its calls."""
    moe = mixture("one", parallel=dist.group.WORLD)
    keep_experts_local(moe)
    model = DistributedDataParallel(moe)
    x = tokens_of(rank).requires_grad_()
    with distcomp.attach(model, method="identity"):
        found = observe_waits(lambda: (loss_of(model, x) + moe.balance_loss).backward(), 3)
    each = EXPERTS // size
    to = [sum(moe.routing.by_expert[other * each : (other + 1) * each]) for other in range(size)]
    everyone: list[list[int]] = [[] for _ in range(size)]
    dist.all_gather_object(everyone, to)
    rows = [
        (here, there, float(row_call_bytes([everyone[here][there]], WIDTH, "identity")))
        for here in range(size)
        for there in range(size)
        if here != there
    ]
    small = count_call_bytes(each, size) + 2 * balance_call_bytes(EXPERTS, size)
    calls.disconnect()
    return found, rows, small + 4 * sum(nbytes for _, _, nbytes in rows) / size


def unequal(rank: int, size: int) -> str:
    """Steps that call once and twice, in turn."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        for _ in range(1 + steps % 2):
            calls.all_gather(torch.empty(size), torch.ones(1), agreed=True)

    try:
        observe_waits(step, 3)
    except distcomp.DistcompError as error:
        return str(error)
    finally:
        calls.disconnect()
    return "nothing"
