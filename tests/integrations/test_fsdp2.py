"""A loop in torchtitan's style: FSDP2 over two shards, and over two replicas; distributed checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.integrations import agree


def train(names, method, steps, save, resume):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import distcomp.integrations.fsdp2 as integration

    shape = (1, 2) if names == "shards" else (2, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 8))
    for block in (model[0], model[2], model):
        fully_shard(block, mesh=mesh["dp_shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = integration.attach(model, optimizer, method, mesh)
    begin = 0
    if resume is not None:
        integration.load(resume, model, optimizer, handle)
        begin = agree.HALF
    for index in range(begin, steps):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * dist.get_rank() + index))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
    if save is not None:
        integration.save(save, model, optimizer, handle)
    sent_bytes = handle.stats()["payload_bytes"]
    handle.detach()
    return agree.Trained(agree.flat(model), sent_bytes)


def job(rank, size, names, directory):
    agree.local(rank, size)
    plain = "identity"
    return agree.show(lambda method, *others: train(names, method or plain, *others), directory, plain)


@pytest.mark.parametrize("names", ["shards", "replicas"])
def test_an_fsdp2_loop(ranks, tmp_path: Path, names):
    agree.check(ranks(job, names, tmp_path), least_factor=12)
