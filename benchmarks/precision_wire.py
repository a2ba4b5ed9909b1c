"""Low precision and a compressed wire together: DoReFa W1 A2 G6 sent in 6 bits, against float32 DDP.

    python -m benchmarks.precision_wire            # resumes; writes results/precision_wire.json

Four ranks on an emulated 100 Mbit/s network, digit pairs, a network of 168,000 parameters. The rows:
float32 with DDP, DoReFa with its weight gradients in ``qsgd:bits=6`` and with DDP's float32, a fixed-point
run whose gradients are added as integers, and DoReFa in one process with the same batches, for the loss. The
fixed-point run is made over every pattern, and over one of them twice: its weights must have the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, on_network, start
from benchmarks._crowd import warm_up_then_cosine
from benchmarks._places import example
from distcomp import precision

RANKS, RATE, STEPS, BATCH, SEEDS, WIDTH, LR = 4, "100mbit", 150, 32, 3, 256, 0.1
ROWS = {
    "float32, DDP": ("ddp", "none"),
    "DoReFa 1-2-6, qsgd:bits=6": ("qsgd:bits=6", "dorefa"),
    "DoReFa 1-2-6, DDP": ("ddp", "dorefa"),
    "fixed point Q4.12, sent as Q2.14": ("fixed_point:format=Q2.14", "fixed"),
}
ALONE = "DoReFa 1-2-6, one process, same batches"
EQUAL = {
    "ring": "fixed_point:format=Q2.14,pattern=all_reduce",
    "scatter-reduce": "fixed_point:format=Q2.14,pattern=reduce_scatter",
    "scatter-reduce, again": "fixed_point:format=Q2.14,pattern=reduce_scatter",
    "all_gather": "fixed_point:format=Q2.14,pattern=all_gather",
}


def network(kind: str, rank: int) -> nn.Module:
    net = nn.Sequential(
        nn.Linear(128, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip
    if kind == "dorefa":
        return precision.dorefa(net, 1, 2, 6, rank=rank)
    if kind == "fixed":
        return precision.fixed_point(net, "Q4.12", gradients="Q2.14", exact=False, rank=rank)
    return net


def rank_main(settings: Any) -> dict[str, Any]:
    """One rank of a run."""
    kind, method, seed = settings
    digits = example("digits")

    rank, size = dist.get_rank(), dist.get_world_size()
    (images, labels), held_out = digits.digits()
    feeds = [  # one process goes through the batches of all ranks, whose norms see a rank's batch each
        (images[one::RANKS], labels[one::RANKS], BATCH, torch.Generator().manual_seed(seed * RANKS + one))
        for one in (range(RANKS) if size == 1 else [rank])
    ]
    torch.manual_seed(seed)
    model = DistributedDataParallel(network(kind, rank))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(STEPS))
    exchange_s = []
    with distcomp.attach(model, optimizer, method, seed=seed) as handle:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for place, feed in enumerate(feeds, start=1):
                x, y = digits.pairs(*feed)
                with contextlib.nullcontext() if place == len(feeds) else model.no_sync():
                    (nn.functional.cross_entropy(model(x), y) / len(feeds)).backward()
            optimizer.step()
            schedule.step()
            exchange_s.append(handle.stats()["last"]["exchange_s"])
        stats = handle.stats()
    model.eval()
    loss, accuracy = digits.evaluate(
        model.module, *digits.pairs(*held_out, 4000, torch.Generator().manual_seed(0))
    )
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "bytes_per_step": stats["payload_bytes"] / STEPS,
        "payload_by_kind": stats["payload_by_kind"],
        "exchange_s": statistics.median(exchange_s),
        "weights": digest(model.module),
    }


def digest(model: nn.Module) -> str:
    """A fingerprint of every bit of the weights."""
    weights = b"".join(one.detach().numpy().tobytes() for one in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:16]


def run(kind: str, method: str, seed: int, ranks: int = RANKS) -> dict[str, Any]:
    return on_network("precision_wire", ranks, RATE, (kind, method, seed), env={"OMP_NUM_THREADS": "1"})


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [one["test_loss"] for one in runs]
    return {
        "test_loss": losses,
        "mean": statistics.mean(losses),
        "spread": statistics.stdev(losses),
        "test_accuracy": statistics.mean(one["test_accuracy"] for one in runs),
        "bytes_per_step": runs[0]["bytes_per_step"],
        "exchange_s": statistics.median(one["exchange_s"] for one in runs),
    }


def main() -> None:
    arguments_of(__doc__).parse_args()
    about = {
        "task": "digit pairs", "ranks": RANKS, "rate": RATE, "steps": STEPS, "batch_per_rank": BATCH,
        "seeds": SEEDS, "width": WIDTH, "lr": LR,
        "reduced": "3 seeds and 150 steps, so that all rows fit a few minutes of two cores; fixed point "
        "accumulates in float32",
    }  # fmt: skip
    cells = Cells("precision_wire", about)
    rows = {**{name: (*row, RANKS) for name, row in ROWS.items()}, ALONE: ("identity", "dorefa", 1)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in range(SEEDS):
        for name, (method, kind, ranks) in rows.items():
            made = cells.get(
                f"{name} | seed {seed}", lambda k=kind, m=method, s=seed, r=ranks: run(k, m, s, r)
            )
            runs[name].append(made)
    table = {name: summarize(found) for name, found in runs.items()}
    plain = table["float32, DDP"]
    for row in table.values():
        if row["bytes_per_step"]:
            row["times_fewer_bytes"] = plain["bytes_per_step"] / row["bytes_per_step"]
            row["speed_up_over_ddp"] = plain["exchange_s"] / row["exchange_s"]
    equal = {
        name: cells.get(f"fixed point, {name}", lambda m=method: run("fixed", m, 0))["weights"]
        for name, method in EQUAL.items()
    }
    cells.document |= {
        "table": table,
        "fixed_point_weights": equal,
        "same_bits": len(set(equal.values())) == 1,
    }
    cells.write()
    for name, row in table.items():
        print(f"{name:<36}{row['mean']:8.3f} +- {row['spread']:.3f}{row['bytes_per_step']:12,.0f} bytes")
    print(f"fixed point, the same bits over {', '.join(equal)}: {cells.document['same_bits']}")


if __name__ == "__main__":
    start(main, rank_main)
