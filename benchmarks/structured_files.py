"""Files of two trained convolutional networks: Deep Compression, CNNpack, soft weight-sharing.

    python -m benchmarks.structured_files           # resumes; writes results/structured_files.json

Shifted digits. Every row of a network begins with the same trained one; none is fine-tuned afterwards unless
its row says so. What is judged is the model that is read back from the file. A call of ``distcomp compress``
writes the same bytes: both are :func:`distcomp.files.container.compress`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks._common import Cells, arguments_of
from benchmarks._places import example
from benchmarks._structured_tasks import NETWORKS, RATE, STEPS, TUNING, Task, trained
from distcomp import pruning, structured
from distcomp.files.container import compress, decompress
from distcomp.files.dct_pack import DctPack

SEEDS = 3
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "two layers of 5 x 5 kernels": NETWORKS["shifted"],
    "three layers of 3 x 3 kernels": lambda: example("architectures").NETWORKS["plain"](1.0),
}
State = dict[str, torch.Tensor]
PACKS = {
    "CNNpack, threshold 0.2, 64 levels": DctPack(8, 0.2, 64),
    "CNNpack, threshold 0.5, 32 levels": DctPack(8, 0.5, 32),
    "CNNpack, threshold 1, 16 levels": DctPack(8, 1.0, 16),
    "by frequency, no common kernels, threshold 0.5": DctPack(0, 0.5, 32),
}


def row(data: Task, make: Callable[[], nn.Module], state: State, **how: Any) -> dict[str, Any]:
    """What a file weighs, and what the model that is read back does."""
    file, again = compress(state, **how), make()
    again.load_state_dict(decompress(file))
    dense_bytes = sum(4 * value.numel() for value in state.values())
    return {"times_smaller": dense_bytes / len(file), "accuracy": data.accuracy(again)}


def cell(network: str, seed: int) -> dict[str, Any]:
    make, data = MAKERS[network], Task("shifted", seed)
    torch.manual_seed(seed)
    net = make()
    trained(data, net, STEPS["shifted"])
    rows = {"dense, as it is": {"times_smaller": 1.0, "accuracy": data.accuracy(net)}}
    state = pruning.plain_state(net)
    for bits in (5, 4):
        rows[f"shared values, {bits} bits, not trained"] = row(data, make, state, bits=bits)
    for name, pack in PACKS.items():
        rows[name] = row(data, make, state, bits=5, dct=pack)
    begun = data.draw.get_state()
    rows["Deep Compression: pruned to 1/5, 4 bits, trained"] = row(
        data, make, deep(data, copy.deepcopy(net)), bits=4
    )
    data.draw.set_state(begun)
    rows["soft weight-sharing"] = row(data, make, soft(data, copy.deepcopy(net)), bits=5)
    return rows


def deep(data: Task, net: nn.Module) -> State:
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


def soft(data: Task, net: nn.Module) -> State:
    steps = STEPS["shifted"] // 2 + TUNING["shifted"]
    driver = trained(data, net, steps, RATE / 2, lambda _: structured.soft_sharing(
        net, components=16, zero=0.9, strength=3e-4, rates=(1e-3, 1e-2)
    ))  # fmt: skip
    driver.finish()
    return pruning.plain_state(net)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so many; a later call goes on"
    )
    until = time.monotonic() + parser.parse_args().seconds
    torch.set_num_threads(1)
    plan = {"steps": STEPS["shifted"], "task": "shifted digits", "reduced": "3 seeds of 5"}
    cells = Cells("structured_files", plan)
    for seed in range(SEEDS):
        for network in MAKERS:
            if time.monotonic() > until:
                return
            cells.get(f"{network} | {seed}", lambda n=network, s=seed: cell(n, s))


if __name__ == "__main__":
    main()
