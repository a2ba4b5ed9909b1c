"""What does each structure cost in accuracy, beside the plain narrower network of the same parameters?

    python -m benchmarks.structured_table            # resumes; writes results/structured_table.json

Pairs of digits (128-256-256-10) and shifted digits (two convolutions of 5 x 5 kernels), five seeds; every row
of a seed begins with the same random numbers and sees the same batches. Then the papers' claims, one by one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from benchmarks import _structured_tasks as tasks
from benchmarks._common import Cells, arguments_of, mean_and_spread
from benchmarks._structured_tasks import (
    HIDDEN,
    NETWORKS,
    RATE,
    STEPS,
    TUNING,
    Task,
    narrow_width,
    numbers,
    trained,
)
from distcomp import pruning, structured
from distcomp.files.container import compress
from distcomp.parametrize import chain
from distcomp.pruning import plain_state
from distcomp.structured.factors import Tucker2

SEEDS = 5
SHARING_STEPS = 150
PLAIN = "plain, width "
Change = Callable[[nn.Module, str], nn.Module]


def circulant(block: int | None, signs: bool = False, layer: str | None = None) -> Change:
    return lambda net, task: structured.circulant(
        net, block, signs=signs, layers=HIDDEN[task] if layer is None else layer, start="variance", fft=False
    )


def flipped(first: bool, second: bool) -> Change:
    """Both layers circulant, with a sign flip before one of them."""
    return lambda net, task: circulant(None, second, "2")(circulant(None, first, "0")(net, task), task)


def hashed(compression: float, domain: str = "space", shape: tuple[float, float] = (1, 1)) -> Change:
    return lambda net, task: structured.hashed(
        net, compression, domain=domain, shape=shape, layers=HIDDEN[task], start="variance"
    )


def low_rank(rank: Any, kind: str = "svd") -> Change:
    return lambda net, task: structured.low_rank(net, rank, layers=HIDDEN[task], kind=kind)


STRUCTURES: dict[str, dict[str, Change]] = {
    "pairs": {
        **{f"block-circulant, b = {b}": circulant(b) for b in (4, 8, 16)},
        **{f"hashed, 1/{c}": hashed(c) for c in (4, 8, 16)},
        **{f"low rank, r = {r}": low_rank(r) for r in (27, 14, 7)},
        "circulant projections": circulant(None, signs=True),
        "circulant, no signs": circulant(None),
        **{
            f"circulant{', signs' if signs else ''}, {place} layer alone": circulant(None, signs, layer)
            for place, layer in (("first", "0"), ("second", "2"))
            for signs in (True, False)
        },
        "circulant, signs in the first layer": flipped(True, False),
        "circulant, signs in the second layer": flipped(False, True),
    },
    "shifted": {
        **{f"block-circulant, b = {b}": circulant(b) for b in (4, 8, 16)},
        **{f"hashed, 1/{c}": hashed(c) for c in (16, 64)},
        **{f"FreshNets, equal shares, 1/{c}": hashed(c, "dct") for c in (16, 64)},
        **{f"FreshNets, low frequencies, 1/{c}": hashed(c, "dct", (1, 2.5)) for c in (16, 64)},
        "Tucker-2, ranks 8, 6": low_rank((8, 6), "tucker2"),
        "Tucker-2, ranks 5, 4": low_rank((5, 4), "tucker2"),
        "CP, 14 components": low_rank(14, "cp"),
        "SVD, r = 3": low_rank(3, "svd"),
    },
}


def fresh(task: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return NETWORKS[task]()


def from_scratch(task: str, row: str, seed: int) -> dict[str, Any]:
    """A structure, or a plain network (``"plain, width 40"``), trained from a random start."""
    data = Task(task, seed)
    torch.manual_seed(seed)
    if row.startswith(PLAIN):
        net: nn.Module = NETWORKS[task](int(row.removeprefix(PLAIN)))
    else:
        net = NETWORKS[task]()
        if row != "dense":
            STRUCTURES[task][row](net, task)
    trained(data, net, STEPS[task])
    return {"parameters": numbers(net), "accuracy": data.accuracy(net)}


@cache
def narrow_row(task: str, row: str) -> str:
    """The plain network of a structure's parameters."""
    structure = STRUCTURES[task][row](NETWORKS[task](), task)
    return f"{PLAIN}{narrow_width(task, numbers(structure))}"


# ------------------------------------------------------------------------------------------------ the claims


def base(task: str, seed: int) -> tuple[Task, nn.Sequential, dict[str, Any]]:
    """A trained dense network."""
    data, net = Task(task, seed), fresh(task, seed)
    trained(data, net, STEPS[task])
    return data, net, {"dense": data.accuracy(net)}


