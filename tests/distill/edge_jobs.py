"""What ranks do to test codistillation of networks that have more than weights in float32."""

from __future__ import annotations

import torch
from torch import nn

import distcomp


def normalised(rank: int, size: int) -> tuple[float, int]:
    """Batches of mean 0 and shared rows of mean 100: the running mean, and the batches it counts."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    shared = 100 + torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    with distcomp.attach(model, optimizer, "codistill:period=1", shared=shared) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.arange(16) % 3).backward()
            optimizer.step()
        assert handle.stats()["disagreement"] > 0
    return float(model[0].running_mean.abs().max()), int(model[0].num_batches_tracked)


def checkpoints_refuse(rank: int, size: int) -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    try:
        text = "codistill:period=1,exchanged=checkpoints"
        distcomp.attach(model, optimizer, text, shared=torch.ones(4, 4)).detach()
    except distcomp.DistcompError as error:
        return str(error)
    return "nothing"


def in_bfloat16(rank: int, size: int) -> tuple[bool, float]:
    """Checkpoints of a bfloat16 model: did its weights move and stay finite; the disagreement."""
    torch.manual_seed(rank)
    model = nn.Linear(4, 3).bfloat16()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shared = torch.randn(6, 4, generator=torch.Generator().manual_seed(9)).bfloat16()
    text = "codistill:period=1,exchanged=checkpoints"
    with distcomp.attach(model, optimizer, text, shared=shared) as handle:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 4).bfloat16()).square().mean().backward()
            optimizer.step()
        said = float(handle.stats()["disagreement"])
    return bool(torch.isfinite(model.weight).all()) and not torch.equal(before, model.weight), said
