"""Does a teacher help? The papers' claims in miniature, each beside its controls, five seeds.

    python -m benchmarks.distill_table                 # results/distill_table.json; goes on where it stopped
    python -m benchmarks.distill_table --seconds 60    # some cells of it
    python -m benchmarks.distill_table --show

Digits of scikit-learn: plain (64 pixels), pairs (two beside each other, the last digit of their sum), shifted
(one on a noisy canvas of 12 x 12). A cell is the test accuracy of the network that is kept, in per cent; of
"a digit never seen" the share of the 3s that it recognises.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks._common import Cells, no_more_cells
from benchmarks._distill_online import ONLINE, Cell, stepped, steps_of
from benchmarks._distill_tasks import Data, Rows, accuracy, cnn, digits, mlp, pairs, shifted, train
from distcomp import distill, precision

SEEDS = 5


# --- digits: 100 labels, 797 rows without ---


def few_labels(seed: int) -> tuple[Rows, Rows, Data]:
    """The 100 labelled rows, all rows with labels on those alone, and everything."""
    data = digits(seed)
    labels = torch.cat([data.train[1][:100], torch.full((797,), -1)])
    return (data.train[0][:100], data.train[1][:100]), (data.train[0], labels), data


@cache
def digit_teacher(seed: int, width: int = 128) -> nn.Module:
    teacher = mlp((64, width, width, 10), 100 + seed)
    train(teacher, digits(seed).train, 24, seed=seed)
    return teacher


def digits_by(
    loss: distill.Objective, teacher: Any = None, epochs: int = 24, unlabelled: bool = False
) -> Cell:
    """A student of 32 hidden units; ``teacher``: None, or a function of the seed."""

    def cell(seed: int) -> float:
        labelled, everything, data = few_labels(seed)
        student = mlp((64, 32, 10), seed)
        # as many steps: there are nine times as many rows with the unlabelled ones
        rows, rounds = (everything, epochs) if unlabelled else (labelled, epochs * 7)
        train(student, rows, rounds, loss, teacher and teacher(seed), seed=seed)
        return accuracy(student, data.test)

    return cell


def three_teachers(seed: int) -> list[nn.Module]:
    return [digit_teacher(seed, width) for width in (64, 96, 128)]


DIGITS = {
    "the teacher, all 897 labels": lambda seed: accuracy(digit_teacher(seed), digits(seed).test),
    "hard labels": digits_by(distill.hard_labels()),
    "hard labels, three times as long": digits_by(distill.hard_labels(), epochs=72),
    "label smoothing 0.1": digits_by(distill.hard_labels(smoothing=0.1)),
    "Hinton, the 100 rows alone": digits_by(distill.hinton(4, 0.5), digit_teacher),
    "Hinton, an untrained teacher, unlabelled rows": digits_by(
        distill.hinton(4, 0.5), lambda seed: mlp((64, 128, 128, 10), 100 + seed), unlabelled=True
    ),
    "teacher's hard labels, unlabelled rows": digits_by(
        distill.pseudo_labels(), digit_teacher, unlabelled=True
    ),
    "Hinton, unlabelled rows": digits_by(distill.hinton(4, 0.5), digit_teacher, unlabelled=True),
    "Hinton, three teachers, unlabelled rows": digits_by(
        distill.hinton(4, 0.5), three_teachers, unlabelled=True
    ),
    "mimicking, unlabelled rows": digits_by(distill.mimic(), digit_teacher, unlabelled=True),
    "mimicking a noisy teacher (0.5), unlabelled rows": digits_by(
        distill.mimic(noise=0.5), digit_teacher, unlabelled=True
    ),
}


# --- a digit that the student never saw ---


def never_saw_a_3(loss: distill.Objective) -> Cell:
    def cell(seed: int) -> float:
        images, labels = digits(seed).train
        student = mlp((64, 32, 10), seed)
        train(student, (images[labels != 3], labels[labels != 3]), 30, loss, digit_teacher(seed), seed=seed)
        tests, wanted = digits(seed).test
        return accuracy(student, (tests[wanted == 3], wanted[wanted == 3]))

    return cell


NEVER_SAW = {
    "hard labels": never_saw_a_3(distill.hard_labels()),
    "teacher's hard labels": never_saw_a_3(distill.pseudo_labels()),
    "Hinton, T = 8": never_saw_a_3(distill.hinton(8, 1.0)),
    "mimicking": never_saw_a_3(distill.mimic()),
}


# --- pairs: the teacher's own training set ---


@cache
def pair_teacher(seed: int) -> nn.Module:
    teacher = mlp((128, 192, 192, 10), 100 + seed)
    train(teacher, pairs(seed).train, 10, seed=seed)
    return teacher


def untrained(seed: int) -> nn.Module:
    return mlp((128, 192, 192, 10), 100 + seed)


def pairs_by(loss: distill.Objective, teacher: Any = None, epochs: int = 10) -> Cell:
    def cell(seed: int) -> float:
        student = mlp((128, 64, 64, 10), seed)
        train(student, pairs(seed).train, epochs, loss, teacher and teacher(seed), seed=seed)
        return accuracy(student, pairs(seed).test)

    return cell


PAIRS = {
    "the teacher": lambda seed: accuracy(pair_teacher(seed), pairs(seed).test),
    "hard labels": pairs_by(distill.hard_labels()),
    "hard labels, twice as long": pairs_by(distill.hard_labels(), epochs=20),
    "label smoothing 0.1": pairs_by(distill.hard_labels(smoothing=0.1)),
    "Hinton, an untrained teacher": pairs_by(distill.hinton(4, 0.5), untrained),
    "teacher's hard labels": pairs_by(distill.pseudo_labels(), pair_teacher),
    "Hinton, T = 4": pairs_by(distill.hinton(4, 0.5), pair_teacher),
    "mimicking": pairs_by(distill.mimic(), pair_teacher),
}


# --- hints for a thin deep student ---

THIN = (128, 48, 48, 48, 48, 10)


def hinted(second: distill.Objective | None, taught: bool = True) -> Cell:
    """Five epochs of stage one on what lies below the second layer, then ten of another loss."""

    def cell(seed: int) -> float:
        data, student = pairs(seed), mlp(THIN, seed)
        teacher = pair_teacher(seed) if taught else untrained(seed)
        first = data.train[0][:8]
        loss = distill.fitnet_hint("3", "1", distill.regressor(student, "3", teacher, "1", first))
        thaw = distill.freeze_above(student, "3", first)
        train(student, data.train, 5, loss, teacher, seed=seed).remove()
        thaw()
        train(student, data.train, 10, second, pair_teacher(seed), seed=seed)
        return accuracy(student, data.test)

    return cell


def thin(epochs: int, loss: distill.Objective | None = None) -> Cell:
    def cell(seed: int) -> float:
        student = mlp(THIN, seed)
        train(student, pairs(seed).train, epochs, loss, pair_teacher(seed), seed=seed)
        return accuracy(student, pairs(seed).test)

    return cell


HINTS = {
    "hard labels, 10 epochs": thin(10),
    "hard labels, 15 epochs": thin(15),
    "Hinton, 15 epochs": thin(15, distill.hinton(4, 0.5)),
    "hint of an untrained teacher 5, hard labels 10": hinted(None, taught=False),
    "hint 5, hard labels 10": hinted(None),
    "hint 5, Hinton 10": hinted(distill.hinton(4, 0.5)),
}


# --- attention and factors on shifted digits ---


@cache
def shifted_teacher(seed: int) -> nn.Module:
    teacher = cnn(16, 100 + seed)
    train(teacher, shifted(seed).train, 30, seed=seed)
    return teacher


def cheap(loss: distill.Objective | None, taught: bool = True, epochs: int = 30) -> Cell:
    """A student of the teacher's shape, its second convolution grouped and pointwise."""

    def cell(seed: int) -> float:
        data, student = shifted(seed), cnn(16, seed, groups=8)
        teacher = shifted_teacher(seed) if taught else cnn(16, 100 + seed)
        train(student, data.train, epochs, loss, teacher, seed=seed)
        return accuracy(student, data.test)

    return cell