def learning_compression(seed: int) -> dict[str, Any]:
    """Two values for each layer: LC, its quadratic penalty, compression after training, and that
    retrained."""
    data, net, rows = base("pairs", seed)
    start = data.draw.get_state()
    two = structured.codebook(2)
    rows["compressed directly"] = data.accuracy(structured.lc(copy.deepcopy(net), None, two).finish())
    direct = structured.lc(copy.deepcopy(net), None, two).finish()
    trained(data, direct, STEPS["pairs"], RATE)
    rows["compressed, its values trained"] = data.accuracy(direct)
    for name, multipliers in (("LC", True), ("LC, quadratic penalty", False)):
        data.draw.set_state(start)
        pupil = copy.deepcopy(net)
        driver = trained(
            data, pupil, STEPS["pairs"], RATE,
            lambda optimizer, m=multipliers, p=pupil: structured.lc(
                p, optimizer, two, mu=1e-3, factor=2.0, every=STEPS["pairs"] // 15, multipliers=m
            ),
        )  # fmt: skip
        rows[f"{name}: gap"] = driver.gap
        rows[name] = data.accuracy(driver.finish())
    return rows


def one_shot_tucker(seed: int) -> dict[str, Any]:
    """Decompose at the ranks of EVBMF, then train on; the same shape from scratch; dense trained on."""
    data, net, rows = base("shifted", seed)
    start = data.draw.get_state()
    small = copy.deepcopy(net)
    structured.low_rank(small, "evbmf", layers="3")
    (link,) = chain(small, "3.weight") or (None,)
    rows |= {"after decomposition": data.accuracy(small), "parameters": numbers(small)}
    trained(data, small, TUNING["shifted"], RATE / 2)
    rows["fine-tuned"] = data.accuracy(small)
    data.draw.set_state(start)
    trained(data, net, TUNING["shifted"], RATE / 2)
    rows["dense, trained on"] = data.accuracy(net)
    if isinstance(link, Tucker2):
        rows["ranks"] = list(link.ranks)
        again, scratch = Task("shifted", seed), fresh("shifted", seed)
        structured.low_rank(scratch, link.ranks, layers="3")
        trained(again, scratch, STEPS["shifted"])
        trained(again, scratch, TUNING["shifted"], RATE / 2)
        rows["same shape from scratch"] = again.accuracy(scratch)
    return rows


def error_reconstruction(seed: int) -> dict[str, Any]:
    """Rank 16 in all layers: SVD alone; global error reconstruction, without labels; trained on with
    labels."""
    data, net, rows = base("pairs", seed)
    start = data.draw.get_state()
    small = structured.low_rank(copy.deepcopy(net), 16, layers=["0", "2"], kind="svd")
    rows |= {"SVD": data.accuracy(small), "parameters": numbers(small)}
    labelled = copy.deepcopy(small)
    structured.reconstruct(small, net, (data.batch()[0] for _ in range(TUNING["pairs"])))
    rows["reconstructed, no label"] = data.accuracy(small)
    data.draw.set_state(start)
    trained(data, labelled, TUNING["pairs"], RATE / 2)
    rows["trained on, labels"] = data.accuracy(labelled)
    return rows


def forced(seed: int) -> dict[str, Any]:
    """SGD with a force between filters: accuracy, components for 95 % of the energy, accuracy at rank 6, and
    when that is trained on."""
    rows: dict[str, Any] = {}
    for strength in (0.0, 0.01, 0.03):
        data, net = Task("shifted", seed), fresh("shifted", seed)
        force = partial(structured.force_regularization, net, strength, names=["3.weight"])
        trained(data, net, 2 * STEPS["shifted"], 0.02, lambda _, force=force: force(), sgd=True)
        values = torch.linalg.svdvals(net[3].weight.detach().flatten(1))
        row = {"accuracy": data.accuracy(net), "components": structured.chosen_rank(values, 32, 400, 0.95)}
        row["rank 6"] = data.accuracy(structured.low_rank(net, 6, layers="3", kind="svd"))
        trained(data, net, TUNING["shifted"], 0.01, sgd=True)
        row["rank 6, trained on"] = data.accuracy(net)
        rows[f"{strength:g}"] = row
    return rows


