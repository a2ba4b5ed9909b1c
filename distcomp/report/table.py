"""The table: the same columns on a terminal, in a file, on a page, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distcomp.recording import Run
from distcomp.report import words
from distcomp.report.claims import comparison_noise, verdict
from distcomp.report.figures import Comparison, MethodRow, Spread, network_asked


@dataclass(frozen=True)
class Column:
    """A heading in two lines, what stands below it, and a sentence that says what it means."""

    heading: tuple[str, str]
    cell: Callable[[MethodRow], str]
    meaning: str


def columns(comparison: Comparison) -> list[Column]:
    """All columns after the method's name, those left out that have nothing to say."""
    every = _columns(comparison)
    return [column for column in every if any(column.cell(row) != words.MISSING for row in comparison.rows)]


def _columns(comparison: Comparison) -> list[Column]:
    def figure(name: str, write: words.Write) -> Callable[[MethodRow], str]:
        return lambda row: words.with_spread(row.spread(name), write)

    target = comparison.target_loss
    return [
        Column(("test", "loss"), figure("test_loss", words.loss), "Loss and accuracy are those at the end."),
        Column(("test", "accuracy"), figure("test_accuracy", words.percent), ""),
        Column(
            ("payload", "per step"),
            figure("payload_bytes", words.size),
            "Payload is what one worker sends in one step, by distcomp's ledger.",
        ),
        Column(
            ("on wire", "per step"),
            figure("wire_bytes", words.size),
            "On wire is what the kernel's queue counted for it, with all headers and retransmissions.",
        ),
        Column(("seconds", "per step"), figure("step_s", words.number), "Seconds per step are the median."),
        Column(
            ("s to loss", "" if target is None else f"≤ {words.formatted(target, words.loss)}"),
            lambda row: words.to_target(row, comparison),
            "Seconds to a loss are of training (evaluations and what the first step takes longer are left "
            "out), until the first evaluation at or below it "
            + ("(it was given)." if comparison.target_given else "(what DDP ends with, plus 5 %)."),
        ),
        Column(
            ("speed-", "up"), words.speed_up, "The speed-up is DDP's seconds to that loss over the method's."
        ),
    ]


def as_text(comparison: Comparison) -> str:
    """The table in plain characters, one line per method."""
    cells = columns(comparison)
    lines = [
        ["", *(column.heading[0] for column in cells)],
        ["method", *(column.heading[1] for column in cells)],
    ]
    lines += [[name(row), *(column.cell(row) for column in cells)] for row in comparison.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(cells) + 1)]
    rule = ["-" * width for width in widths]
    return "\n".join(_aligned(line, widths) for line in [*lines[:2], rule, *lines[2:]])


def as_cards(comparison: Comparison) -> str:
    """One method below the other, for where the table is too wide: no name and no figure is cut."""
    cells = [(" ".join(filter(None, column.heading)), column) for column in columns(comparison)]
    heads = [head.replace("speed- up", "speed-up") for head, _ in cells]
    width = max(map(len, heads), default=0)
    return "\n\n".join(
        "\n".join(
            [
                name(row),
                *(
                    f"  {head:<{width}}  {column.cell(row)}"
                    for head, (_, column) in zip(heads, cells, strict=True)
                ),
            ]
        )
        for row in comparison.rows
    )


def rich_table(comparison: Comparison, rich_table_module: Any) -> Any:
    """The table as ``rich`` draws it; the soonest method stands out."""
    table = rich_table_module.Table(box=None, pad_edge=False, header_style="bold")
    winner = verdict(comparison).winner
    table.add_column("\nmethod", overflow="fold")
    for column in columns(comparison):
        table.add_column("\n".join(column.heading), justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "bold green" if row is winner else None
        table.add_row(name(row), *(column.cell(row) for column in columns(comparison)), style=style)
    return table


def name(row: MethodRow) -> str:
    """The method, and how many runs where there are several."""
    return row.method if len(row.runs) == 1 else f"{row.method} ({len(row.runs)} runs)"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure, unrounded. A value that is not finite is written as a string: JSON has no name for it."""
    first = comparison.runs[0].about
    found = {
        "script": first.get("argv"),
        "ranks": first.get("ranks"),
        "network": first.get("network"),
        "network_asked": network_asked(comparison.runs[0]),
        "target_loss": comparison.target_loss,
        "verdict": verdict(comparison).sentence,
        "noise": comparison_noise(comparison),
        "rows": [_row(row) for row in comparison.rows],
        "runs": [_run(run) for run in comparison.runs],
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _row(row: MethodRow) -> dict[str, Any]:
    names = (
        "test_loss", "test_accuracy", "payload_bytes", "wire_bytes", "predicted_wire_bytes",
        "step_s", "exchange_s", "starting_s",
    )  # fmt: skip
    return {
        "method": row.method,
        "runs": len(row.runs),
        "seeds": [run.seed for run in row.runs],
        "steps": [run.steps for run in row.runs],
        **{name: _spread(row.spread(name)) for name in names},
        "to_target_s": _spread(row.to_target_s),
        "reached_target": row.reached,
        "speed_up": row.speed_up,
        "spent_s": row.spent_s(),
    }


def _run(run: Run) -> dict[str, Any]:
    wanted = ("method", "seed", "started", "host", "versions", "commit", "exit_status")
    return {"directory": str(run.directory), **{key: run.about.get(key) for key in wanted}}


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else {"mean": spread.mean, "deviation": spread.deviation}


def _plain(value: Any) -> Any:
    """What is not finite as text, wherever it stands: also in what a script said of its run."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        text.ljust(width) if at == 0 else text.rjust(width)
        for at, (text, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