def looking(beta: float) -> distill.Objective:
    return distill.hard_labels() + distill.attention(["1", "4"], beta=beta)


def factors(beta: float, taught: bool = True) -> Cell:
    def cell(seed: int) -> float:
        data, teacher = shifted(seed), shifted_teacher(seed)
        torch.manual_seed(seed)
        paraphraser = distill.Paraphraser(16, 8)
        if taught:
            batches = [batch for _ in range(5) for batch in data.train[0].split(64)]
            distill.train_paraphraser(teacher, "4", batches, paraphraser)
        loss = distill.factor_transfer("4", "4", paraphraser, distill.Translator(16, 8), beta)
        return cheap(distill.hard_labels() + loss)(seed)

    return cell


SHIFTED = {
    "the teacher": lambda seed: accuracy(shifted_teacher(seed), shifted(seed).test),
    "hard labels": cheap(None),
    "hard labels, twice as long": cheap(None, epochs=60),
    "Hinton, T = 4": cheap(distill.hinton(4, 0.5)),
    "attention of an untrained teacher, beta 30": cheap(looking(30), taught=False),
    **{f"attention, beta {beta}": cheap(looking(beta)) for beta in (5, 30, 100)},
    "factors, beta 50": factors(50),
    "factors of an untrained paraphraser, beta 50": factors(50, taught=False),
}


# --- KDGAN with 100 labels ---


def game(alpha: float, beta: float, gamma: float) -> Cell:
    """All three see the 100 labelled rows alone, as many steps as hard labels take."""

    def cell(seed: int) -> float:
        labelled, _, data = few_labels(seed)
        torch.manual_seed(seed)
        kdgan = distill.KDGAN(
            mlp((64, 32, 10), seed), mlp((64, 128, 128, 10), 100 + seed), distill.LabelDiscriminator(64, 10),
            alpha, beta, gamma, "1 ~> 0.3 @ 400",
        )  # fmt: skip
        stepped(kdgan, labelled, 200, seed, lambda x, y, step: kdgan(x, y, step))
        return accuracy(kdgan.classifier, data.test)

    return cell


