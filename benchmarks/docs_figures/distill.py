"""docs/distill.md: does a teacher help, and what do exchanged predictions cost."""

from __future__ import annotations

from typing import Any

from benchmarks import codistill as codistillation
from benchmarks import distill_table
from benchmarks._tables import Block, result, source


def seeds(found: dict[str, Any], script: str, complete: list[int]) -> str:
    return f"{source(found, script)} {len(complete)} seeds, mean ± standard deviation."


def teachers() -> str:
    found = result("distill_table")
    tables = [distill_table.table(found["cells"], name) for name in distill_table.TABLES]
    return "\n\n".join(
        [*tables, seeds(found, "distill_table.py", distill_table.complete_seeds(found["cells"]))]
    )


def predictions() -> str:
    found = result("codistill")
    tables = [codistillation.table(found["cells"], workers) for workers in codistillation.WORKERS]
    return "\n\n".join([*tables, seeds(found, "codistill.py", codistillation.complete_seeds(found["cells"]))])


BLOCKS = {
    "teachers": Block(teachers, "distill_table"),
    "codistillation": Block(predictions, "codistill"),
}
