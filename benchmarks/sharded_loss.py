"""What do few bits cost a sharded model in test loss? Two tasks on FSDP2, five seeds, 400 steps.

    python -m benchmarks.sharded_loss            # an hour; resumes; writes results/sharded_loss.json
    python -m benchmarks.sharded_loss --show     # prints the table of what is there

Two ranks, an unshaped network (the loss does not depend on its speed). *Pairs of digits*: the network, data
and optimizer of examples/digits.py at a width of 256, each linear layer a group. *Bytes of text*: those of
examples/bytes_lm.py, each block a group, the rest in the root's. Each rank has data of its own. Settings
are paired by seed. Two controls should be worse: weights in two bits without differences, and gradients in
one bit without a residual. Where two things are rounded at once, each is by itself in two more rows. The
test loss is that of the weights that are trained; beside it that of the weights that the setting computes
with.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distcomp
from benchmarks._common import Cells, on_network, shows_only, start
from benchmarks._places import example

RANKS, STEPS, SEEDS, WIDTH, BATCH, TEXTS = 2, 400, 5, 256, 64, 8
PLAIN = "plain FSDP2"
SETTINGS: dict[str, tuple[str, str | None] | None] = {
    PLAIN: None,
    "8-bit weights, 4-bit gradients": ("qsgd:bits=4", "qsgd:bits=8"),
    "4-bit weights, 4-bit gradients": ("qsgd:bits=4", "qsgd:bits=4"),
    "4-bit differences, 4-bit gradients": ("qsgd:bits=4", "difference:compressor=(qsgd:bits=4)"),
    "1-bit gradients": ("qsgd:bits=1", None),
    "control: 2-bit weights": ("identity", "quantize:bits=2"),
    "control: 1-bit gradients without residual": ("qsgd:bits=1,error_feedback=False", None),
}

APART: dict[str, tuple[str, str | None] | None] = {
    "4-bit gradients": ("qsgd:bits=4", None),
    "4-bit differences": ("identity", "difference:compressor=(qsgd:bits=4)"),
}
"""What "4-bit differences, 4-bit gradients" is made of, each by itself."""
OF_APART = " | apart"


@dataclass(frozen=True)
class Task:
    """What is trained: a network, what is wrapped of it, its batches, optimizer and test."""

    network: Callable[[], nn.Module]
    group: type[nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rate_at: Callable[[int, int], float]
    evaluate: Callable[..., tuple[float, float]]


def pairs_of_digits(rank: int, size: int, draw: torch.Generator) -> Task:
    shown = example("digits")
    (images, labels), held_out = shown.digits()
    mine = images[rank::size], labels[rank::size]
    return Task(
        lambda: shown.network(WIDTH),
        nn.Linear,
        lambda: shown.pairs(*mine, BATCH, draw),
        shown.pairs(*held_out, shown.TEST_PAIRS, torch.Generator().manual_seed(0)),
        nn.functional.cross_entropy,
        lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.8, nesterov=True),
        shown.warm_up_then_cosine,
        shown.evaluate,
    )


def bytes_of_text(rank: int, size: int, draw: torch.Generator) -> Task:
    shown = example("bytes_lm")
    library = shown.modules()
    held_out = torch.cat(library[::10])
    del library[::10]
    mine = torch.cat(library[rank::size])
    return Task(
        shown.Reader,
        shown.Block,
        lambda: shown.texts(mine, TEXTS, draw),
        shown.texts(held_out, shown.TEST_TEXTS, torch.Generator().manual_seed(0)),
        shown.loss_of,
        lambda parameters: torch.optim.AdamW(parameters, 4e-3, betas=(0.9, 0.95)),
        shown.warm_up_then_cosine,
        shown.evaluate,
    )


TASKS = {"pairs of digits": pairs_of_digits, "bytes of text": bytes_of_text}


def sharded(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = task.network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.modules():
        if isinstance(part, task.group):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(name: str, setting: tuple[str, str | None] | None, seed: int, steps: int) -> dict[str, Any]:
    """One run: the test loss by the weights that are trained, and by those that are computed with."""
    rank, size = dist.get_rank(), dist.get_world_size()
    task = TASKS[name](rank, size, torch.Generator().manual_seed(seed * size + rank))
    model = sharded(task, seed)
    optimizer = task.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.rate_at(step, steps))
    handle = None
    if setting is not None:
        handle = distcomp.attach(model, optimizer, setting[0], seed=seed, weights=setting[1])
    for _ in range(steps):
        inputs, targets = task.batch()
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    computed, _ = task.evaluate(model, *task.test)
    whole = task.network()
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # an evaluation leaves the root's weights gathered
    whole.load_state_dict({key: value.full_tensor() for key, value in model.state_dict().items()})
    loss, accuracy = task.evaluate(whole, *task.test)
    if handle is not None:
        handle.detach()
    return {"test_loss": loss, "test_loss_as_computed": computed, "test_accuracy": accuracy}


def rank_main(settings: Any) -> dict[str, Any]:
    """All settings of one task and seed, one after the other."""
    rows = {
        name: trained(settings["task"], setting, settings["seed"], settings["steps"])
        for name, setting in (APART if settings["apart"] else SETTINGS).items()
    }
    return {"rows": rows}


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By task: mean and spread over the seeds that are there, and the difference to plain, seed by seed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for task in TASKS:
        labels = [f"{task} | seed {seed}" for seed in range(SEEDS)]
        seeds = [
            cells[label]["rows"] | cells.get(label + OF_APART, {"rows": {}})["rows"]
            for label in labels
            if label in cells
        ]
        names = [name for name in (*SETTINGS, *APART) if all(name in rows for rows in seeds)]
        if len(seeds) > 1:
            table[task] = {name: _row(seeds, name) for name in names}
    return table


def _row(seeds: list[dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    losses = [rows[name]["test_loss"] for rows in seeds]
    differences = [rows[name]["test_loss"] - rows[PLAIN]["test_loss"] for rows in seeds]
    plain = statistics.mean(rows[PLAIN]["test_loss"] for rows in seeds)
    return {
        "seeds": len(seeds),
        "mean": statistics.mean(losses),
        "spread": statistics.stdev(losses),
        "mean_as_computed": statistics.mean(rows[name]["test_loss_as_computed"] for rows in seeds),
        "paired_difference_mean": statistics.mean(differences),
        "paired_difference_spread": statistics.stdev(differences),
        "relative_to_plain": statistics.mean(losses) / plain,
    }


def main() -> None:
    show_only = shows_only(__doc__)
    about = {"ranks": RANKS, "steps": STEPS, "seeds": SEEDS, "width": WIDTH, "batch": BATCH, "texts": TEXTS}
    cells = Cells("sharded_loss", about)
    runs = itertools.product((False, True), range(0 if show_only else SEEDS), TASKS)
    for apart, seed, task in runs:
        settings = {"task": task, "seed": seed, "steps": STEPS, "apart": apart}
        cells.get(
            f"{task} | seed {seed}{OF_APART if apart else ''}",
            lambda told=settings: on_network("sharded_loss", RANKS, "unshaped", told),
        )
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for task, rows in cells.document["table"].items():
        print(task)
        for name, row in rows.items():
            print(f"  {name:<44}" + "".join(f"{value:10.4f}" for value in row.values()))


if __name__ == "__main__":
    start(main, rank_main)
