"""What the ranks do in the tests: layers of which each example takes a part, under DDP."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.conditional import BlockPolicy, GatedStage
from tests.conditional.depth_jobs import alike


class Deciding(nn.Module):
    """On rank 0 no example goes through the stage."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = BlockPolicy(6, 12, 4, rate=0.3)
        self.stage = GatedStage(nn.Linear(12, 12), 12, bias=0.0)
        self.head = nn.Linear(12, 3)
        self.shift = -1e6 if rank == 0 else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        self.stage.gate.register_forward_hook(lambda module, arguments, out: out + self.shift)
        scores: torch.Tensor = self.head(self.stage(h))
        return scores


def zeros_are_sent(rank: int, size: int) -> tuple[bool, list[int]]:
    """Without find_unused_parameters: replicas alike; bytes of each step."""
    model = DistributedDataParallel(Deciding(rank))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sent = []
    with distcomp.attach(model, optimizer, "qsgd:bits=4") as handle:
        for step in range(5):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * rank + step))
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1), reduction="none")
            (losses.mean() + model.module.layer.losses(losses)).backward()
            optimizer.step()
            sent.append(handle.stats()["last"]["payload_bytes"])
    return alike(model), sent
