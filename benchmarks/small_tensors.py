"""Many small tensors: a step's time over plain DDP's, in turn, in one run, on an unshaped network.

    python -m benchmarks.small_tensors             # writes results/small_tensors.json

The cost of a step should grow with its bytes and not with its names. Three models: 1,500 and 2,000 tiny
parameters, and 448 LoRA adapters of a frozen model (their matrices alone, each used once). Two ranks, one
thread each; a step is zero_grad, forward, backward and the optimizer's step. Every method's steps alternate
with plain DDP's in blocks, and a ratio is the median of the ratios of neighbouring blocks' medians.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, median, on_network, start, write

METHODS = ("qsgd:bits=4", "qsgd:bits=1", "powersgd", "topk:ratio=0.01")
MODELS = ("1500 tiny", "2000 tiny", "448 adapters")
WIDTH, ADAPTED, ADAPTER_RANK = 16, 768, 16
TARGET = 1.5


class Chain(nn.Module):
    """Tiny layers one after the other: ``count`` parameters, a weight and a bias each.

    Weights are orthogonal: with torch's own, gradients of so many layers are zero but for the last few.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count // 2)))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Adapters(nn.Module):
    """The adapters of a frozen model: pairs of thin matrices, whose product is added to what passes by."""

    def __init__(self, count: int) -> None:
        super().__init__()
        pairs = range(count // 2)
        self.down = nn.ModuleList(nn.Linear(ADAPTED, ADAPTER_RANK, bias=False) for _ in pairs)
        self.up = nn.ModuleList(nn.Linear(ADAPTER_RANK, ADAPTED, bias=False) for _ in pairs)
        for up in self.up:  # small: with torch's own what passes by grows beyond float32
            nn.init.normal_(up.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(down(x))
        return x


def model(name: str) -> DistributedDataParallel:
    torch.manual_seed(0)
    count, _, kind = name.partition(" ")
    return DistributedDataParallel(Chain(int(count)) if kind == "tiny" else Adapters(int(count)))


def block_s(ddp: DistributedDataParallel, method: str, steps: int) -> float:
    """The median time of a step with ``method``, after two that are not counted."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-4)
    x = torch.randn(4, WIDTH if isinstance(ddp.module, Chain) else ADAPTED)
    times = []
    with distcomp.attach(ddp, optimizer, method):
        for step in range(steps + 2):
            dist.barrier()
            begun_s = time.perf_counter()
            optimizer.zero_grad()
            loss = ddp(x).square().mean()
            loss.backward()
            optimizer.step()
            dist.barrier()
            if step >= 2:
                times.append(time.perf_counter() - begun_s)
    if not loss.isfinite():
        raise SystemExit(f"{method} was timed on steps whose loss is {loss.item()}")
    return median(times)


def rank_main(settings: Any) -> dict[str, Any]:
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for name in settings["models"]:
        ddp = model(name)
        rows[name] = {
            method: [
                [block_s(ddp, "ddp", settings["steps"]), block_s(ddp, method, settings["steps"])]
                for _ in range(settings["turns"])
            ]
            for method in settings["methods"]
        }
    return {"rows": gathered(rows)[0]}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    arguments = parser.parse_args()
    raw = on_network("small_tensors", 2, "unshaped", vars(arguments))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, methods in raw["rows"].items():
        for method, blocks in methods.items():
            ratio = median([ours / plain for plain, ours in blocks])
            rows.setdefault(name, {})[method] = {
                "ddp_ms": 1e3 * median([plain for plain, _ in blocks]),
                "method_ms": 1e3 * median([ours for _, ours in blocks]),
                "ratio": ratio,
            }
            print(f"{name:<14}{method:<18}{ratio:>6.2f} x{'' if ratio <= TARGET else '  above the target'}")
    write("small_tensors", {"what": "step time over plain DDP's", "target": TARGET, "models": rows})


if __name__ == "__main__":
    start(main, rank_main)
