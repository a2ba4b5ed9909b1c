"""Claims of papers put once more: a table in docs/averaging.md; in docs/pareto.md the gap to DDP against the
batch of a worker and the length of a run, as tables and as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks._pareto_rows import DDP as DDP_ROW
from benchmarks._pareto_rows import EVERY_STEP, MUON, OUTER, ROWS, UNNAMED, Row
from benchmarks._tables import Block, markdown, result, source
from benchmarks.claims_revisited import ALONE, AT_THE_END, DDP, DEMO, DILOCO, ONE_BIT, STUDY, Run
from benchmarks.pareto import SETTING_STEPS, STEPS, TUNING_STEPS, tuning_name

SCRIPT = "claims_revisited.py"
QUESTIONS = {
    "eager": "eager updates, two workers or eight, and smaller outer steps",
    "long": "100 exchanges in the place of 20",
    "muon": "two bits, 100 exchanges in the place of 20",
    "pulse": "small learning rates, from a trained model",
    "dion": "rank and rate",
    "dcd": "a rate that makes up for what DCD leaves out",
    "choco": "four times as many steps",
    "ecd": "four times as many steps",
    "pqasgd": "four times as many steps",
}
"""What was asked, claim by claim."""
STYLES = {
    ALONE: ("no communication", "#888888", ":"),
    AT_THE_END: ("one average at the end", "#888888", "--"),
    DILOCO: ("DiLoCo, every 25 steps", "#cc6677", "-"),
    ONE_BIT: ("the same in 1 bit", "#cc6677", "--"),
    DEMO: ("DeMo, 1 bit, every step", "#4477aa", "-"),
}


HIGHEST = 16
"""Per cent above DDP at the end: what is worse is in the table, not in the figure."""
EVERY = {row.text(row.settings[0]) for row in ROWS if row.family == EVERY_STEP}


def claims() -> str:
    """A row per run, claim by claim; losses against the claim's first run of as many workers."""
    found, lines = result("claims_revisited"), []
    for claim, question in QUESTIONS.items():
        rows = found["tables"].get(claim, {})
        for run in STUDY[claim]:
            if run.key in rows:
                lines.append([question, *_line(run, rows[run.key], rows[_base(claim, run).key])])
                question = ""
    if not lines:
        return "Not measured yet."
    loss = ["test loss (range, seeds)", "accuracy", "loss against the first", "bytes"]
    head = ["", "", "rate", "workers, steps", *loss]
    return f"{markdown(head, lines)}\n\n{source(found, SCRIPT)}"


def _base(claim: str, run: Run) -> Run:
    """Of the runs with as many workers, and in fine-tuning as high a rate, the first."""
    alike = (one for one in STUDY[claim] if one.workers == run.workers)
    return next(one for one in alike if not run.before or one.rate == run.rate)


