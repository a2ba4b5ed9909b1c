"""What runs for each example: exits, controller, policy, stages and halting, each beside a narrow network.

    python -m benchmarks.conditional_table          # five seeds; writes results/conditional_table.json
    python -m benchmarks.conditional_table --maps   # draws docs/figures/halting_maps.svg

On pairs of digits, eight clusters, and a digit somewhere on a noisy canvas (``shifted``). ``products`` are
multiplications of an example, ``answer_ms`` the measured time to answer the test set in batches of 1,000, on
one thread. Controls: a plain network; a narrow one with as many products; the same share of rows, blocks or
modules taken at random.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks._common import Cells, arguments_of
from benchmarks._conditional_tasks import Batches, clustered, pairs, shifted
from distcomp.conditional import (
    BlockPolicy,
    GatedStage,
    QController,
    SpatialHalting,
    average_products,
    exits,
    rate_loss,
    taken_shares,
)

SEEDS, BATCH, LR, CHUNK = 5, 128, 2e-3, 1000
STEPS = {"pairs": 400, "clusters": 300, "shifted": 300}
TASKS: dict[str, Callable[[], Batches]] = {"pairs": pairs, "clusters": clustered, "shifted": shifted}
WIDTH, UNITS, BLOCKS, RATE = 128, 128, 16, 0.25
SHARES = (0.2, 0.4, 0.6)
CHANNELS, STAGE, TAU, SHIFTED_BATCH = 8, 6, 0.02, 64
PLAN = {
    "seeds": SEEDS, "batch": BATCH, "lr": LR, "steps": STEPS, "width": WIDTH, "units": UNITS, "blocks":
    BLOCKS, "rate": RATE, "channels": CHANNELS, "stage": STAGE, "tau": TAU, "shifted_batch": SHIFTED_BATCH,
}  # fmt: skip

Row = dict[str, Any]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def train(
    task_name: str, task: Batches, model: nn.Module, seed: int, loss: Loss = plain_loss,
    each: Callable[[float], None] = lambda part: None,
) -> None:  # fmt: skip
    """``each`` is told the part of the run that is over, before each step."""
    model.train()
    steps, batch = STEPS[task_name], BATCH if task_name != "shifted" else SHIFTED_BATCH
    optimizer = torch.optim.Adam(model.parameters(), LR)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        each(step / steps)
        x, y = task(batch, draw)
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        rates.step()
    model.eval()


@torch.no_grad()
def answered(task: Batches, answer: Callable[[Tensor], Tensor], products: float) -> Row:
    """Accuracy on the test set, and the time that it takes (the best of three)."""
    x, y = task.test
    scores, best_s = torch.empty(0), float("inf")
    for _ in range(3):
        began_s = time.perf_counter()
        scores = torch.cat([answer(part) for part in x.split(CHUNK)])
        best_s = min(best_s, time.perf_counter() - began_s)
    right = (scores.argmax(1) == y).float().mean().item()
    return {"test_accuracy": right, "products": products, "answer_ms": best_s * 1e3}


def linear_products(model: nn.Module) -> float:
    return float(sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)))


def chain(inputs: int, width: int, layers: int, classes: int) -> nn.Sequential:
    """Layers of ``width`` units, then a classifier."""
    widths = [inputs, *[width] * layers]
    hidden = [
        nn.Sequential(nn.Linear(before, after), nn.ReLU()) for before, after in itertools.pairwise(widths)
    ]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def narrow_width(inputs: int, layers: int, classes: int, products: float) -> int:
    """The width at which a chain takes as many products."""
    return next(w for w in range(2, 1000) if inputs * w + (layers - 1) * w * w + w * classes >= products)


def plain(task_name: str, task: Batches, seed: int, width: int, layers: int = 4) -> Row:
    torch.manual_seed(seed)
    model = chain(task.inputs, width, layers, task.classes)
    train(task_name, task, model, seed)
    return answered(task, model, linear_products(model))


# ----------------------------------------------------------------------------------------------- the systems


def with_exits(task_name: str, task: Batches, seed: int) -> dict[str, Row]:
    """An exit after the first of four layers: shares that leave by entropy, and the same shares at random."""
    torch.manual_seed(seed)
    model = chain(task.inputs, WIDTH, 4, task.classes)
    whole = linear_products(model)
    head = nn.Linear(WIDTH, task.classes)
    sides = exits(model, {"0": head}, (1.0, 0.3))
    train(task_name, task, model, seed, lambda net, x, y: sides.loss(net(x), y))
    early = task.inputs * WIDTH + head.weight.numel()
    held_out, _ = task(2000, torch.Generator().manual_seed(10_000 + seed))
    rows: dict[str, Row] = {}
    for share in (0.0, *SHARES):
        sides.calibrate(held_out, (share,))
        taken = torch.cat([sides.answer(part).exits for part in task.test[0].split(CHUNK)])
        products = average_products((early, whole + head.weight.numel()), taken)
        name = f"exits, {share:.0%} leave"
        rows[name] = answered(task, lambda part: sides.answer(part).scores, products)
        rows[name]["share"] = (taken == 0).float().mean().item()
        if share:
            draw = torch.Generator().manual_seed(seed)

            def at_random(number: int, sure: Tensor, share: float = share, draw: Any = draw) -> Tensor:
                return torch.rand(len(sure), generator=draw) < share

            rows[f"exits, {share:.0%} at random"] = answered(
                task, lambda part, at=at_random: sides.answer(part, at).scores, products
            )
    return rows


def with_controller(task_name: str, task: Batches, seed: int) -> dict[str, Row]:
    """A linear classifier or a network of three layers, at the controller's choice."""
    torch.manual_seed(seed)
    cheap, full = nn.Linear(task.inputs, task.classes), chain(task.inputs, WIDTH, 3, task.classes)
    cost = linear_products(cheap) / linear_products(full)
    node = QController(task.inputs, [cheap, full], (cost, 1.0), trade=0.8)

    def each(part: float) -> None:
        node.epsilon = max(0.1, 1.0 - 1.8 * part)

    train(task_name, task, node, seed, lambda net, x, y: node.loss(net(x), y), each)
    node(task.test[0])
    share = node.chosen.float().mean().item()
    products = (
        linear_products(node.value) + (1 - share) * linear_products(cheap) + share * linear_products(full)
    )
    rows = {"controller": answered(task, node, products) | {"share": share}}
    rows["always the cheap module"] = answered(task, cheap, linear_products(cheap))
    rows["always the full module"] = answered(task, full, linear_products(full))
    return rows


