"""Lightning Fabric on two processes, with gradients that accumulate."""

from pathlib import Path

import pytest
import torch
from torch import nn

from distcomp.integrations import files
from tests.integrations import agree

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("lightning", reason="not installed; pip install 'distcomp[lightning]'")


def train(method, steps, save, resume):
    from lightning.fabric import Fabric

    from distcomp.integrations.fabric import attach

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9))
    handle = attach(fabric, model, optimizer, method) if method else None
    begin = 0
    if resume is not None:
        fabric.load(resume / "fabric.pt", {"model": model, "optimizer": optimizer})
        files.load(handle, resume)
        begin = agree.HALF
    for index in range(2 * begin, 2 * steps):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * fabric.global_rank + index))
        with fabric.no_backward_sync(model, enabled=index % 2 == 0):
            fabric.backward(nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)))
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    if save is not None:
        fabric.save(save / "fabric.pt", {"model": model, "optimizer": optimizer})
        files.save(handle, save)
    sent_bytes = 0
    if handle is not None:
        assert handle.stats()["iterations"] == steps
        sent_bytes = handle.stats()["payload_bytes"]
        handle.detach()
    return agree.Trained(agree.flat(model.module), sent_bytes)


def job(rank, size, directory):
    agree.local(rank, size)
    return agree.show(train, directory)


def test_fabric(ranks, tmp_path: Path):
    agree.check(ranks(job, tmp_path), least_factor=12)
