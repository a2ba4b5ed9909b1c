"""What the scripts share that write measured tables into pages: from committed result files, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def source(found: dict[str, Any], script: str) -> str:
    """Where the numbers come from. A study of many seeds names them in its rows."""
    host, seed = found["host"], f", seed {found['seed']}" if "seed" in found else ""
    return (
        f"Measured on {host['cpu']} ({host['cores']} cores), torch {found['versions']['torch']}, commit "
        f"{found['commit']}{seed}, by `benchmarks/{script}`."
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{text}\n{end}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places for {name}")
    page.write_text(whole)