def soft_shared(seed: int) -> dict[str, Any]:
    """Values and entropy after soft sharing; k-means and pruning at the same sparsity and values, no
    retraining."""
    data, net, rows = base("pairs", seed)
    state = plain_state(net)
    dense_bytes = 4 * sum(value.numel() for value in state.values())
    rough = copy.deepcopy(net)
    driver = trained(data, net, SHARING_STEPS, RATE / 2, lambda _: structured.soft_sharing(
        net, components=16, zero=0.95, strength=1e-4, rates=(1e-3, 1e-2)
    ))  # fmt: skip
    rows["entropy_bits"] = driver.entropy_bits()
    driver.finish()
    rows["soft sharing"] = data.accuracy(net)
    weights = torch.cat([net[layer].weight.detach().flatten() for layer in (0, 2, 4)])
    rows |= {"values": len(weights.unique()), "nonzero": float((weights != 0).float().mean())}
    rows["times_smaller"] = dense_bytes / len(compress(plain_state(net), 5))
    share, values = rows["nonzero"], max(2, rows["values"] - 1)
    control = structured.lc(rough, None, [structured.pruned(share), structured.codebook(values)]).finish()
    rows["pruned and k-means, not retrained"] = data.accuracy(control)
    rows["control_times_smaller"] = dense_bytes / len(compress(plain_state(control), 5))
    return rows


def longer_tucker(seed: int) -> dict[str, Any]:
    """The same as one-shot Tucker-2, of a base that was trained three times as long; and fine-tuned three
    times as long."""
    rows: dict[str, Any] = {}
    data, net = Task("shifted", seed), fresh("shifted", seed)
    trained(data, net, 3 * STEPS["shifted"])
    rows["dense"], start = data.accuracy(net), data.draw.get_state()
    small = structured.low_rank(copy.deepcopy(net), "evbmf", layers="3")
    rows |= {"after decomposition": data.accuracy(small), "parameters": numbers(small)}
    (link,) = chain(small, "3.weight")
    assert isinstance(link, Tucker2)
    rows["ranks"] = list(link.ranks)
    scratch = structured.low_rank(fresh("shifted", seed), link.ranks, layers="3")
    again = Task("shifted", seed)
    trained(again, scratch, 3 * STEPS["shifted"])
    begun = again.draw.get_state()
    for name, steps in (("", TUNING["shifted"]), (", three times as long", 3 * TUNING["shifted"])):
        data.draw.set_state(start)
        pupil = copy.deepcopy(small)
        trained(data, pupil, steps, RATE / 2)
        rows[f"fine-tuned{name}"] = data.accuracy(pupil)
        again.draw.set_state(begun)
        pupil = copy.deepcopy(scratch)
        trained(again, pupil, steps, RATE / 2)
        rows[f"same shape from scratch{name}"] = again.accuracy(pupil)
    return rows


def sparse_bases(seed: int) -> dict[str, Any]:
    """Zeros and accuracy of Liu's sparse coefficients, beside pruning the weight itself to as many zeros."""
    data, net, rows = base("shifted", seed)
    start = data.draw.get_state()
    for strength in (1.0, 3.0):
        data.draw.set_state(start)
        pupil = copy.deepcopy(net)
        driver = structured.sparse_convolution(pupil, strength, layers="3")
        trained(data, pupil, STEPS["shifted"], RATE / 2)
        zeros = driver.freeze()
        trained(data, pupil, TUNING["shifted"], RATE / 4)
        rows[f"{strength:g}"] = {
            "nonzero": 1 - zeros,
            "accuracy": data.accuracy(pupil),
            "accuracy, pruned to as many": pruned_to(zeros, data, net, start),
        }
    return rows


