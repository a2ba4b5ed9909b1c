"""Every byte of a sharded step: FSDP2 by itself and with gradients and weights in few bits.

    python -m benchmarks.sharded_bytes            # resumes; writes results/sharded_bytes.json

2 and 4 ranks on an emulated network, whose queues count what each rank sends, packet headers included;
beside it what the ledger has counted. Bytes per parameter, rank and step, of the steps after the first two
(the first gathers differences plainly). Also the training loss after all steps, of one seed: a sign of life
and no comparison. Blocks reshard after the forward, so that weights are gathered twice a step.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, on_network, start
from distcomp.network.qdisc import read_qdisc_bytes

RATE, WIDTH, DEPTH, WARM, STEPS, BATCH, LR = "1gbit", 384, 4, 2, 3, 16, 1e-3
KEPT = "gather:compressor=(qsgd:bits={}),reuse=true"
SETTINGS = (
    ("identity", None),
    ("qsgd:bits=4", None),
    ("qsgd:bits=4", "qsgd:bits=8"),
    ("qsgd:bits=4", "qsgd:bits=4"),
    ("qsgd:bits=4", KEPT.format(8)),
    ("qsgd:bits=4", KEPT.format(4)),
    ("qsgd:bits=4", "difference:compressor=(qsgd:bits=4)"),
)
PLAIN = "plain FSDP2"


def network() -> nn.Sequential:
    """A residual-free MLP of about 0.6 million parameters; every layer is a buffer of its own."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def sharded() -> nn.Sequential:
    torch.manual_seed(0)
    model, mesh = network(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    loss = torch.zeros(())
    for _ in range(count):
        x = torch.randn(BATCH, WIDTH, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def sent_bytes() -> int:
    """What this rank's queue has counted, when all ranks have stopped sending."""
    dist.barrier()
    return read_qdisc_bytes(os.environ["DISTCOMP_DEVICE"])


def measured(method: str | None, weights: str | None) -> dict[str, Any]:
    """Bytes per parameter, rank and step of one setting: the mean over the ranks."""
    model = sharded()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    handle = distcomp.attach(model, optimizer, method, weights=weights) if method is not None else None
    steps(model, optimizer, WARM, 1)
    before, counted = sent_bytes(), handle.stats()["payload_bytes"] if handle is not None else 0
    loss = steps(model, optimizer, STEPS, 2)
    after = sent_bytes()
    row: dict[str, Any] = {"interface": (after - before) / STEPS / parameters, "loss": loss}
    if handle is not None:
        stats = handle.stats()
        row |= {
            "ledger": (stats["payload_bytes"] - counted) / STEPS / parameters,
            "state_bytes_per_parameter": stats["state_bytes"] / parameters,
        }
        handle.detach()
    rows = gathered(row)
    return {key: sum(one[key] for one in rows) / len(rows) for key in row} | {"parameters": parameters}


def rank_main(settings: Any) -> dict[str, Any]:
    """All settings, one after the other."""
    rows = {PLAIN: measured(None, None)}
    for method, weights in SETTINGS:
        rows[f"{method} | {weights or 'plain'}"] = measured(method, weights)
    return {"rows": rows}


def main() -> None:
    arguments_of(__doc__).parse_args()
    about = {"rate": RATE, "width": WIDTH, "depth": DEPTH, "warm_steps": WARM, "steps": STEPS, "batch": BATCH}
    cells = Cells("sharded_bytes", about)
    for size in (2, 4):
        answer = cells.get(f"{size} ranks", lambda n=size: on_network("sharded_bytes", n, RATE, None))
        for name, row in answer["rows"].items():
            ledger = f"{row['ledger']:8.3f}" if "ledger" in row else " " * 8
            print(f"{size} {name:<66}{row['interface']:8.3f}{ledger}{row['loss']:8.3f}")


if __name__ == "__main__":
    start(main, rank_main)