def _line(run: Run, row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    name = "averaged gradients" if run.carrier == DDP else run.carrier
    name = f"`{name}`" if ":" in name else name.replace(" | ", ", ")
    about = [f"{name}, {run.inner}", f"{run.rate:g}", f"{run.workers}, {run.steps}"]
    if "mean" not in row:
        return [*about, "diverges", "", "", ""]
    low, high = row["range"]
    lost = f", {row['diverged']} diverge" if row["diverged"] else ""
    loss = f"{row['mean']:.3f} ({low:.3f}–{high:.3f}, {row['seeds']}{lost})"
    off = f"{100 * row['mean'] / base['mean'] - 100:+.1f} %" if "mean" in base else ""
    fewer = f"{base['sent_bytes'] / row['sent_bytes']:,.1f} × fewer" if row["sent_bytes"] else "nothing"
    return [*about, loss, f"{100 * row['test_accuracy']:.1f} %", off, fewer]


def batch() -> str:
    """The gap to DDP with as many texts per worker, and the noise scale below."""
    found = result("claims_revisited")
    table = found["tables"]["batch"]
    sizes = list(table[DDP])
    lines = [["DDP fp32: test loss", *(f"{table[DDP][size]['test_loss']:.4f}" for size in sizes)]]
    for name, (label, _, _) in STYLES.items():
        if name in table:
            lines.append([label, *(_gap(table[name].get(size)) for size in sizes)])
    noise = found["tables"].get("noise", {})
    scales = ", ".join(f"{scale:.0f} after {at} steps" for at, scale in noise.items())
    told = f"\n\nGradient noise scale along DDP's training, in texts: {scales}." if scales else ""
    head = ["texts per worker and step", *sizes]
    return f"{markdown(head, lines)}{told}\n\n{source(found, SCRIPT)}"


def _gap(row: dict[str, Any] | None) -> str:
    return f"{100 * row['relative_loss'] - 100:+.1f} %" if row else ""


def lengths() -> dict[str, tuple[float, float]]:
    """By row of pareto.py: per cent above DDP after the 600 steps that tune, and after 4,000.

    Those of 600 steps are of the seed that tunes, as is the DDP that they are held against. Rows whose other
    setting was taken have no such run.
    """
    cells, table = result("pareto")["cells"], result("pareto")["tables"]["scratch"]

    def short(row: Row) -> float:
        name = tuning_name(row, row.settings[0], table[row.name]["rate"], TUNING_STEPS)
        loss: float = cells.get(name, {}).get("test_loss", math.inf)
        return loss

    found, ddp = {}, short(DDP_ROW)
    for row in ROWS:
        there = table.get(row.name, {})
        if (
            row != DDP_ROW
            and there.get("relative_loss", 9) < 2
            and there["spec"] == row.text(row.settings[0])
        ):
            gaps = (100 * short(row) / ddp - 100, 100 * there["relative_loss"] - 100)
            found[there["spec"] + MUON * (row.inner == "Muon")] = gaps
    return found


def length() -> str:
    """The gaps, and the power of the steps with which they fall."""
    lines = []
    for spec, (short, long) in sorted(lengths().items(), key=lambda one: one[1][1]):
        power = math.log(short / long) / math.log(STEPS / TUNING_STEPS) if min(short, long) > 0 else math.nan
        text = spec.removesuffix(MUON)
        name = spec if text in UNNAMED else f"`{text}`{spec.removeprefix(text)}"
        lines.append([name, f"{short:+.1f} %", f"{long:+.1f} %", f"{power:.2f}"])
    head = ["", f"{TUNING_STEPS:,} steps", f"{STEPS:,} steps", "falls as steps to the power of minus"]
    return f"{markdown(head, lines)}\n\n{source(result('pareto'), 'pareto.py')}"


def draw_gaps() -> Figure:
    """Per cent above DDP: against texts per worker, and against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), sharey=True)
    table = result("claims_revisited")["tables"]["batch"]
    for name, (label, color, style) in STYLES.items():
        points = {int(size): 100 * row["relative_loss"] - 100 for size, row in table.get(name, {}).items()}
        if points:
            along = {"marker": "o", "markersize": 4, "color": color, "label": label}
            left.plot(list(points), list(points.values()), style, **along)
    sizes = [int(size) for size in table[DDP]]
    for spec, gaps in lengths().items():
        control = spec.removesuffix(MUON) in UNNAMED
        if gaps[1] < HIGHEST or control:
            color = "#888888" if control else "#4477aa" if spec in EVERY else "#cc6677"
            right.plot((TUNING_STEPS, STEPS), gaps, "-o", markersize=3, linewidth=1, color=color)
            label = spec.partition(",outer")[0]
            beside = {"xytext": (5, 0), "textcoords": "offset points", "fontsize": 5, "va": "center"}
            right.annotate(label, (STEPS, gaps[1]), **beside)
    left.set_xscale("log", base=2)
    left.set(xlabel="texts of 64 bytes per worker and step", xticks=sizes, xticklabels=map(str, sizes),
             ylabel="test loss against DDP, per cent higher")  # fmt: skip
    right.set(xscale="log", xlabel="steps from scratch", xlim=(500, 30_000), xticks=(TUNING_STEPS, STEPS),
              xticklabels=(f"{TUNING_STEPS:,}", f"{STEPS:,}"))  # fmt: skip
    for axis in (left, right):
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    left.legend(fontsize=7, frameon=False)
    return figure


def momentum() -> str:
    """Rows of pareto.py for which two outer optimizers were tried, both in runs of 1,000 steps."""
    cells, table, lines = result("pareto")["cells"], result("pareto")["tables"]["scratch"], []
    for row in ROWS:
        if row.settings != OUTER or "rate" not in table.get(row.name, {}):
            continue
        names = [tuning_name(row, one, table[row.name]["rate"], SETTING_STEPS) for one in OUTER]
        small, large = (cells[name]["test_loss"] for name in names)
        exchanges = SETTING_STEPS // int(row.spec.partition("period=")[2].partition(",")[0])
        told = [f"{small:.3f}", f"{large:.3f}", f"{100 * large / small - 100:+.1f} %"]
        lines.append([f"`{row.name}`", str(exchanges), *told])
    settings = (f"`{one}`" for one in OUTER)
    head = ["", f"exchanges in {SETTING_STEPS:,} steps", *settings, "the latter against the former"]
    return f"{markdown(head, lines)}\n\n{source(result('pareto'), 'pareto.py')}"


CLAIMS = {
    "claims": Block(claims, "claims_revisited", key="tables"),
    "momentum": Block(momentum, "pareto", key="tables"),
}
GAPS = {
    "batch": Block(batch, "claims_revisited", key="tables"),
    "length": Block(length, "pareto", key="tables"),
}
FIGURES: dict[str, Callable[[], Figure]] = {"gaps": draw_gaps}
