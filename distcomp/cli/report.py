"""``distcomp report``: what runs saved, as a table, as a page, or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distcomp import recording
from distcomp.cli.outputs import write_output
from distcomp.cli.tables import sentence
from distcomp.errors import DistcompError
from distcomp.report import Comparison, as_json, as_text, compare, page
from distcomp.report.charts import Prices, other_names
from distcomp.report.claims import verdict
from distcomp.report.predicted import Predicted, as_lines, pairs_of, read_advice
from distcomp.report.table import as_cards, rich_table

DESCRIPTION = """\
Compare runs of the same script on the same network. RUN is the directory of
one run, or a directory that holds several. Runs of the same method (other
seeds) become one row: their mean and spread.
"""


def add(commands: Any) -> None:
    """Describe the command."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "report", help="compare runs: a table and a page", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, or of runs")
    parser.add_argument("-o", "--output", type=Path, help="where the page goes (default: RUN/report.html)")
    parser.add_argument(
        "--json", action="store_true", help="print figures as JSON; no page unless -o is given"
    )
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="test loss to reach (default: DDP's final one plus 5 %%)"
    )
    parser.add_argument(
        "--advice",
        type=Path,
        metavar="FILE",
        help="of distcomp advise --json: lay it beside what was measured",
    )
    price = parser.add_argument_group("price", "of one worker, in any currency; draws the loss against it")
    price.add_argument("--price-hour", type=float, default=0.0, metavar="P", help="of an hour")
    price.add_argument("--price-gb", type=float, default=0.0, metavar="P", help="of a gigabyte sent")
    price.add_argument(
        "--watts", type=float, default=0.0, metavar="W", help="what it draws: loss against energy"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and write the page."""
    comparison = compare_directories(arguments.runs, arguments.target)
    predicted = read_advice(arguments.advice) if arguments.advice is not None else None
    beside = pairs_of(comparison, predicted) if predicted is not None else []
    path = arguments.output or (None if arguments.json else arguments.runs[0] / "report.html")
    if path is not None:
        write_page(comparison, path, predicted, _prices(arguments))
    if arguments.json:
        told = [asdict(one) | {"error": one.error} for one in beside]
        print(json.dumps(as_json(comparison) | ({"predicted": told} if told else {}), indent=2))
    else:
        show(comparison)
        print("\n".join(["", *as_lines(beside)]) if beside else "", end="\n" if beside else "")
        print(f"\nwrote {path}")
    return 0


def _prices(arguments: argparse.Namespace) -> Prices:
    given = (arguments.price_hour, arguments.price_gb, arguments.watts)
    if not all(0 <= price < math.inf for price in given):
        raise DistcompError("--price-hour, --price-gb and --watts are numbers of 0 or more")
    return Prices(*given)


def compare_directories(directories: Sequence[Path], target_loss: float | None = None) -> Comparison:
    """Read the runs in ``directories`` and compare them."""
    return compare(
        [recording.read_run(directory) for directory in recording.find_runs(list(directories))], target_loss
    )


def show(comparison: Comparison) -> None:
    """Print the table: with ``rich`` on a terminal where it is installed, in plain characters elsewhere."""
    print(_drawn(comparison))
    print(f"\n{sentence(verdict(comparison).sentence)}")
    names = other_names(comparison)
    if names:
        print(sentence(f"also logged, and drawn on the page: {', '.join(names)}"))


def _drawn(comparison: Comparison) -> str:
    if sys.stdout.isatty():
        try:
            import rich.console
            import rich.table
        except ImportError:
            return as_text(comparison)
        console = rich.console.Console()
        if max(map(len, as_text(comparison).splitlines())) > console.width:
            return as_cards(comparison)
        with console.capture() as captured:
            console.print(rich_table(comparison, rich.table))
        return captured.get().rstrip("\n")
    return as_text(comparison)


def write_page(
    comparison: Comparison, path: Path, predicted: Predicted | None = None, prices: Prices | None = None
) -> None:
    """Write the page whole or not at all; only another page is replaced."""
    text = page(comparison, predicted, prices).encode("utf-8", errors="replace")
    write_output(path, text, b'<meta name="generator" content="distcomp">', "page of distcomp report")
