"""Writes the measured rows into README.md, from the committed result files and nothing else.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def exchange_row(method: str, label: str, steps: dict[str, Any], losses: dict[str, Any]) -> str:
    """One method: bytes and time of an exchange, and the test loss it trains to, against DDP."""
    row, ddp = steps["methods"][method], steps["methods"]["ddp"]
    fewer = ddp["payload_bytes"] / row["payload_bytes"]
    faster = f"{row['speed_up_over_ddp']:.1f} × faster"
    return f"| {label} | {fewer:.1f} × fewer | {faster} | {loss(losses['methods'][method])} |"


def loss(row: dict[str, Any]) -> str:
    """Relative to DDP, with the spread of the paired differences."""
    spread = row["paired_difference_spread"] * row["relative_to_ddp"] / row["mean"]
    return f"{100 * (row['relative_to_ddp'] - 1):+.1f} % ± {100 * spread:.1f}"


def table() -> str:
    steps, overhead, losses = result("step_time_100mbit"), result("overhead"), result("digit_pairs")
    loses = f"where it loses: `identity`, {overhead['ranks']} ranks, fast network"
    slower = f"a step takes {100 * (overhead['ratio'] - 1):+.1f} %"
    about = [
        f"Measured on {steps['host']['cpu']} ({steps['host']['cores']} cores), torch",
        f"{steps['versions']['torch']}, commit {steps['commit']}: the exchange of",
        f"{steps['gradient_bytes'] / 1e6:.0f} MB of gradients between {steps['ranks']} ranks on an",
        f"emulated {steps['rate']} network, against DDP's fp32 all-reduce in the same run",
        f"(`benchmarks/step_time.py`, `benchmarks/overhead.py`, seed {steps['seed']}). Test loss: pairs of",
        f"digits, {losses['ranks']} workers, {losses['steps']} steps, mean of {losses['seeds']} seeds ±",
        "standard deviation of the differences to DDP seed by seed; training without communication:",
        f"{loss(losses['methods']['none'])} (`benchmarks/digit_pairs.py`).",
    ]
    rows = [
        "| | bytes sent | exchange | test loss |",
        "|---|---|---|---|",
        exchange_row("qsgd:bits=4", "`qsgd(bits=4)`", steps, losses),
        exchange_row("qsgd:bits=1", "`qsgd(bits=1)`, error feedback", steps, losses),
        f"| {loses} | as many | {slower} | same bits |",
    ]
    return "\n".join([*rows, "", *about])


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