def pruned_to(zeros: float, data: Task, net: nn.Module, start: torch.Tensor) -> float:
    """Of the trained network, its second convolution pruned by magnitude while it trains on, as long."""
    data.draw.set_state(start)
    pupil, steps, pruners = copy.deepcopy(net), STEPS["shifted"], []
    trained(data, pupil, steps, RATE / 2, lambda optimizer: pruners.append(
        pruning.gradual(pupil, optimizer, zeros, end=steps // 2, every=10, names=["3.weight"])
    ))  # fmt: skip
    pruners[0].settle()
    trained(data, pupil, TUNING["shifted"], RATE / 4)
    return data.accuracy(pupil)


SIDE = torch.arange(20) // 10
"""Of each class of the two worlds."""


def found_share(found: torch.Tensor, true: torch.Tensor) -> float:
    """How many features are in their group; groups have no order."""
    right = float((found == true).float().mean())
    return max(right, 1 - right)


def splitnet(seed: int) -> dict[str, Any]:
    """Two worlds: SplitNet's groups and its cut trained on, beside the cut that is true, one at random, and
    the plain narrower network, each trained as long."""
    dense, learning, tuning = tasks.WORLD_STEPS
    data, net = Task("worlds", seed), fresh("worlds", seed)
    trained(data, net, dense)
    rows = {"dense": data.accuracy(net)}
    driver = trained(data, net, learning, RATE / 2, lambda _: structured.splitnet(
        net, ["0", "2", "4"], 2, until=learning * 5 // 7
    ))  # fmt: skip
    inputs, *_, classes = driver.assignments
    rows["dense, while learning groups"] = data.accuracy(net)
    rows["classes in their group"] = found_share(classes, SIDE)
    rows["pixels in their group"] = found_share(inputs, torch.arange(128) // 64)
    driver.finish()
    rows |= {"after the cut": data.accuracy(net), "parameters": numbers(net)}
    trained(data, net, tuning, RATE)
    rows["trained on"] = data.accuracy(net)
    half, pixels = torch.arange(64) // 32, torch.arange(128) // 64
    draw = torch.Generator().manual_seed(seed)
    mixed, any_side = pixels[torch.randperm(128, generator=draw)], SIDE[torch.randperm(20, generator=draw)]
    groups = {"true groups": (pixels, half, half, SIDE), "random groups": (mixed, half, half, any_side)}
    for name, given in groups.items():
        rows[f"accuracy of {name}"] = controlled(seed, cut_into(fresh("worlds", seed), given))
    width = narrow_width("worlds", int(rows["parameters"]))
    torch.manual_seed(seed)
    narrow = NETWORKS["worlds"](width)
    return rows | {"plain parameters": numbers(narrow), "plain": controlled(seed, narrow)}


def cut_into(net: nn.Module, groups: tuple[torch.Tensor, ...]) -> nn.Module:
    """Groups of the inputs, and of each layer's outputs."""
    for layer, inputs, outputs in zip(("0", "2", "4"), groups, groups[1:], strict=False):
        structured.install_structures(
            net, layer, lambda _, w, o=outputs, i=inputs: structured.BlockDiagonal(o, i, 2), "nearest"
        )
    return net


def controlled(seed: int, net: nn.Module) -> float:
    """Trained from scratch, as long as SplitNet in all."""
    dense, learning, tuning = tasks.WORLD_STEPS
    data = Task("worlds", seed)
    trained(data, net, dense + learning)
    trained(data, net, tuning, RATE / 2)
    return data.accuracy(net)


CLAIMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "LC": learning_compression,
    "one-shot Tucker-2": one_shot_tucker,
    "global error reconstruction": error_reconstruction,
    "force regularization": forced,
    "soft weight-sharing": soft_shared,
    "SplitNet": splitnet,
    "sparse bases": sparse_bases,
    "one-shot Tucker-2 of a longer trained base": longer_tucker,
}


def tabulate(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By task and row: parameters, accuracy, and accuracy above the narrow network of the same parameters."""
    table: dict[str, Any] = {}
    for task, changes in STRUCTURES.items():
        rows: dict[str, Any] = {}
        for row in ["dense", *changes]:
            found = {
                s: cells[f"{task} | {row} | {s}"] for s in range(SEEDS) if f"{task} | {row} | {s}" in cells
            }
            if not found:
                continue
            line = {
                "parameters": next(iter(found.values()))["parameters"],
                "accuracy": mean_and_spread([cell["accuracy"] for cell in found.values()]),
            }
            plain: dict[int, Any] = {}
            if row != "dense":
                plain = {s: cells.get(f"{task} | {narrow_row(task, row)} | {s}") for s in found}
            both = {s: cell for s, cell in plain.items() if cell is not None}
            if both:
                line["narrow_parameters"] = next(iter(both.values()))["parameters"]
                line["narrow"] = mean_and_spread([cell["accuracy"] for cell in both.values()])
                line["above_narrow"] = mean_and_spread(
                    [found[s]["accuracy"] - cell["accuracy"] for s, cell in both.items()]
                )
            rows[row] = line
        table[task] = rows
    return table


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so many; a later call goes on"
    )
    until = time.monotonic() + parser.parse_args().seconds
    torch.set_num_threads(1)
    plan = {"batch": tasks.BATCH, "steps": STEPS, "tuning": TUNING, "rate": RATE, "optimizer": "Adam, cosine",
            "reduced": "small networks: a seed takes minutes of one core"}  # fmt: skip
    cells = Cells("structured_table", plan)
    for key, make in planned():
        if time.monotonic() > until:
            break
        cells.get(key, make)
    cells.document["table"] = tabulate(cells.document["cells"])
    cells.write()
    print("done" if all(key in cells.document["cells"] for key, _ in planned()) else "to be continued")


def planned() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All cells, seed by seed."""
    for seed in range(SEEDS):
        for task, changes in STRUCTURES.items():
            plain = dict.fromkeys(narrow_row(task, row) for row in changes)
            for row in ["dense", *changes, *plain]:
                yield f"{task} | {row} | {seed}", partial(from_scratch, task, row, seed)
        for claim, make in CLAIMS.items():
            yield f"{claim} | {seed}", partial(make, seed)


if __name__ == "__main__":
    main()
