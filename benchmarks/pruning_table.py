"""What does each way of pruning cost in test loss, against the weights that remain?

    python -m benchmarks.pruning_table              # resumes; writes results/pruning_table.json
    python -m benchmarks.pruning_table --json       # and prints it

LeNet-300-100 and a residual CNN on digit pairs, SGD with momentum, five seeds. Every row of a seed begins at
the same weights and sees the same batches; pruning begins after a fifth of the steps (regrowth: at once) and
ends after three. Differences are paired by seed. To another method's curve they are taken at the same
remaining weights, interpolated over log(remaining).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._common import Cells, arguments_of
from benchmarks._crowd import warm_up_then_cosine
from benchmarks._places import example
from benchmarks.deep_compression import lenet
from distcomp import pruning

BATCH, SEEDS = 64, 5
RATES = {"LeNet-300-100": 0.1, "residual CNN": 0.05}


@dataclass(frozen=True)
class Phases:
    """Training for so many steps; pruning in between, whose clock begins with it."""

    steps: int

    @property
    def begin(self) -> int:
        return self.steps // 5

    @property
    def end(self) -> int:
        return 3 * self.steps // 5

    @property
    def span(self) -> int:
        return self.end - self.begin

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(range(0, self.span, self.span // 4))


PHASES = {"LeNet-300-100": Phases(3600), "residual CNN": Phases(1200)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.norm_two = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_two(self.two(torch.relu(self.norm_one(self.one(x)))))
        return torch.relu(out + x)


def cnn(width: int = 16) -> nn.Sequential:
    """The two digits are its input's two channels."""
    return nn.Sequential(
        nn.Unflatten(1, (2, 8, 8)),
        nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        Block(width), Block(width), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


KERNELS = [f"{block}.{layer}.weight" for block in (5, 6) for layer in ("one", "two")]
NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"LeNet-300-100": lenet, "residual CNN": cnn}
Maker = Callable[[nn.Module, torch.optim.Optimizer, Phases], pruning.Pruner]


@dataclass(frozen=True)
class Row:
    """One method at one setting; ``timed``: with and without zeros, and shrunk."""

    method: str
    setting: str
    make: Maker | None
    timed: bool = False
    from_start: bool = False


def magnitude(share: float, names: list[str] | None = None) -> Maker:
    return lambda net, optimizer, phases: pruning.magnitude(
        net, optimizer, share, steps=phases.cuts, names=names
    )


