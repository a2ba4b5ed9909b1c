"""How long does an exchange take, against the bytes it must send? Methods and DDP in turn, in one run, on one
network.

    python -m benchmarks.step_time --rate 100mbit              # writes results/step_time_100mbit.json
    python -m benchmarks.step_time --rate 100mbit --ranks 2    # writes results/step_time_100mbit_2_ranks.json

Each rank's gradient is about 17 MB in several buckets, and lies ready in them: a backward that computes, or
copies, would be measured with the exchange, four times over on the cores that the ranks share here, and a
rank that came to it first would wait for the others. The exchange's time runs from the first encode to the
last decode; the prediction is what the queue must be charged (payloads and headers) over the rate. Bytes are
counted three times: by the ledger (payloads), by the prediction (with headers), and by the kernel's queue.

``--bounds`` takes other methods, and sets each against its bound: the larger of its wire time and of the CPU
time of all ranks on the cores they share, plus the floor, which is the same exchange of a model of next to
nothing (as many buckets and rounds).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, median, on_network, start, write
from distcomp.network import parse_rate, read_qdisc_bytes
from distcomp.network.framing import exchanged_bytes

METHODS = (
    "ddp", "torch:fp16", "identity", "bf16", "qsgd:bits=8", "qsgd:bits=4", "qsgd:bits=2", "qsgd:bits=1",
    "qsgd:bits=4,pattern=all_gather",
)  # fmt: skip
OTHERS = (
    "ddp", "qsgd:bits=4", "qsgd:bits=1", "natural", "terngrad", "majority_vote", "ef_signsgd", "onebit",
    "shared_range", "topk:ratio=0.01", "random_k:ratio=0.01", "demo", "powersgd:rank=4",
)  # fmt: skip
RANKS = 4
SIDE, LAYERS, TINY = 1024, 4, 32


def model(side: int = SIDE) -> DistributedDataParallel:
    """Matrices that cost little to go through, next to what they weigh: ranks share the cores. A bucket
    each."""
    torch.manual_seed(0)
    return wrapped(nn.Sequential(*[nn.Linear(side, side) for _ in range(LAYERS)]), side)


def wrapped(module: nn.Module, side: int) -> DistributedDataParallel:
    """A bucket for each matrix of that side."""
    return DistributedDataParallel(module, bucket_cap_mb=4 * side**2 / 2**20, gradient_as_bucket_view=True)


class InItsBucket(torch.autograd.Function):
    """Nothing of a parameter, whose gradient is where it should be already."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


class GradientsReady(nn.Module):
    """The parameters of ``module``, whose gradients are random numbers: :meth:`draw` before each backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.gradients = [torch.randn(p.shape) for p in module.parameters()]

    def draw(self) -> None:
        """Put the gradients where DistributedDataParallel has them: into the buckets, from the second on."""
        for parameter, gradient in zip(self.module.parameters(), self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)

    def forward(self) -> Tensor:
        return torch.stack([InItsBucket.apply(p) for p in self.module.parameters()]).sum()


def ready(side: int = SIDE) -> DistributedDataParallel:
    """As :func:`model`, with gradients that need not be computed."""
    torch.manual_seed(dist.get_rank())
    return wrapped(GradientsReady(nn.Sequential(*[nn.Linear(side, side) for _ in range(LAYERS)])), side)


def queue_bytes() -> int | None:
    """What this rank's queue has sent so far, where there is one."""
    device = os.environ.get("DISTCOMP_DEVICE")
    if not device:
        return None
    try:
        return read_qdisc_bytes(device)
    except OSError:  # an unshaped network has no queue that counts
        return None


