"""docs/distill.md: does a teacher help, and what do exchanged predictions cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import codistill as codistillation
from benchmarks import codistill_lm, codistill_network, distill_regimes, distill_table
from benchmarks._tables import Block, markdown, result, source

HELPS = (
    (
        "a trained teacher, and rows without labels",
        "digits",
        ("Hinton, unlabelled rows", "Hinton, three teachers, unlabelled rows", "mimicking, unlabelled rows"),
        ("hard labels", "hard labels, three times as long", "label smoothing 0.1"),
    ),
    (
        "the same, and you could take its likeliest class as a label",
        "digits",
        ("Hinton, unlabelled rows", "Hinton, three teachers, unlabelled rows", "mimicking, unlabelled rows"),
        ("teacher's hard labels, unlabelled rows",),
    ),
    (
        "a class that the student's rows do not show",
        "a digit never seen",
        ("Hinton, T = 8", "mimicking"),
        ("hard labels", "teacher's hard labels"),
    ),
    (
        "nothing but the rows that the teacher learnt from",
        "pairs",
        ("Hinton, T = 4", "mimicking"),
        ("hard labels", "hard labels, twice as long", "label smoothing 0.1", "Hinton, an untrained teacher"),
    ),
    (
        "a thin deep student",
        "hints",
        ("hint 5, hard labels 10", "hint 5, Hinton 10"),
        ("hard labels, 15 epochs", "hint of an untrained teacher 5, hard labels 10"),
    ),
    (
        "a student of cheap convolutions",
        "shifted",
        (
            "attention, beta 5",
            "attention, beta 30",
            "attention, beta 100",
            "factors, beta 50",
            "Hinton, T = 4",
        ),
        ("hard labels", "hard labels, twice as long", "attention of an untrained teacher, beta 30"),
    ),
    (
        "no teacher, but room to train several networks at once",
        "online",
        ("ONE, one branch kept", "mutual learning, one of three kept"),
        ("one network", "one network, twice as long", "branches on a stem, no distilling"),
    ),
    (
        "100 labels and nothing else",
        "kdgan",
        ("KDGAN",),
        ("hard labels", "label smoothing 0.1", "Hinton from a teacher of the same labels"),
    ),
    (
        "a student of few bits",
        "apprentice",
        ("A: teacher beside it, 10", "B: a trained teacher, 10", "C: from full precision 10, teacher 6"),
        ("ternary, hard labels, 16", "C without a teacher, 10 and 6"),
    ),
)
"""(what you have, the table, what is taught, its controls)."""


def helps() -> str:
    """The best of what is taught against the best of its controls, seed by seed."""
    cells = result("distill_table")["cells"]

    def best(table: str, rows: Sequence[str]) -> tuple[str, torch.Tensor]:
        complete = distill_table.complete_seeds(cells, table)
        scores = {
            row: torch.tensor([100 * cells[f"{table} | {row} | {seed}"]["accuracy"] for seed in complete])
            for row in rows
        }
        row = max(scores, key=lambda name: scores[name].mean().item())
        return row, scores[row]

    lines = []
    for have, table, taught, controls in HELPS:
        if len(distill_table.complete_seeds(cells, table)) < 2:
            continue  # a difference of one seed says nothing
        (row, scores), (control, plain) = best(table, taught), best(table, controls)
        difference = scores - plain
        mean, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
        word = "yes" if mean > 2 * error else "it costs" if mean < -2 * error else "not seen"
        told = f"{mean:+.1f} ± {error:.1f}"
        lines.append([have, row, f"{scores.mean():.1f} %", f"{control}: {plain.mean():.1f} %", told, word])
    head = ["you have", "best of what is taught", "test accuracy", "best control", "difference", "helps?"]
    note = (
        "The best of several is a little lucky on either side; ± is the standard error over the seeds, and "
        "what is within twice of it counts as not seen. Few seeds make ± itself uncertain."
    )
    return f"{markdown(head, lines)}\n\n{note}"


NOTE = "Mean ± standard deviation over the seeds."


def teachers() -> str:
    found = result("distill_table")
    measured = [n for n in distill_table.TABLES if distill_table.complete_seeds(found["cells"], n)]
    parts = [distill_table.table(found["cells"], name) for name in measured]
    missing = [name for name in distill_table.TABLES if name not in measured]
    if missing:
        parts.append(
            f"Written down in `benchmarks/distill_table.py` and not measured yet: {', '.join(missing)}."
        )
    return "\n\n".join([*parts, f"{source(found, 'distill_table.py')} {NOTE}"])


def predictions() -> str:
    found = result("codistill")
    tables = [codistillation.table(found["cells"], workers) for workers in codistillation.WORKERS]
    return "\n\n".join([*tables, f"{source(found, 'codistill.py')} {NOTE}"])


def language() -> str:
    """Exchanged predictions of a language model: tables that have a complete seed."""
    found = result("codistill_lm")
    groups = [(own, workers) for own, (counts, _) in codistill_lm.OWN.items() for workers in counts]
    measured = [group for group in groups if codistill_lm.complete_seeds(found["cells"], *group)]
    parts = [codistill_lm.table(found["cells"], *group) for group in measured]
    missing = [f"{workers} workers, {own}" for own, workers in groups if (own, workers) not in measured]
    if missing:
        parts.append(
            f"Written down in `benchmarks/codistill_lm.py` and not measured yet: {'; '.join(missing)}."
        )
    return "\n\n".join([*parts, f"{source(found, 'codistill_lm.py')} {NOTE}"])


def packets() -> str:
    """Seconds on an emulated network."""
    found = result("codistill_network")
    measured = [w for w in codistill_network.WORKERS if codistill_network.complete_seeds(found["cells"], w)]
    parts = [codistill_network.table(found["cells"], workers) for workers in measured]
    if not measured:
        return "Not measured yet."
    how, delay = next(iter(found["cells"].values()))["network"][:2]
    told = f"Emulated: {how.partition(': ')[2]}; {delay}. A number per seed."
    return "\n\n".join([*parts, f"{source(found, 'codistill_network.py')} {told}"])


def regimes() -> str:
    """KDGAN and Apprentice elsewhere."""
    found = result("distill_regimes")
    parts = []
    for name, rows in distill_regimes.TABLES.items():
        seeds = distill_regimes.complete_seeds(found["cells"], name)
        scores = {
            row: 100 * torch.tensor([found["cells"][f"{name} | {row} | {s}"]["accuracy"] for s in seeds])
            for row in rows
        }
        head = [f"{name}, {len(seeds)} seeds", "test accuracy"]
        parts.append(markdown(head, [[r, f"{s.mean():.1f} ± {s.std():.1f} %"] for r, s in scores.items()]))
    return "\n\n".join([*parts, f"{source(found, 'distill_regimes.py')} {NOTE}"])


BLOCKS = {
    "helps": Block(helps, "distill_table"),
    "teachers": Block(teachers, "distill_table"),
    "codistillation": Block(predictions, "codistill"),
    "language": Block(language, "codistill_lm"),
    "packets": Block(packets, "codistill_network"),
    "regimes": Block(regimes, "distill_regimes"),
}
