"""What the audit says of a step, beside what the queue of each rank's interface has counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distcomp.network import Fabric, emulate
from distcomp.network.launch import show_nothing

SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
size = dist.get_world_size()
model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))
if sys.argv[1] == "ddp":
    model = DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (size,))
    if sys.argv[1] == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
while True:
    optimizer.zero_grad()
    model(torch.randn(8, 512)).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
@pytest.mark.usefixtures("any_way")
def test_an_audit_is_within_three_per_cent_of_the_interface(kind: str, ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "distcomp", "audit", "--steps", "3", "--json", str(script), kind]
    with emulate(Fabric.uniform(ranks, "1gbit", "0ms")) as net:
        result = net.launch(command, show=show_nothing)
    assert result.ok, result.outputs
    output = result.outputs[0]
    found = json.loads(output[output.index("{\n") :])
    assert found["steps"] == 3
    assert found["sent_bytes"] == pytest.approx(found["interface_payload_bytes"], rel=0.03)
    assert found["interface_bytes"] > 1.03 * found["interface_payload_bytes"]