def same_labels(loss: distill.Objective) -> Cell:
    """A teacher that saw the same 100 labels."""

    def cell(seed: int) -> float:
        labelled, _, data = few_labels(seed)
        teacher, student = mlp((64, 128, 128, 10), 100 + seed), mlp((64, 32, 10), seed)
        train(teacher, labelled, 100, seed=seed)
        train(student, labelled, 200, loss, teacher, seed=seed)
        return accuracy(student, data.test)

    return cell


GAME = {
    "hard labels": same_labels(distill.hard_labels()),
    "label smoothing 0.1": same_labels(distill.hard_labels(smoothing=0.1)),
    "Hinton from a teacher of the same labels": same_labels(distill.hinton(4, 0.5)),
    "KDGAN without distilling": game(0.5, 0.0, 0.0),
    "KDGAN without the game": game(0.0, 0.5, 0.1),
    "KDGAN": game(0.5, 0.5, 0.1),
}


# --- Apprentice on pairs, ternary inner layers ---

LOW = (128, 64, 64, 64, 10)


def ternary(network: nn.Module) -> nn.Module:
    return precision.ttq(network)


def low_bits(loss: distill.Objective, epochs: int, warm: int = 0, bits: bool = True) -> Cell:
    """``warm`` epochs in full precision first (scheme C, at a quarter of the rate afterwards)."""

    def cell(seed: int) -> float:
        data, student = pairs(seed), mlp(LOW, seed)
        if warm:
            train(student, data.train, warm, seed=seed).remove()
        student = ternary(student) if bits else student
        rate = 3e-3 / 4 if warm else 3e-3
        train(student, data.train, epochs, loss, pair_teacher(seed), seed=seed, rate=rate)
        return accuracy(student, data.test)

    return cell


def scheme_a(detached: bool) -> Cell:
    def cell(seed: int) -> float:
        data = pairs(seed)
        both = distill.TeacherAndApprentice(untrained(seed), mlp(LOW, seed), ternary)
        optimizer = torch.optim.Adam(both.parameters(), 3e-3)
        for batch in steps_of(data.train, 10, seed):
            optimizer.zero_grad()
            said = both(data.train[0][batch])
            distill.joint_loss(*said, data.train[1][batch], detached=detached).backward()
            optimizer.step()
        return accuracy(both.apprentice, data.test)

    return cell


APPRENTICE = {
    "full precision, 10 epochs": low_bits(distill.hard_labels(), 10, bits=False),
    "ternary, hard labels, 10": low_bits(distill.hard_labels(), 10),
    "A: teacher beside it, 10": scheme_a(True),
    "A, H pulls the teacher, too, 10": scheme_a(False),
    "B: a trained teacher, 10": low_bits(distill.apprentice(), 10),
    "C: from full precision 10, teacher 6": low_bits(distill.apprentice(), 6, warm=10),
    "C without a teacher, 10 and 6": low_bits(distill.hard_labels(), 6, warm=10),
    "ternary, hard labels, 16": low_bits(distill.hard_labels(), 16),
}

TABLES: dict[str, dict[str, Cell]] = {
    "digits": DIGITS, "a digit never seen": NEVER_SAW, "pairs": PAIRS, "hints": HINTS, "shifted": SHIFTED,
    "online": ONLINE, "kdgan": GAME, "apprentice": APPRENTICE,
}  # fmt: skip
PLAN = {"seeds": SEEDS, "tables": {name: list(rows) for name, rows in TABLES.items()}}


def complete_seeds(cells: Mapping[str, Any], name: str) -> list[int]:
    """The seeds of which every cell of a table is there."""
    return [seed for seed in range(SEEDS) if all(f"{name} | {row} | {seed}" in cells for row in TABLES[name])]


def table(cells: Mapping[str, Any], name: str) -> str:
    """Markdown: mean and standard deviation over the seeds, in per cent."""
    seeds = complete_seeds(cells, name)
    lines = [
        f"| {name}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} | test accuracy |",
        "|---|---|",
    ]
    for row in TABLES[name] if seeds else []:
        found = 100 * torch.tensor([cells[f"{name} | {row} | {seed}"]["accuracy"] for seed in seeds])
        spread = f" ± {found.std():.1f}" if len(seeds) > 1 else ""
        lines.append(f"| {row} | {found.mean():.1f}{spread} % |")
    return "\n".join(lines)


def main() -> None:
    over = no_more_cells(__doc__)
    torch.set_num_threads(1)
    study = Cells("distill_table", PLAN)
    # tables of small dense networks first: a convolution takes as long as ten of their cells
    for convolutions, seed in itertools.product((False, True), range(SEEDS)):
        rows = [(n, row, cell) for n, cells in TABLES.items() for row, cell in cells.items()]
        rows = [each for each in rows if (each[0] in ("shifted", "online")) is convolutions]
        for name, row, cell in rows:
            if over():
                break
            study.get(f"{name} | {row} | {seed}", lambda: {"accuracy": cell(seed)})  # noqa: B023
    for name in TABLES:
        print(table(study.document["cells"], name), end="\n\n")


if __name__ == "__main__":
    main()
