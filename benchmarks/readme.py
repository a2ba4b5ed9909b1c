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


def exchange_row(method: str, label: str, steps: dict[str, Any]) -> str:
    """One method: bytes and time of an exchange against DDP."""
    row, ddp = steps["methods"][method], steps["methods"]["ddp"]
    fewer = ddp["payload_bytes"] / row["payload_bytes"]
    return f"| {label} | {fewer:.1f} × fewer | {row['speed_up_over_ddp']:.1f} × faster |"


def table() -> str:
    steps, overhead = result("step_time_100mbit"), result("overhead")
    loses = f"where it loses: `identity`, {overhead['ranks']} ranks, fast network"
    slower = f"a step takes {100 * (overhead['ratio'] - 1):+.1f} %"
    about = [
        f"Measured on {steps['host']['cpu']} ({steps['host']['cores']} cores), torch",
        f"{steps['versions']['torch']}, commit {steps['commit']}: the exchange of",
        f"{steps['gradient_bytes'] / 1e6:.0f} MB of gradients between {steps['ranks']} ranks on an",
        f"emulated {steps['rate']} network, against DDP's fp32 all-reduce in the same run",
        f"(`benchmarks/step_time.py`, `benchmarks/overhead.py`, seed {steps['seed']}).",
    ]
    rows = [
        "| | bytes sent | exchange |",
        "|---|---|---|",
        exchange_row("qsgd:bits=4", "`qsgd(bits=4)`", steps),
        exchange_row("qsgd:bits=1", "`qsgd(bits=1)`, error feedback", steps),
        f"| {loses} | as many | {slower} |",
    ]
    return "\n".join([*rows, "", *about])


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
