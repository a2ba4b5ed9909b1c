"""Gloo and torchrun in an emulated network: a collective's bytes, and one agent on each of two hosts."""

from __future__ import annotations

import sys
from pathlib import Path

from distcomp.network import Fabric, emulate
from distcomp.network.launch import show_nothing

REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.full((250_000,), float(dist.get_rank() + 1))
dist.all_reduce(x)
print("sum", x[0].item(), "of", dist.get_world_size(), "on", os.environ["GLOO_SOCKET_IFNAME"])
dist.destroy_process_group()
"""


def test_torchrun_spans_two_emulated_hosts(any_way: bool, tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(REDUCE)
    with emulate(Fabric.uniform(2, "100mbit"), True, selftest=False, force_rootless=any_way) as net:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += [f"--master-addr={net.addresses[0]}", "--master-port=29600"]
        agents = {host: [*torchrun, f"--node-rank={host}", str(script)] for host in range(2)}
        result = net.run_on(agents).wait(timeout_s=240, show=show_nothing)
        sent_bytes = [traffic.sent.sent_bytes for traffic in net.counters()]
    assert result.ok, result.outputs
    for host in range(2):
        assert "sum 3.0 of 2 on eth0" in result.outputs[host]
        assert 1_000_000 * 1514 / 1448 < sent_bytes[host] < 1.1 * 1_000_000 * 1514 / 1448
