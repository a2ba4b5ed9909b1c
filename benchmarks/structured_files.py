"""Files of one trained convolutional network: Deep Compression, CNNpack, soft weight-sharing.

    python -m benchmarks.structured_files           # resumes; writes results/structured_files.json

Shifted digits. Every row begins with the same trained network; none is fine-tuned afterwards unless its row
says so. What is judged is the model that is read back from the file.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks import structured_table
from benchmarks._common import Cells, arguments_of
from benchmarks._structured_tasks import NETWORKS, RATE, STEPS, TUNING, Task, trained
from distcomp import pruning, structured
from distcomp.files.container import compress, decompress
from distcomp.files.dct_pack import DctPack

SEEDS = 1
PACKS = {
    "CNNpack, threshold 0.2, 64 levels": DctPack(8, 0.2, 64),
    "CNNpack, threshold 0.5, 32 levels": DctPack(8, 0.5, 32),
    "CNNpack, threshold 1, 16 levels": DctPack(8, 1.0, 16),
    "by frequency, no common kernels, threshold 0.5": DctPack(0, 0.5, 32),
}


def row(data: Task, state: dict[str, torch.Tensor], **how: Any) -> dict[str, Any]:
    """What a file weighs, and what the model that is read back does."""
    file, again = compress(state, **how), NETWORKS["shifted"]()
    again.load_state_dict(decompress(file))
    dense_bytes = sum(4 * value.numel() for value in state.values())
    return {"times_smaller": dense_bytes / len(file), "accuracy": data.accuracy(again)}


def cell(seed: int) -> dict[str, Any]:
    data, net, _ = structured_table.base("shifted", seed)
    rows = {"dense, as it is": {"times_smaller": 1.0, "accuracy": data.accuracy(net)}}
    state = pruning.plain_state(net)
    for bits in (5, 4):
        rows[f"shared values, {bits} bits, not trained"] = row(data, state, bits=bits)
    for name, pack in PACKS.items():
        rows[name] = row(data, state, bits=5, dct=pack)
    rows["Deep Compression: pruned to 1/5, 4 bits, trained"] = row(
        data, deep(data, copy.deepcopy(net)), bits=4
    )
    rows["soft weight-sharing"] = row(data, soft(data, copy.deepcopy(net)), bits=5)
    return rows


def deep(data: Task, net: nn.Module) -> dict[str, torch.Tensor]:
    """Pruned while training on, then shared values are trained."""
    pruners: list[pruning.Pruner] = []
    steps = STEPS["shifted"] // 2
    trained(data, net, steps, RATE / 2, lambda optimizer: pruners.append(
        pruning.gradual(net, optimizer, 0.8, end=steps // 2, every=10, scope="global")
    ))  # fmt: skip
    pruners[0].settle()
    pruners[0].detach()
    pruning.share(net, 4)
    trained(data, net, TUNING["shifted"], RATE / 8)
    return pruning.plain_state(net)


def soft(data: Task, net: nn.Module) -> dict[str, torch.Tensor]:
    steps = STEPS["shifted"] // 2 + TUNING["shifted"]
    driver = trained(data, net, steps, RATE / 2, lambda _: structured.soft_sharing(
        net, components=16, zero=0.9, strength=3e-4, rates=(1e-3, 1e-2)
    ))  # fmt: skip
    driver.finish()
    return pruning.plain_state(net)


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    plan = {"steps": STEPS["shifted"], "seeds": SEEDS, "task": "shifted digits"}
    cells = Cells("structured_files", plan)
    for seed in range(SEEDS):
        cells.get(f"seed {seed}", lambda s=seed: cell(s))


if __name__ == "__main__":
    main()