def measure(ddp: DistributedDataParallel, method: str, steps: int) -> list[dict[str, float | None]]:
    """Some steps with ``method``; the first is a warm-up and is not reported."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    found: list[dict[str, float | None]] = []
    with distcomp.attach(ddp, optimizer, method) as handle:
        for step in range(steps + 1):
            ddp.module.draw()
            nothing = ddp()
            dist.barrier()
            before, cpu_before_s = queue_bytes(), time.process_time()
            nothing.backward()
            cpu_s = time.process_time() - cpu_before_s
            optimizer.step()
            dist.barrier()
            after, last = queue_bytes(), handle.stats()["last"]
            if step:
                sent = after - before if before is not None and after is not None else None
                found.append(
                    {
                        "exchange_s": last["exchange_s"],
                        "payload_bytes": last["payload_bytes"],
                        "queue_bytes": sent,
                        "cpu_s": cpu_s,
                        **last["phases"],
                    }
                )
    return found


def rank_main(settings: Any) -> dict[str, Any]:
    ddp, tiny = ready(), ready(TINY)
    mine: dict[str, list[dict[str, float | None]]] = {method: [] for method in settings["methods"]}
    floor: dict[str, list[float]] = {method: [] for method in settings["methods"]}
    for _ in range(settings["turns"]):
        for method in settings["methods"]:
            mine[method] += measure(ddp, method, settings["steps"])
            if settings["floor"]:
                floor[method] += [one["exchange_s"] or 0.0 for one in measure(tiny, method, 4)]
    everyone = gathered(mine)
    numel = sum(p.numel() for p in ddp.parameters())
    return {"gradient_bytes": 4 * numel, "ranks": everyone, "floor": floor}


def summarize(raw: dict[str, object], rate_bps: float) -> dict[str, dict[str, float | None]]:
    """Per method: medians over steps of the slowest rank's exchange, bytes as means over ranks."""
    ranks = raw["ranks"]
    assert isinstance(ranks, list)
    rows: dict[str, dict[str, float | None]] = {}
    for method in ranks[0]:
        steps = list(zip(*(rank[method] for rank in ranks), strict=True))
        exchange_s = median([max(one["exchange_s"] for one in step) for step in steps])
        payload = median([sum(one["payload_bytes"] for one in step) / len(step) for step in steps])
        queued = [[one["queue_bytes"] for one in step] for step in steps]
        queue = median([sum(step) / len(step) for step in queued]) if queued[0][0] is not None else None
        predicted = exchanged_bytes(payload)
        rows[method] = {
            "exchange_s": exchange_s,
            "predicted_s": 8 * predicted / rate_bps,
            "ratio": exchange_s / (8 * predicted / rate_bps),
            "payload_bytes": payload,
            "predicted_bytes": predicted,
            "queue_bytes": queue,
            "queue_over_predicted": queue / predicted if queue else None,
            **{
                name: median([step[0][name] for step in steps])
                for name in ("cpu_s", "encode_s", "recode_s", "wait_s", "decode_s")
            },
        }
    floor, cores = raw["floor"], os.cpu_count() or 1
    assert isinstance(floor, dict)
    for method, row in rows.items():
        if floor[method]:
            at_least_s = max(row["predicted_s"], len(ranks) * row["cpu_s"] / cores)
            row["floor_s"] = median(floor[method])
            row["over_bound"] = row["exchange_s"] / (at_least_s + row["floor_s"])
    for row in rows.values():
        fastest = rows["ddp"]["exchange_s"]
        assert fastest is not None
        assert row["exchange_s"] is not None
        row["speed_up_over_ddp"] = fastest / row["exchange_s"]
    return rows


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--bounds", action="store_true", help="other methods, each against its bound")
    parser.add_argument("--json", action="store_true", help="print the result instead of a table")
    arguments = parser.parse_args()
    methods = arguments.methods or (OTHERS if arguments.bounds else METHODS)
    settings = {
        "methods": list(dict.fromkeys(("ddp", *methods))),  # what the others are set against
        "turns": arguments.turns,
        "steps": arguments.steps,
        "floor": arguments.bounds,
    }
    raw = on_network("step_time", arguments.ranks, arguments.rate, settings)
    rows = summarize(raw, parse_rate(arguments.rate))
    result = {
        "what": "exchange time, first encode to last decode, median over steps of the slowest rank",
        "ranks": arguments.ranks, "rate": arguments.rate, "network": raw["network"],
        "gradient_bytes": raw["gradient_bytes"], "methods": rows,
    }  # fmt: skip
    among = "" if arguments.ranks == RANKS else f"_{arguments.ranks}_ranks"
    path = write(f"step_{'bounds' if arguments.bounds else 'time'}_{arguments.rate}{among}", result)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{'method':<28}{'exchange':>10}{'predicted':>11}{'ratio':>7}{'queue/pred':>11}{'speed-up':>9}{'bound':>7}"
    )
    for method, row in rows.items():
        queue = f"{row['queue_over_predicted']:.3f}" if row["queue_over_predicted"] else "-"
        print(
            f"{method:<28}{row['exchange_s']:>9.3f}s{row['predicted_s']:>10.3f}s{row['ratio']:>7.2f}"
            f"{queue:>11}{row['speed_up_over_ddp']:>8.1f}x{row.get('over_bound') or 0:>7.2f}"
        )
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
