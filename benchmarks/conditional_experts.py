"""Experts on ranks of their own: step time against all-reducing gradients, and what codecs of rows cost.

    python -m benchmarks.conditional_experts --links    # step times on emulated links, and predicted
    python -m benchmarks.conditional_experts --study    # test loss by codec of rows, five seeds

``--links``: eight experts of 128 x 256, two of them for each token, on two ranks; the break-even is at 1,024
tokens of a rank and step. What is predicted is the step as it was on an unshaped link, and the seconds that
the network model gives for the bytes.

``--study``: eight clusters, each with a linear classifier of its own.
Controls: a dense network with the same products for each token, and one with as many parameters; the mixture
without balancing.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, median, on_fabric, start
from benchmarks._conditional_tasks import clustered
from distcomp import calls
from distcomp.conditional import MixtureOfExperts, balance_loss, keep_experts_local
from distcomp.conditional.expert_traffic import MixtureShape, data_parallel_s, expert_parallel_s
from distcomp.network import Fabric

WIDTH, HIDDEN, EXPERTS, K = 128, 256, 8, 2
TOKENS = (256, 4096)
RATES = ("unshaped", "1gbit", "100mbit")
CODECS = ("identity", "qsgd:bits=8")
STEPS = 11
ROWS = ("identity", "bf16", "qsgd:bits=8", "qsgd:bits=4", "mxfp8")
SEEDS, TRAIN_STEPS, BATCH, LR = 5, 300, 128, 5e-3
STUDY_HIDDEN = 32
PLAN = {
    "width": WIDTH, "hidden": HIDDEN, "experts": EXPERTS, "k": K, "tokens": list(TOKENS), "steps": STEPS,
    "seeds": SEEDS, "train_steps": TRAIN_STEPS, "batch": BATCH, "lr": LR, "study_hidden": STUDY_HIDDEN,
    "ranks": 2,
}  # fmt: skip


# ---------------------------------------------------------------------- the links


def step_times(spread: bool, codec: str, tokens: int) -> list[float]:
    """Seconds of steps of one mixture; the first is a warm-up."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"parallel": dist.group.WORLD, "wire": codec} if spread else {}
    moe = MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, K, **options)
    with torch.no_grad():
        moe.gate.clean.normal_(generator=torch.Generator().manual_seed(1))
    keep_experts_local(moe)
    model = DistributedDataParallel(moe)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    times = []
    with distcomp.attach(model, optimizer, "identity" if spread else codec):
        for _ in range(STEPS + 1):
            dist.barrier()
            began_s = time.perf_counter()
            optimizer.zero_grad()
            (model(x).square().mean() + moe.balance_loss).backward()
            optimizer.step()
            dist.barrier()
            times.append(time.perf_counter() - began_s)
    return times[1:]


def link_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """All kinds of steps on one link, in turn."""
    found: dict[str, float] = {}
    for tokens in TOKENS:
        for codec in CODECS:
            for spread in (False, True):
                kind = "expert-parallel" if spread else "data-parallel"
                found[f"{kind}|{codec}|{tokens}"] = median(step_times(spread, codec, tokens))
    calls.disconnect()
    return {"step_s": found}


def predicted_s(kind: str, codec: str, tokens: int, rate: str) -> float:
    """Seconds on the wire."""
    shape = MixtureShape(tokens, WIDTH, HIDDEN, EXPERTS, K, ranks=2)
    seconds_of = expert_parallel_s if kind == "expert-parallel" else data_parallel_s
    return seconds_of(shape, codec, Fabric.uniform(2, rate))


# ---------------------------------------------------------------------- the study


class Expertly(nn.Module):
    """A mixture beside the input, then a linear classifier."""

    def __init__(self, width: int, classes: int, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x + self.mixture(x))
        return scores


def dense(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def built(name: str, width: int, seed: int) -> nn.Module:
    """The layer in the middle."""
    if name == "dense, as many products":
        return dense(width, K * STUDY_HIDDEN)
    if name == "dense, as many parameters":
        return dense(width, EXPERTS * STUDY_HIDDEN)
    weight = 0.0 if name == "no balancing" else 0.1
    wire = "identity" if name == "no balancing" else name
    return MixtureOfExperts(
        width, STUDY_HIDDEN, EXPERTS, K, parallel=dist.group.WORLD, wire=wire, seed=seed,
        importance_weight=weight, load_weight=weight,
    )  # fmt: skip


def study_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """All kinds of layers with one seed."""
    return {"rows": {name: studied(name, settings["seed"]) for name in settings["names"]}}


def studied(name: str, seed: int) -> dict[str, Any]:
    """One kind of layer, one seed, two ranks with batches of their own."""
    task = clustered()
    torch.manual_seed(seed)
    inner = Expertly(task.inputs, task.classes, built(name, task.inputs, seed))
    keep_experts_local(inner)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(inner.parameters(), LR)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_STEPS)
    draw = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    mixed = isinstance(inner.mixture, MixtureOfExperts)
    before = sum(calls.sent_bytes().values()) if mixed else 0
    with distcomp.attach(model, optimizer, "identity"):
        for _ in range(TRAIN_STEPS):
            x, y = task(BATCH, draw)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            (loss + balance_loss(inner) if mixed else loss).backward()
            optimizer.step()
            rates.step()
    sent = (sum(calls.sent_bytes().values()) - before) / TRAIN_STEPS if mixed else 0.0
    inner.eval()
    with torch.no_grad():
        scores = inner(task.test[0])
    found: dict[str, Any] = {
        "test_loss": cross_entropy(scores, task.test[1]).item(),
        "test_accuracy": (scores.argmax(1) == task.test[1]).float().mean().item(),
        "row_bytes": sent,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
    }
    if mixed:
        counts = torch.tensor(inner.mixture.routing.by_expert, dtype=torch.float32)
        found["largest_share"] = (counts.max() / counts.sum()).item()
        found["load_variation"] = (counts.var() / counts.mean().square()).item()
    gathered(0)
    calls.disconnect()
    return found


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    return study_rank(settings) if "names" in settings else link_rank(settings)


def known(codec: str) -> bool:
    """Whether there is such a codec here."""
    try:
        distcomp.parse(codec)
    except distcomp.DistcompError:
        return False
    return True


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--study", action="store_true")
    wanted = parser.parse_args()
    cells = Cells("conditional_experts", PLAN)
    if wanted.links:
        for rate in RATES:
            fabric = Fabric.uniform(2) if rate == "unshaped" else Fabric.uniform(2, rate)
            cell = cells.get(
                f"own links|{rate}", lambda fabric=fabric: on_fabric("conditional_experts", fabric, {})
            )
            if rate != "unshaped" and "predicted_s" not in cell:
                compute_s = cells.document["cells"]["own links|unshaped"]["step_s"]
                cell["predicted_s"] = {
                    name: compute_s[name] + predicted_s(*split(name), rate) for name in cell["step_s"]
                }
                cells.write()
    if wanted.study:
        names = [row for row in ROWS if known(row)]
        names += ["no balancing", "dense, as many products", "dense, as many parameters"]
        for seed in range(SEEDS):
            settings = {"names": names, "seed": seed}
            cells.get(
                f"study|{seed}",
                lambda settings=settings: on_fabric("conditional_experts", Fabric.uniform(2), settings),
            )


def split(name: str) -> tuple[str, str, int]:
    kind, codec, tokens = name.split("|")
    return kind, codec, int(tokens)


if __name__ == "__main__":
    start(main, rank_main)
