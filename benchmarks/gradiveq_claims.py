"""What holds of GradiVeQ's claims here?

    python -m benchmarks.gradiveq_claims structure    # do gradients lie in a subspace? against two controls
    python -m benchmarks.gradiveq_claims loss         # test loss, five seeds, against no compression; resumes
    python -m benchmarks.gradiveq_claims link         # aggregation time at 100 Mbit/s: 2, 3, 4 and 6 ranks

Each call adds its part to results/gradiveq_claims.json. A ResNet-style net with 3x3 convolutions of 16 to 64
channels on pairs of digits, six workers, as in the paper, which trains ResNet-32 on CIFAR-100 for 45,000
steps, the first 2,500 uncompressed: here 1,500, the first 100 uncompressed, and the paper's cycles of 100
and 400. The label is the larger digit of the two: their sum takes such a net many thousand steps to learn.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, median, on_network, start, write
from benchmarks._crowd import Oversubscription, Plan, Task, rows, train, warm_up_then_cosine
from benchmarks._places import RESULTS, example
from distcomp.kernels.subspace import Sliced
from distcomp.layout import ParamSlice
from distcomp.methods.slices import FILTER, PLACE, Slicing, Subspace, mixed, sampled

WORKERS, BATCH, RATE = 6, 8, 0.05
LEARN, LATER = 60, (30, 120)
LEARNING, COMPRESSED = 100, 400
CYCLE = f"gradiveq:learn={LEARNING},compressed={COMPRESSED}"
TRAINED = f"warmup:inner=({CYCLE}),steps=100"
STEPS, SEEDS = 1500, 5


class Residual(nn.Module):
    """Two convolutions and what came in."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=after // before, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(4, after), nn.GroupNorm(4, after)])
        self.short = nn.Conv2d(before, after, 1, stride=2, bias=False) if after != before else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(relu(self.norms[0](self.first(x)))))
        return relu(y + self.short(x))