class Policed(nn.Module):
    """One hidden layer of blocks, and a classifier."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layer = BlockPolicy(inputs, UNITS, BLOCKS, RATE)
        self.head = nn.Linear(UNITS, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x))
        return scores


def policed_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    assert isinstance(model, Policed)
    losses = cross_entropy(model(x), y, reduction="none")
    return losses.mean() + model.layer.losses(losses)


def policed(task_name: str, task: Batches, seed: int, random: bool = False, rate: float = RATE) -> Row:
    torch.manual_seed(seed)
    model = Policed(task.inputs, task.classes)
    model.layer.random, model.layer.rate = random, rate
    train(task_name, task, model, seed, policed_loss)
    with torch.no_grad():
        model(task.test[0])
    share = model.layer.taken.float().mean().item()
    products = model.layer.products() + share * UNITS * task.classes
    return answered(task, model, products) | {"share": share}


def with_policy(task_name: str, task: Batches, seed: int) -> dict[str, Row]:
    return {
        "policy": policed(task_name, task, seed),
        "policy: blocks at random": policed(task_name, task, seed, random=True),
    }


class Staged(nn.Module):
    """A stem, four gated residual stages of two layers, a classifier."""

    def __init__(self, inputs: int, classes: int, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.stages = nn.Sequential(
            *(
                GatedStage(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)), width)
                for _ in range(4)
            )
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stages(self.stem(x)))
        return scores


def with_stages(task_name: str, task: Batches, seed: int) -> dict[str, Row]:
    torch.manual_seed(seed)
    model = Staged(task.inputs, task.classes)
    train(task_name, task, model, seed, lambda net, x, y: cross_entropy(net(x), y) + rate_loss(net, 0.5))
    with torch.no_grad():
        model(task.test[0])
    shares = taken_shares(model)
    gates = sum(linear_products(stage.gate) for stage in model.stages)
    branches = sum(s * linear_products(t.branch) for s, t in zip(shares, model.stages, strict=True))
    products = linear_products(model.stem) + gates + branches + linear_products(model.head)
    return {"gated stages": answered(task, model, products) | {"share": statistics.fmean(shares)}}


class Canvas(nn.Module):
    """A convolution, a stage, the mean over positions, a classifier."""

    def __init__(self, stage: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU())
        self.stage = stage
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stage(self.stem(x))
        scores: Tensor = self.head(nn.functional.adaptive_max_pool2d(h, 2).flatten(1))
        return scores


class Fixed(nn.Module):
    """The units of a halting stage, all of them or the first few, at every position."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.units = SpatialHalting(channels, units).units

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = x + unit.branch(x)
        return x


