"""What the scripts share that write measured tables into pages: from committed result files, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._places import RESULTS


class Block:
    """A table of a page: ``write`` makes its text from ``results``, if those (and ``key`` in them) exist."""

    def __init__(self, write: Callable[[], str], *results: str, key: str | None = None) -> None:
        self.write, self.results, self.key = write, results, key

    @property
    def text(self) -> str:
        there = all(measured(name, self.key) for name in self.results)
        return self.write() if there else "Not measured yet."


def measured(name: str, key: str | None = None) -> bool:
    """Whether there is a committed result of this name, and ``key`` in it."""
    return (RESULTS / f"{name}.json").exists() and (key is None or key in result(name))


def write_blocks(page: Path, blocks: dict[str, Block]) -> None:
    """Write every table of a page anew."""
    for name, block in blocks.items():
        fill(page, name, block.text)


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