def network(blocks: int = 1) -> nn.Module:
    """``blocks`` per stage; three stages of 16, 32 and 64 channels."""
    stages: list[nn.Module] = []
    before = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            stages.append(Residual(before, width))
            before = width
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 16)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU(),
        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def task() -> Any:
    digits = example("digits").digits

    (images, labels), held_out = digits()

    def batches(workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return rows(
            lambda worker, stream: pictured(images[worker::workers], labels[worker::workers], BATCH, stream),
            workers,
            seed,
        )

    return Task(network, cross_entropy, batches, pictured(*held_out, 2000, torch.Generator().manual_seed(0)))


def pictured(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of two digits side by side, and which is the larger."""
    left, right = torch.randint(len(images), (2, count), generator=generator)
    side_by_side = torch.cat([images[left].view(-1, 8, 8), images[right].view(-1, 8, 8)], dim=2)
    return side_by_side.flatten(1), torch.maximum(labels[left], labels[right])


def plan(seed: int, steps: int = STEPS) -> Any:
    return Plan(
        workers=WORKERS,
        steps=steps,
        optimizer=lambda weights: torch.optim.SGD(weights, RATE, momentum=0.9),
        rate=warm_up_then_cosine(steps),
        seed=seed,
    )


# ------------------------------------------------------------------------------------------ structure


def recorded(steps: int, rate_steps: int = 1000) -> tuple[Any, list[Tensor]]:
    """The aggregated gradients of an uncompressed run."""
    oversubscription = Oversubscription(task(), plan(0, rate_steps), distcomp.identity())
    seen: list[Tensor] = []
    assert oversubscription.gradients is not None
    exchange = oversubscription.gradients.exchange

    def watched(gradients: Tensor) -> None:
        exchange(gradients)
        seen.append(gradients[0].clone())

    oversubscription.gradients.exchange = watched  # type: ignore[method-assign]
    for _ in range(steps):
        if not oversubscription.step():
            raise distcomp.DistcompError("training diverged; lower RATE")
    return oversubscription.layout, seen


def structure() -> dict[str, Any]:
    """Relative loss of reconstruction on gradients that the basis was not found from, layer by layer."""
    warm, last = 100, LEARN + LATER[-1]
    layout, seen = recorded(warm + last)
    seen = seen[warm:]
    subspaces = {FILTER: Subspace(ratio=24.0), PLACE: Subspace(ratio=8.0)}
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for param, at in zip(layout.slices, layout.offsets, strict=True):
        if Slicing().length(param) is None or param.numel < 2000:
            continue
        series = [one[at : at + param.numel] for one in seen]
        noise = [torch.randn(s.shape, generator=generator) * s.std() for s in series]
        rows[param.name] = {"shape": list(param.shape)} | {
            along: subspaces_of(param, along, subspace, series, noise)
            for along, subspace in subspaces.items()
        }
    return {"steps_before": warm, "learn": LEARN, "later": list(LATER), "layers": rows}


def subspaces_of(
    param: ParamSlice, along: str, subspace: Subspace, series: list[Tensor], noise: list[Tensor]
) -> dict[str, Any]:
    """What a basis of slices along filters or places misses, and what two controls miss."""
    slicing = Slicing(along=along)
    most = subspace.most(slicing.length(param) or 0, LEARN)
    one = slicing.sliced(param, 0, most, most)
    basis, mean = found(series, one, subspace)
    random = torch.linalg.qr(torch.randn(one.k, len(basis), generator=torch.Generator().manual_seed(0))).Q.T
    noise_basis, noise_mean = found(noise, one, replace(subspace, loss=0.0))
    zero_basis, zero_mean = found(series, one, replace(subspace, centred=False))
    return {
        "K": one.k, "d": len(basis), "ratio": one.k / len(basis), "coefficients": one.slices * len(basis),
        "PCA": losses(series, one, basis, mean),
        "PCA around zero": losses(series, one, zero_basis, zero_mean),
        "random basis": losses(series, one, random, mean),
        "noise": {"d": len(noise_basis), **losses(noise, one, noise_basis, noise_mean)},
    }  # fmt: skip


def found(series: list[Tensor], one: Sliced, subspace: Subspace) -> tuple[Tensor, Tensor]:
    """Basis and means from the first gradients of a series."""
    mean = torch.stack(series[:LEARN]).mean(0) * subspace.centred
    samples = torch.stack(
        [
            one.view(g - mean)[sampled(one, age)].reshape(one.bases, one.k)
            for age, g in enumerate(series[:LEARN])
        ],
        dim=1,
    )
    mixture, dims = subspace.find(samples)
    return mixed(mixture, samples, subspace.bits)[0, :dims].float(), mean


def losses(series: list[Tensor], one: Sliced, basis: Tensor, mean: Tensor) -> dict[str, float]:
    def of(g: Tensor) -> float:
        slices = one.view(g - mean).reshape(one.slices, one.k)
        return float((slices - slices @ basis.T @ basis).norm() / g.norm())

    def over(part: list[Tensor]) -> float:
        return statistics.mean(of(g) for g in part)

    near, far = LATER
    return {
        "in_sample": over(series[:LEARN]),
        "held_out": over(series[LEARN : LEARN + near]),
        "held_out_later": over(series[LEARN + near : LEARN + far]),
    }


# ----------------------------------------------------------------------------------------------- loss


def test_losses(seeds: int) -> dict[str, Any]:
    """Test loss over seeds, uncompressed and compressed, everything else the same."""
    settings = {"workers": WORKERS, "batch": BATCH, "rate": RATE, "steps": STEPS, "method": TRAINED}
    cells = Cells("gradiveq_loss", settings)
    arms = {"float32": distcomp.identity(), TRAINED: distcomp.parse(TRAINED)}
    rows: dict[str, Any] = {}
    for seed in range(seeds):
        for name, method in arms.items():
            make: Callable[[], dict[str, Any]] = lambda seed=seed, method=method: train(  # noqa: E731
                task(), plan(seed), method
            )
            rows.setdefault(name, []).append(cells.get(f"{name} | seed {seed}", make))
    table = {
        name: {
            "test_loss": [run.get("test_loss") for run in runs],
            "mean": statistics.mean(run["test_loss"] for run in runs),
            "spread": statistics.stdev(run["test_loss"] for run in runs),
            "sent_bytes_per_step": runs[0]["sent_bytes"] / STEPS,
        }
        for name, runs in rows.items()
        if all("test_loss" in run for run in runs)
    }
    plain, ours = table["float32"], table[TRAINED]
    return {
        "steps": STEPS, "arms": table,
        "difference_over_spread": (ours["mean"] - plain["mean"]) / plain["spread"],
        "within_the_range_of_float32": ours["mean"] <= max(plain["test_loss"]),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- link


BLOCKS = 5
"""Residual blocks per stage: the paper's ResNet-32."""
RANKS = (2, 3, 4, WORKERS)


def rank_main(settings: Any) -> dict[str, Any]:
    """Some steps by DDP, then a cycle by GradiVeQ: what each exchange took.

    All ranks meet when their gradients are there: what is timed is the exchange, not the wait for whom the
    cores served last.
    """
    found: dict[str, Any] = {}
    for method, steps in (("ddp", 15), (CYCLE, LEARNING + 25)):
        torch.manual_seed(0)
        model = DistributedDataParallel(network(BLOCKS), bucket_cap_mb=1000)
        next(model.parameters()).register_hook(meet)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        mine, sent = [], []
        with distcomp.attach(model, optimizer, method) as handle:
            for step in range(steps):
                g = torch.Generator().manual_seed(1000 * step + dist.get_rank())
                x, y = torch.randn(2, 128, generator=g), torch.randint(10, (2,), generator=g)
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                last = handle.stats()["last"]
                mine.append(last["exchange_s"])
                sent.append(last["payload_bytes"])
        everyone = gathered(mine)
        found[method] = {"exchange_s": [max(one) for one in zip(*everyone, strict=True)], "bytes": sent}
    parameters = sum(p.numel() for p in network(BLOCKS).parameters())
    return {"parameters": parameters, "found": found}


def meet(gradient: Tensor) -> None:
    """Called with the gradient that is ready last, before it goes into the bucket."""
    dist.barrier()


def link() -> dict[str, Any]:
    """Aggregation time of each phase against float32's, and of a whole cycle.

    Of six ranks, as in the paper, and of fewer, for which a machine may have a core each.
    """
    each = {ranks: _link_of(ranks) for ranks in RANKS}
    return {**each[WORKERS], "ranks": {ranks: one for ranks, one in each.items() if ranks != WORKERS}}


def _link_of(ranks: int) -> dict[str, Any]:
    raw = on_network("gradiveq_claims", ranks, "100mbit", {})
    plain = raw["found"]["ddp"]["exchange_s"][3:]
    ours = raw["found"][CYCLE]["exchange_s"]
    learning, last_learning, compressed = ours[3 : LEARNING - 1], ours[LEARNING - 1], ours[LEARNING + 1 :]
    cycle_s = (LEARNING - 1) * median(learning) + last_learning + COMPRESSED * median(compressed)
    sent = raw["found"][CYCLE]["bytes"]
    return {
        "network": raw["network"], "parameters": raw["parameters"], "cycle": CYCLE,
        "float32_s": median(plain), "learning_s": median(learning), "finding_the_bases_s": last_learning,
        "compressed_s": median(compressed),
        "compressed_phase_times_faster": median(plain) / median(compressed),
        "whole_cycle_times_faster": (LEARNING + COMPRESSED) * median(plain) / cycle_s,
        "bytes": {"float32": raw["found"]["ddp"]["bytes"][-1], "learning": sent[10], "compressed": sent[-1]},
        "raw": raw["found"],
    }  # fmt: skip


PARTS = ("structure", "loss", "link")


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="these alone")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the losses, for now")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    make = {"structure": structure, "loss": partial(test_losses, arguments.seeds), "link": link}
    torch.set_num_threads(1)
    path = RESULTS / "gradiveq_claims.json"
    for name in parts:
        part = make[name]()
        kept = json.loads(path.read_text()) if path.exists() else {}
        write("gradiveq_claims", {one: kept[one] for one in PARTS if one in kept} | {name: part})
        print(f"{name}: written to {path}", file=sys.stderr)


if __name__ == "__main__":
    start(main, rank_main)
