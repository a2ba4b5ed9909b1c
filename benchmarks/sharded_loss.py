"""What do few bits cost a sharded model in test loss? Pairs of digits on FSDP2, five seeds, 400 steps.

    python -m benchmarks.sharded_loss            # some minutes; resumes; writes results/sharded_loss.json
    python -m benchmarks.sharded_loss --show     # prints the table of what is there

Two ranks, an unshaped network (the loss does not depend on its speed), the network, data and optimizer of
examples/digits.py at a width of 256; each rank has images of its own. Settings are paired by seed. Two
controls should be worse: weights in two bits without differences, and gradients in one bit without a
residual. The test loss is that of the weights that are trained; beside it that of the weights that the
setting computes with.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distcomp
from benchmarks._common import Cells, on_network, shows_only, start
from benchmarks._places import example

RANKS, STEPS, SEEDS, WIDTH, BATCH, RATE = 2, 400, 5, 256, 64, 0.5
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


def sharded(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = example("digits").network(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(setting: tuple[str, str | None] | None, seed: int, steps: int, width: int) -> dict[str, Any]:
    """One run: the test loss by the weights that are trained, and by those that are computed with."""
    shown = example("digits")
    (images, labels), held_out = shown.digits()
    rank, size = dist.get_rank(), dist.get_world_size()
    mine, draw = (images[rank::size], labels[rank::size]), torch.Generator().manual_seed(seed * size + rank)
    model = sharded(width, seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.8, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: shown.warm_up_then_cosine(step, steps)
    )
    handle = None
    if setting is not None:
        handle = distcomp.attach(model, optimizer, setting[0], seed=seed, weights=setting[1])
    for _ in range(steps):
        inputs, targets = shown.pairs(*mine, BATCH, draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    test = shown.pairs(*held_out, shown.TEST_PAIRS, torch.Generator().manual_seed(0))
    computed, _ = shown.evaluate(model, *test)
    whole = shown.network(width)
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # an evaluation leaves the root's weights gathered
    whole.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    loss, accuracy = shown.evaluate(whole, *test)
    if handle is not None:
        handle.detach()
    return {"test_loss": loss, "test_loss_as_computed": computed, "test_accuracy": accuracy}


def rank_main(settings: Any) -> dict[str, Any]:
    """All settings of one seed, one after the other."""
    rows = {
        name: trained(setting, settings["seed"], settings["steps"], settings["width"])
        for name, setting in SETTINGS.items()
    }
    return {"rows": rows}


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over the seeds that are there, and the difference to plain FSDP2, seed by seed."""
    seeds = [cell["rows"] for cell in cells.values()]
    table = {}
    for name in SETTINGS if len(seeds) > 1 else ():
        losses = [rows[name]["test_loss"] for rows in seeds]
        differences = [rows[name]["test_loss"] - rows[PLAIN]["test_loss"] for rows in seeds]
        plain = statistics.mean(rows[PLAIN]["test_loss"] for rows in seeds)
        table[name] = {
            "mean": statistics.mean(losses),
            "spread": statistics.stdev(losses),
            "mean_as_computed": statistics.mean(rows[name]["test_loss_as_computed"] for rows in seeds),
            "paired_difference_mean": statistics.mean(differences),
            "paired_difference_spread": statistics.stdev(differences),
            "relative_to_plain": statistics.mean(losses) / plain,
        }
    return table


def main() -> None:
    show_only = shows_only(__doc__)
    about = {
        "ranks": RANKS, "steps": STEPS, "seeds": SEEDS, "width": WIDTH, "batch": BATCH, "rate": RATE,
    }  # fmt: skip
    cells = Cells("sharded_loss", about)
    for seed in range(0 if show_only else SEEDS):
        settings = {"seed": seed, "steps": STEPS, "width": WIDTH}
        cells.get(f"seed {seed}", lambda told=settings: on_network("sharded_loss", RANKS, "unshaped", told))
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    for name, row in cells.document["table"].items():
        print(f"{name:<44}" + "".join(f"{value:10.4f}" for value in row.values()))


if __name__ == "__main__":
    start(main, rank_main)
