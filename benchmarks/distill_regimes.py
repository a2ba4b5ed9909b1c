"""Where else might KDGAN and Apprentice show what their papers claim? Fewer labels, a better teacher.

    python -m benchmarks.distill_regimes                 # writes results/distill_regimes.json; resumes
    python -m benchmarks.distill_regimes --show

:mod:`benchmarks.distill_table` did not show them: there KDGAN sees 100 labelled digits and nothing else, and
Apprentice's teacher the student's own pairs. Here KDGAN has 30 labels, too, and the other rows without
labels, which take part in all but the terms of the labels; its control spends them on pseudo-labels of a
teacher of the same few labels. Apprentice's teacher has seen four times as many pairs as its student. All
take as many steps as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks._common import Cells, shows_only
from benchmarks._distill_online import Cell, stepped
from benchmarks._distill_tasks import Data, accuracy, digits, mlp, pairs, train
from benchmarks.distill_table import LOW, ternary
from distcomp import distill

SEEDS, STEPS = 5, 400
MANY = 12_000
"""Pairs that the better teacher saw; the student has 3,000."""


def labelled(seed: int, count: int, everything: bool) -> Data:
    """Digits of which ``count`` have labels; the others without, or not there."""
    data = digits(seed)
    images, labels = data.train
    if not everything:
        return Data((images[:count], labels[:count]), data.test)
    return Data((images, torch.cat([labels[:count], torch.full((len(labels) - count,), -1)])), data.test)


def epochs(data: Data) -> int:
    """How many make the steps of all."""
    return STEPS // len(data.train[0].split(64))


def classifier(seed: int) -> nn.Module:
    return mlp((64, 32, 10), seed)


@cache
def same_labels_teacher(seed: int, count: int) -> nn.Module:
    """A teacher that saw the labelled rows alone."""
    data, teacher = labelled(seed, count, False), mlp((64, 128, 128, 10), 100 + seed)
    train(teacher, data.train, epochs(data) // 2, seed=seed)
    return teacher


def plain(count: int, smoothing: float = 0.0) -> Cell:
    def cell(seed: int) -> float:
        data, network = labelled(seed, count, False), classifier(seed)
        loss = distill.hard_labels(smoothing=smoothing)
        train(network, data.train, epochs(data), loss, same_labels_teacher(seed, count), seed=seed)
        return accuracy(network, data.test)

    return cell


def pseudo(count: int) -> Cell:
    def cell(seed: int) -> float:
        data, network = labelled(seed, count, True), classifier(seed)
        teacher = same_labels_teacher(seed, count)
        train(network, data.train, epochs(data), distill.pseudo_labels(), teacher, seed=seed)
        return accuracy(network, data.test)

    return cell


def game(count: int, everything: bool, alpha: float = 0.5) -> Cell:
    """``alpha`` 0: nobody judges the classifier, which distils with the teacher."""

    def cell(seed: int) -> float:
        data = labelled(seed, count, everything)
        torch.manual_seed(seed)
        kdgan = distill.KDGAN(
            classifier(seed), mlp((64, 128, 128, 10), 100 + seed), distill.LabelDiscriminator(64, 10),
            alpha, 0.5, 0.1, f"1 ~> 0.3 @ {STEPS}",
        )  # fmt: skip
        stepped(kdgan, data.train, epochs(data), seed, lambda x, y, step: kdgan(x, y, step))
        return accuracy(kdgan.classifier, data.test)

    return cell


@cache
def better_teacher(seed: int) -> nn.Module:
    """It has seen four times as many pairs, of the same images."""
    teacher = mlp((128, 192, 192, 10), 100 + seed)
    train(teacher, pairs(seed, MANY).train, 5, seed=seed)
    return teacher


def low_bits(loss: distill.Objective, warm: int = 0) -> Cell:
    """As in :mod:`benchmarks.distill_table`; ``warm`` epochs in full precision first, then six."""

    def cell(seed: int) -> float:
        data, student = pairs(seed), mlp(LOW, seed)
        if warm:
            train(student, data.train, warm, seed=seed).remove()
        student = ternary(student)
        left, rate = (6, 3e-3 / 4) if warm else (10, 3e-3)
        train(student, data.train, left, loss, better_teacher(seed), seed=seed, rate=rate)
        return accuracy(student, data.test)

    return cell


APPRENTICE = {
    "the teacher, four times as many pairs": lambda seed: accuracy(better_teacher(seed), pairs(seed).test),
    "ternary, hard labels": low_bits(distill.hard_labels()),
    "ternary, label smoothing 0.1": low_bits(distill.hard_labels(smoothing=0.1)),
    "B: that teacher": low_bits(distill.apprentice()),
    "C: from full precision, that teacher": low_bits(distill.apprentice(), 10),
    "C without a teacher": low_bits(distill.hard_labels(), 10),
}


def kdgan_rows(count: int) -> dict[str, Cell]:
    return {
        "hard labels": plain(count),
        "label smoothing 0.1": plain(count, 0.1),
        "pseudo-labels of a teacher of the same labels, unlabelled rows": pseudo(count),
        "KDGAN": game(count, False),
        "KDGAN, unlabelled rows, too": game(count, True),
        "no game for the classifier, unlabelled rows, too": game(count, True, 0.0),
    }


TABLES: dict[str, dict[str, Cell]] = {
    "kdgan, 30 labels": kdgan_rows(30), "kdgan, 100 labels": kdgan_rows(100), "apprentice": APPRENTICE,
}  # fmt: skip
PLAN = {"seeds": SEEDS, "steps": STEPS, "many": MANY, "tables": {n: list(rows) for n, rows in TABLES.items()}}


def complete_seeds(cells: Mapping[str, Any], name: str) -> list[int]:
    """The seeds of which every cell of a table is there."""
    return [seed for seed in range(SEEDS) if all(f"{name} | {row} | {seed}" in cells for row in TABLES[name])]


def main() -> None:
    show = shows_only(__doc__)
    torch.set_num_threads(1)
    study = Cells("distill_regimes", PLAN)
    for seed, name in itertools.product(() if show else range(SEEDS), TABLES):
        for row, cell in TABLES[name].items():
            study.get(f"{name} | {row} | {seed}", lambda: {"accuracy": cell(seed)})  # noqa: B023
    for name in TABLES:
        seeds = complete_seeds(study.document["cells"], name)
        print(f"{name}, {len(seeds)} seeds")
        for row in TABLES[name] if seeds else ():
            found = [100 * study.document["cells"][f"{name} | {row} | {seed}"]["accuracy"] for seed in seeds]
            print(f"  {sum(found) / len(found):5.1f} %  {row}")


if __name__ == "__main__":
    main()
