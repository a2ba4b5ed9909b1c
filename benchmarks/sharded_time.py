"""How long does a sharded step take, and what does it keep? FSDP2 by itself and in few bits.

    python -m benchmarks.sharded_time --rate 100mbit        # resumes; results/sharded_time_100mbit.json
    python -m benchmarks.sharded_time --rate 1gbit --large  # 29 million parameters beside 4.2 million

Four ranks on an emulated network. Blocks reshard after the forward. Each setting in fresh processes: the time
of a step is the slowest rank's, the median of some after two; memory is the largest resident set of a rank
less what it had before the model was made, the largest over the ranks. Ranks share the cores of this machine,
so that the computing of a step takes longer than on one's own; every row has that alike.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, median, on_network, start
from distcomp.methods import ErrorFeedback, Method, compact_residuals
from distcomp.network.qdisc import read_qdisc_bytes

RANKS, WARM, STEPS, BATCH = 4, 2, 5, 4
SIZES = {"4.2 million": (1024, 4), "29 million": (2048, 7)}
"""Width and depth of an MLP without biases."""
PLAIN = "plain FSDP2"
MOVED = "difference:compressor=(qsgd:bits=4)"
KEPT = "gather:compressor=(qsgd:bits=8),reuse=true"
MOVING = "moving average in int8"
SETTINGS: dict[str, tuple[str, str | None, str] | None] = {
    PLAIN: None,
    "identity": ("identity", None, "float32"),
    "4-bit gradients": ("qsgd:bits=4", None, "float32"),
    "8-bit weights, 4-bit gradients": ("qsgd:bits=4", "qsgd:bits=8", "float32"),
    "8-bit weights gathered once, 4-bit gradients": ("qsgd:bits=4", KEPT, "float32"),
    "4-bit weights, 4-bit gradients": ("qsgd:bits=4", "qsgd:bits=4", "float32"),
    "4-bit differences, 4-bit gradients": ("qsgd:bits=4", MOVED, "float32"),
    "8-bit weights, 1-bit gradients": ("qsgd:bits=1", "qsgd:bits=8", "float32"),
    "8-bit weights, 1-bit gradients, residual in bf16": ("qsgd:bits=1", "qsgd:bits=8", "bf16"),
    "8-bit weights, 1-bit gradients, residual in int8": ("qsgd:bits=1", "qsgd:bits=8", "int8"),
    "8-bit weights, 1-bit gradients, moving average in int8 (LoCo)": ("qsgd:bits=1", "qsgd:bits=8", MOVING),
}
"""Method, gathers of weights, and what the residual of error feedback is kept in."""


def sharded(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def method_of(text: str, form: str) -> Method:
    """A method with its residual in ``form``: ``float32``, ``bf16``, ``int8``, or LoCo's moving average."""
    if form == "float32":
        return distcomp.parse(text)
    if form != MOVING:
        return compact_residuals(text, form)
    owing = compact_residuals(text, "int8")
    assert isinstance(owing, ErrorFeedback)
    return replace(owing, beta=0.5)


def resident_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [one for one in lines if one.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def rank_main(settings: Any) -> dict[str, Any]:
    """Times, bytes and memory of one setting."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = sharded(*settings["size"])
    numel = sum(parameter.numel() for parameter in model.parameters())
    optimizer, handle = torch.optim.AdamW(model.parameters(), lr=1e-4), None
    if settings["setting"] is not None:
        text, weights, form = settings["setting"]
        handle = distcomp.attach(model, optimizer, method_of(text, form), weights=weights)
    x = torch.randn(BATCH, settings["size"][0], generator=torch.Generator().manual_seed(dist.get_rank()))
    seconds, sent = [], []
    for _ in range(settings["warm"] + settings["steps"]):
        dist.barrier()
        began_s, counted = time.perf_counter(), queue_bytes()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began_s)
        dist.barrier()
        sent.append(queue_bytes() - counted)
    mine = {
        "step_s": seconds[settings["warm"] :],
        "interface_bytes_per_parameter": median(sent[settings["warm"] :]) / numel,
        "resident_bytes": resident_bytes("VmHWM") - before,
        "state_bytes": handle.stats()["state_bytes"] if handle is not None else 0,
    }
    ranks = gathered(mine)
    if handle is not None:
        handle.detach()
    return {
        "parameters": numel,
        "step_s": median([max(step) for step in zip(*(one["step_s"] for one in ranks), strict=True)]),
        **{
            name: max(one[name] for one in ranks)
            for name in ("interface_bytes_per_parameter", "resident_bytes", "state_bytes")
        },
    }


def queue_bytes() -> int:
    """What this rank's queue has counted; 0 where the network has no real packets."""
    device = os.environ.get("DISTCOMP_DEVICE")
    return read_qdisc_bytes(device) if device else 0


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rate", default="100mbit", help="of each link (default 100mbit)")
    parser.add_argument("--large", action="store_true", help="the model of 29 million parameters, too")
    asked = parser.parse_args()
    about = {"rate": asked.rate, "ranks": RANKS, "warm_steps": WARM, "steps": STEPS, "batch": BATCH}
    cells = Cells(f"sharded_time_{asked.rate}", about)
    for size, shape in SIZES.items():
        if size != "4.2 million" and not asked.large:
            continue
        for name, setting in SETTINGS.items():
            told = {"size": shape, "setting": setting, "warm": WARM, "steps": STEPS}
            cells.get(
                f"{size} | {name}", lambda told=told: on_network("sharded_time", RANKS, asked.rate, told)
            )
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for name, row in cells.document["table"].items():
        print(f"{name:<64}" + "".join(f"{value:10.2f}" for value in row.values()))


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each row beside plain FSDP2's of the same size."""
    table = {}
    for key, row in cells.items():
        plain = cells[f"{key.partition(' | ')[0]} | {PLAIN}"]
        numel = row["parameters"]
        table[key] = {
            "step_s": row["step_s"],
            "speed_up": plain["step_s"] / row["step_s"],
            "interface_bytes_per_parameter": row["interface_bytes_per_parameter"],
            "state_bytes_per_parameter": row["state_bytes"] / numel,
            "resident_bytes_per_parameter": row["resident_bytes"] / numel,
            "resident_over_plain_per_parameter": (row["resident_bytes"] - plain["resident_bytes"]) / numel,
        }
    return table


if __name__ == "__main__":
    start(main, rank_main)
