"""How small does a trained net become, and what does it cost in accuracy? Pruned, shared, coded.

    python -m benchmarks.deep_compression            # resumes; writes results/deep_compression.json

LeNet-300-100 and a convolutional net of LeNet-5's size on digit pairs (the last digit of a sum), as in the
paper: a trained dense net is pruned and retrained, then its weights share values, which are trained. The
dense net trained on for as many steps is the control. Bytes are the file's, table and header included,
against the float32 state dict. The model that is judged is the one read back from the file.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks._common import Cells, arguments_of
from benchmarks._places import example
from distcomp import pruning

SEEDS, BITS, BATCH = 5, 4, 128
STEPS = {"dense": 2000, "pruned": 4000, "shared": 1000}
RATES = {"dense": 2e-3, "pruned": 2e-3, "shared": 3e-4}


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(128, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )  # fmt: skip


def lenet5() -> nn.Sequential:
    """59,295 parameters; LeNet-5 has some 61,000."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 16)),
        nn.Conv2d(1, 10, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 25, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(200, 250), nn.ReLU(), nn.Linear(250, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], float]] = {
    "LeNet-300-100": (lenet, 0.88),
    "LeNet-5-sized": (lenet5, 0.89),
}
"""With the share of weights that die, of all layers together."""


def train(net: nn.Module, phase: str, draw: torch.Generator, set_up: Any = None) -> None:
    """Adam, with a rate that falls along a cosine."""
    digits = example("digits")

    (images, labels), _ = digits.digits()
    optimizer = torch.optim.Adam(net.parameters(), RATES[phase])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS[phase])
    if set_up is not None:
        set_up(optimizer)
    for _ in range(STEPS[phase]):
        inputs, targets = digits.pairs(images, labels, BATCH, draw)
        optimizer.zero_grad()
        cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        schedule.step()


def judged(net: nn.Module, name: str = "") -> dict[str, float]:
    digits = example("digits")

    _, held_out = digits.digits()
    pairs = digits.pairs(*held_out, 20_000, torch.Generator().manual_seed(0))
    loss, accuracy = digits.evaluate(net, *pairs)
    return {f"{name}loss": loss, f"{name}accuracy": accuracy}


def cell(network: str, seed: int) -> dict[str, Any]:
    """One net and seed: dense, compressed, and dense trained on."""
    make, target = NETWORKS[network]
    torch.manual_seed(seed)
    net, draw = make(), torch.Generator().manual_seed(seed)
    train(net, "dense", draw)
    found: dict[str, Any] = judged(net, "dense_")
    control, its_draw = copy.deepcopy(net), draw.clone_state()
    for phase in ("pruned", "shared"):
        train(control, phase, its_draw)
    found |= judged(control, "dense_trained_on_")

    pruners: list[pruning.Pruner] = []
    train(net, "pruned", draw, lambda optimizer: pruners.append(
        pruning.gradual(net, optimizer, target, end=STEPS["pruned"] // 2, every=20, scope="global")
    ))  # fmt: skip
    pruners[0].settle()
    pruners[0].detach()
    found |= {"sparsity": 1 - pruners[0].density, **judged(net, "pruned_")}
    pruning.share(net, BITS)
    train(net, "shared", draw)
    state = pruning.plain_state(net)
    data = pruning.compress(state, BITS)
    again = make()
    again.load_state_dict(pruning.decompress(data))
    read = again.state_dict()
    shared = [name for name in state if name.endswith("weight")]  # biases are shared when they are coded
    found["bit_equal"] = all(torch.equal(read[name], state[name]) for name in shared)
    dense_bytes = sum(4 * value.numel() for value in control.state_dict().values())
    sizes = {"dense_bytes": dense_bytes, "file_bytes": len(data), "smaller": dense_bytes / len(data)}
    return {**found, **judged(again), **sizes}


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    targets = {network: target for network, (_, target) in NETWORKS.items()}
    cells = Cells(
        "deep_compression", {"bits": BITS, "batch": BATCH, "steps": STEPS, "rates": RATES, "targets": targets}
    )
    for seed in range(SEEDS):
        for network in NETWORKS:
            cells.get(f"{network} | seed {seed}", lambda n=network, s=seed: cell(n, s))
    for network in NETWORKS:
        done = [one for key, one in cells.document["cells"].items() if key.startswith(network)]
        keys = ("dense_accuracy", "accuracy", "dense_trained_on_accuracy", "smaller")
        print(network, {key: statistics.mean(one[key] for one in done) for key in keys})


if __name__ == "__main__":
    main()