def at_once(share: float) -> Maker:
    return lambda net, optimizer, phases: pruning.magnitude(net, optimizer, share, steps=(phases.span // 2,))


def quality(factor: float) -> Maker:
    return lambda net, optimizer, phases: pruning.magnitude(
        net, optimizer, factor, steps=(0, phases.span // 2), by="quality"
    )


def surgery(rate: float, names: list[str] | None = None) -> Maker:
    return lambda net, optimizer, phases: pruning.dns(net, optimizer, rate, until=phases.span, names=names)


def frequency(rate: float, law: str) -> Maker:
    return lambda net, optimizer, phases: pruning.frequency(
        net, optimizer, rate, bands=pruning.Bands(law), until=phases.span, names=KERNELS
    )


def ssl(strength: float, share: float = 1.0) -> Maker:
    return lambda net, optimizer, phases: pruning.ssl(
        net, optimizer, until=round(share * phases.span), filters=strength, channels=strength
    )


def gradual(share: float) -> Maker:
    return lambda net, optimizer, phases: pruning.gradual(
        net, optimizer, share, end=phases.span - 1, every=10
    )


def dense_again(share: float) -> Maker:
    return lambda net, optimizer, phases: pruning.dsd(
        net, optimizer, share, sparse_from=0, dense_from=phases.span
    )


def rigl(net: nn.Module, optimizer: torch.optim.Optimizer, phases: Phases) -> pruning.Pruner:
    return pruning.rigl(net, optimizer, 0.9, every=20, until=phases.end)


@torch.no_grad()
def scaled_up(net: nn.Module, density: float) -> nn.Module:
    """Few weights give a layer's outputs the variance that all of them did."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.div_(density**0.5)
    return net


def shared_examples(count: int) -> tuple[Tensor, Tensor]:
    digits = example("digits")

    return digits.pairs(*digits.digits()[0], count, torch.Generator().manual_seed(1))


def correlated(share: float) -> Maker:
    """Layer by layer, the last as pruning begins and the first as it ends."""
    return lambda net, optimizer, phases: pruning.correlation(
        net, optimizer, share, inputs=shared_examples(500)[0], every=phases.span // 8
    )


def discriminating(share: float) -> Maker:
    return lambda net, optimizer, phases: pruning.dcp(
        net, optimizer, share, data=shared_examples(200), every=phases.span // 8
    )


COMMON = [
    Row("dense", "", None),
    *[Row("magnitude", f"{share:g}", magnitude(share), timed=share == 0.9)
      for share in (0.7, 0.8, 0.9, 0.95, 0.98)],
    *[Row("magnitude at once", f"{share:g}", at_once(share)) for share in (0.7, 0.9, 0.95)],
    *[Row("dns", f"{rate:g}", surgery(rate)) for rate in (0.0, 0.5, 1.0, 1.5, 2.0)],
    *[Row("correlation", f"{share:g}", correlated(share)) for share in (0.7, 0.9, 0.95)],
    *[Row("dsd", f"{share:g}", dense_again(share)) for share in (0.3, 0.5)],
    *[Row("ssl", f"{one:g}", ssl(one), timed=True) for one in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)],
    *[Row("ssl, half as long", f"{one:g}", ssl(one, 0.5), timed=True) for one in (0.03, 0.04, 0.06)],
    *[Row("gradual", f"{share:g}", gradual(share)) for share in (0.9, 0.95)],
    Row("rigl", "0.9", rigl, from_start=True),
    Row("rigl, scaled up at first", "0.9", lambda n, o, p: rigl(scaled_up(n, 0.1), o, p), from_start=True),
    Row("nm", "2:4", lambda n, o, _: pruning.nm(n, o, steps=(0,))),
    Row("group_lasso", "0.002", lambda n, o, p: pruning.group_lasso(n, o, 0.002, until=p.span)),
]  # fmt: skip
ROWS: dict[str, list[Row]] = {
    "LeNet-300-100": [
        *COMMON,
        *[Row("magnitude, quality", f"{factor:g}", quality(factor)) for factor in (0.75, 1.0, 1.5, 2.0)],
    ],
    "residual CNN": [
        *COMMON,
        *[Row("dcp", f"{share:g}", discriminating(share), timed=True) for share in (0.3, 0.5, 0.7)],
        *[Row("magnitude of kernels", f"{share:g}", magnitude(share, KERNELS))
          for share in (0.5, 0.7, 0.85, 0.95)],
        *[Row("dns of kernels", f"{rate:g}", surgery(rate, KERNELS)) for rate in (0.0, 0.5, 1.0, 1.5)],
        *[Row(f"frequency, {law}", f"{rate:g}", frequency(rate, law))
          for law in ("rising", "flat") for rate in (0.0, 0.5, 1.0)],
    ],
}  # fmt: skip
AGAINST = [
    ("LeNet-300-100", "dns", "magnitude"), ("LeNet-300-100", "dns", "magnitude, quality"),
    ("residual CNN", "dns", "magnitude"),
    ("LeNet-300-100", "correlation", "magnitude at once"),
    ("residual CNN", "correlation", "magnitude at once"),
    ("residual CNN", "frequency, rising", "dns of kernels"),
    ("residual CNN", "frequency, flat", "dns of kernels"),
    ("residual CNN", "frequency, rising", "magnitude of kernels"),
]  # fmt: skip


def cell(network: str, row: Row, seed: int) -> dict[str, Any]:
    digits = example("digits")

    (images, labels), held_out = digits.digits()
    torch.manual_seed(seed)
    net, draw = NETWORKS[network](), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), RATES[network], momentum=0.9)
    phases = PHASES[network]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(phases.steps))
    pruner = None
    for step in range(phases.steps):
        if row.make is not None and step == (0 if row.from_start else phases.begin):
            pruner = row.make(net, optimizer, phases)
        x, y = digits.pairs(images, labels, BATCH, draw)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        if not math.isfinite(loss.item()):
            return {"diverged": step}
        loss.backward()
        optimizer.step()
        schedule.step()
    found: dict[str, Any] = {"remaining": 1.0}
    if pruner is not None:
        pruner.settle()
        found["remaining"] = pruner.density
    x, y = digits.pairs(*held_out, 5000, torch.Generator().manual_seed(0))
    found["test_loss"], found["test_accuracy"] = digits.evaluate(net.eval(), x, y)
    if row.timed:
        found |= timed(network, net, x)
    return found


@torch.no_grad()
def timed(network: str, net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Inference by the dense network, by this one with its zeros, and by this one shrunk, in turn."""
    small = pruning.shrink(net)
    difference = (small(x) - net(x)).abs().max().item()
    forms = {"dense": NETWORKS[network]().eval(), "with_zeros": pruning.materialize(net), "shrunk": small}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(15):
        for name, form in forms.items():
            began_s = time.perf_counter()
            form(x[:512])
            seconds[name].append(time.perf_counter() - began_s)
    return {
        "shrunk_difference": difference,
        "shrunk_parameters": sum(one.numel() for one in small.parameters()),
        "parameters": sum(one.numel() for one in net.parameters()),
        **{f"{name}_s": min(several) for name, several in seconds.items()},
    }


def mean_of(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def summary(runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """One row over its seeds; ``difference``: of test losses to the dense network's, seed by seed."""
    pairs = [(one, base) for one, base in zip(runs, dense, strict=True) if "diverged" not in one]
    found: dict[str, Any] = {"seeds": len(runs), "diverged": len(runs) - len(pairs)}
    if pairs:
        found["difference"] = mean_of([one["test_loss"] - base["test_loss"] for one, base in pairs])
        for name in ("remaining", "test_loss", "test_accuracy"):
            found[name] = mean_of([one[name] for one, _ in pairs])
        if "shrunk_s" in pairs[0][0]:
            for name in ("shrunk", "with_zeros"):
                found[f"faster_{name}"] = mean_of([one["dense_s"] / one[f"{name}_s"] for one, _ in pairs])
            found["shrunk_parameters"] = mean_of([one["shrunk_parameters"] for one, _ in pairs])
    return found


def curve(done: dict[str, Any], network: str, method: str, seed: int) -> list[tuple[float, float]]:
    """(log remaining, test loss) of a method's settings in one seed, rising."""
    runs = [done.get(key(network, row, seed), {}) for row in ROWS[network] if row.method == method]
    return sorted((math.log(r["remaining"]), r["test_loss"]) for r in runs if r.get("remaining", 0) > 0)


def against(done: dict[str, Any], network: str, method: str, other: str) -> list[dict[str, Any]]:
    """A method's rows: test loss above that of another at the same remaining weights, where its curve has
    them."""
    found = []
    for row in (one for one in ROWS[network] if one.method == method):
        differences, remaining = [], []
        for seed in range(SEEDS):
            run, points = done.get(key(network, row, seed), {}), curve(done, network, other, seed)
            at = math.log(run["remaining"]) if run.get("remaining", 0) > 0 else math.inf
            if points and points[0][0] <= at <= points[-1][0]:
                differences.append(run["test_loss"] - float(np.interp(at, *zip(*points, strict=True))))
                remaining.append(run["remaining"])
        if differences:
            found.append({"setting": row.setting, "seeds": len(differences), "remaining": mean_of(remaining),
                          "difference": mean_of(differences)})  # fmt: skip
    return found


def key(network: str, row: Row, seed: int) -> str:
    return f"{network} | {row.method} | {row.setting} | seed {seed}"


def tabulate(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for network, rows in ROWS.items():
        table[network] = {}
        for row in rows:
            seeds = [s for s in range(SEEDS) if {key(network, one, s) for one in (row, rows[0])} <= set(done)]
            if seeds:
                runs, dense = ([done[key(network, one, s)] for s in seeds] for one in (row, rows[0]))
                name = f"{row.method} {row.setting}".strip()
                table[network][name] = summary(runs, dense)
    return table


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "task": "digit pairs, last digit of the sum", "batch": BATCH, "seeds": SEEDS,
        "steps": {name: phases.steps for name, phases in PHASES.items()}, "rates": RATES,
        "optimizer": "SGD, momentum 0.9, warm-up then cosine",
        "reduced": "small networks: a seed takes fifteen minutes of one core",
    }  # fmt: skip
    cells = Cells("pruning_table", about)
    for seed in range(SEEDS):
        for network, wanted_rows in ROWS.items():
            for one in wanted_rows:
                cells.get(key(network, one, seed), lambda n=network, r=one, s=seed: cell(n, r, s))
        done = cells.document["cells"]
        cells.document["table"] = tabulate(done)
        cells.document["against"] = {f"{n}: {m} against {o}": against(done, n, m, o) for n, m, o in AGAINST}
        cells.write()
    if wanted.json:
        print(json.dumps(cells.document))
        return
    for network, rows in cells.document["table"].items():
        for name, row in rows.items():
            shown = "".join(f"{row[k]['mean']:9.4f}" for k in ("remaining", "test_loss") if k in row)
            print(f"{network}  {name:<28}{shown or '  diverged'}")


if __name__ == "__main__":
    main()