def with_halting(task_name: str, task: Batches, seed: int) -> dict[str, Row]:
    positions = task.inputs
    unit = 10 * CHANNELS * CHANNELS
    rest = positions * 9 * CHANNELS
    torch.manual_seed(seed)
    stage = SpatialHalting(CHANNELS, STAGE, bias=-2.0)
    model = Canvas(stage, CHANNELS, task.classes)

    def joint(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        task_loss = cross_entropy(net(x), y)
        return task_loss + TAU * stage.ponder.cost

    train(task_name, task, model, seed, joint)
    with torch.no_grad():
        model(task.test[0])
    ran = stage.ponder.units
    bright = task.test[0][:, 0] > task.test[0].min() + 0.5 * (task.test[0].max() - task.test[0].min())
    about = {
        "units": ran.mean().item(),
        "on_digit": ran[bright].mean().item(),
        "elsewhere": ran[~bright].mean().item(),
    }
    products = positions * stage.products(CHANNELS) + rest
    rows = {"halting, gathered": answered(task, model, products) | about}
    stage.gathered = False
    rows["halting, masked"] = (
        answered(task, model, positions * (STAGE * unit + 5 * 9 * CHANNELS) + rest) | about
    )
    for name, units in (("all units", STAGE), ("half of the units", STAGE // 2)):
        torch.manual_seed(seed)
        fixed = Canvas(Fixed(CHANNELS, units), CHANNELS, task.classes)
        train(task_name, task, fixed, seed)
        rows[f"{name} everywhere"] = answered(task, fixed, positions * units * unit + rest)
    return rows


SYSTEMS: dict[str, tuple[tuple[str, ...], Callable[[str, Batches, int], dict[str, Row]]]] = {
    "exits": (("pairs", "clusters"), with_exits),
    "controller": (("pairs", "clusters"), with_controller),
    "policy": (("pairs", "clusters"), with_policy),
    "stages": (("pairs", "clusters"), with_stages),
    "halting": (("shifted",), with_halting),
}


def narrow(task_name: str, task: Batches, seed: int, layers: int, products: float) -> Row:
    """A plain chain with as many products, for each example."""
    width = narrow_width(task.inputs, layers, task.classes, products)
    return plain(task_name, task, seed, width, layers) | {"width": width}


def seed_of_table(cells: Cells, seed: int, systems: tuple[str, ...]) -> None:
    for system in systems:
        tasks, run = SYSTEMS[system]
        for name in tasks:
            task = TASKS[name]()
            key = f"{name}|{system}|{seed}"
            rows = cells.get(key, lambda run=run, name=name, task=task: run(name, task, seed))
            if system == "policy":  # which takes more than it was asked for
                share = rows["policy"]["share"]
                cells.get(
                    f"{name}|policy: as many at random|{seed}",
                    lambda name=name, task=task, share=share: {
                        "policy: as many blocks at random": policed(name, task, seed, True, share)
                    },
                )
            chosen = {
                "exits": ("exits, 40% leave", 4), "controller": ("controller", 3), "policy": ("policy", 1),
                "stages": ("gated stages", 4),
            }.get(system)  # fmt: skip
            if chosen is not None:
                products, layers = rows[chosen[0]]["products"], chosen[1]
                cells.get(
                    f"{name}|{system}: narrow|{seed}",
                    lambda name=name, task=task, layers=layers, products=products, beside=chosen[0]: {
                        f"narrow beside {beside}": narrow(name, task, seed, layers, products)
                    },
                )
    for name in ("pairs", "clusters") if "exits" in systems else ():
        cells.get(
            f"{name}|plain|{seed}",
            lambda name=name: {"plain, 4 layers": plain(name, TASKS[name](), seed, WIDTH)},
        )


def draw_maps() -> None:
    """Digits on their canvas, and the units that each position ran."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from benchmarks._places import ROOT

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "distcomp", "font.size": 8})
    task = shifted()
    torch.manual_seed(0)
    stage = SpatialHalting(CHANNELS, STAGE, bias=-2.0)
    model = Canvas(stage, CHANNELS, task.classes)

    def joint(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        task_loss = cross_entropy(net(x), y)
        return task_loss + TAU * stage.ponder.cost

    train("shifted", task, model, 0, joint)
    with torch.no_grad():
        model(task.test[0][:8])
    figure, axes = plt.subplots(2, 8, figsize=(8, 2.2))
    for column in range(8):
        axes[0, column].imshow(task.test[0][column, 0], cmap="gray_r")
        drawn = axes[1, column].imshow(stage.ponder.units[column], cmap="viridis", vmin=1, vmax=STAGE)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_ylabel("canvas")
    axes[1, 0].set_ylabel("units run")
    figure.colorbar(drawn, ax=axes[1, :].tolist(), shrink=0.8)
    path = ROOT / "docs" / "figures" / "halting_maps.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--maps", action="store_true", help="draw the maps and train one network")
    parser.add_argument("--only", choices=SYSTEMS, help="this system alone")
    torch.set_num_threads(1)
    wanted = parser.parse_args()
    if wanted.maps:
        draw_maps()
        return
    cells = Cells("conditional_table", PLAN)
    usual = (("exits", "controller", "policy", "stages"), ("halting",))
    for systems in usual if wanted.only is None else ((wanted.only,),):
        for seed in range(SEEDS):
            seed_of_table(cells, seed, systems)


if __name__ == "__main__":
    main()
