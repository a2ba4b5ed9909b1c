"""docs/how/choose.md and docs/versions.md: seconds to a loss, and what was installed and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks._tables import Block
from benchmarks.docs_figures.comparisons import RATES, block, source, table, times

SHOWN = (
    "ddp",
    "torch fp16",
    "bf16",
    "4-bit",
    "1-bit",
    "top-k 1 %",
    "PowerSGD rank 4",
    "PQASGD, every 8 steps in 8 bits",
)
Found = dict[str, Any]


def choose(found: Found) -> Iterator[str]:
    """The rows that the chart names, with the text to type."""
    body = []
    for label in SHOWN:
        row = found["rows"][label]
        cells = [f"`{found['methods'][label]}`", str(row["steps"])]
        body.append(
            cells + [f"{row[rate]['seconds']:.1f} s, {times(row[rate]['over_ddp'])}" for rate in RATES]
        )
    yield from table(["method", "steps", *RATES.values()], body)
    yield ""
    yield f"All rows: [Methods compared](../compressors.md). {source(found, 'peers')}"


def matrix(found: Found) -> Iterator[str]:
    body = [
        [
            row["python"],
            row["torch"] or "none",
            str(row["passed"]),
            str(row["skipped"]),
            str(row["failed"]),
            row["what"],
        ]
        for row in found["rows"]
    ]
    yield from table(["Python", "PyTorch", "passed", "skipped", "failed", "what ran"], body)
    yield ""
    for what, why in found["not_run"].items():
        yield f"* Not run: {what}: {why}."
    yield ""
    yield f"Measured at commit {found['commit']} by `benchmarks/install_matrix.py`."


def libraries(found: Found) -> Iterator[str]:
    body = []
    for name, row in found["libraries"].items():
        why = "; ".join(row["skipped"])
        skipped = f"; not run: {why}" if why else ""
        counts = f"{row['passed']} passed, {len(row['failed'])} failed{skipped}"
        body.append([name, row["version"], row["judge"], counts])
    yield from table(["library", "version", "who judges what", "tests"], body)
    yield ""
    yield f"Measured at commit {found['commit']} by `benchmarks/libraries.py`."


def trackers(found: Found) -> Iterator[str]:
    body = [
        [
            name,
            row["version"],
            "yes" if row["passed"] else f"no: {row['said']}",
            f"{row['installed_bytes'] / 1e6:.0f} MB",
        ]
        for name, row in found["trackers"].items()
    ]
    yield from table(["library", "version", "read back as sent", "installs"], body)
    yield ""
    yield "Written by `scripts/test-trackers`."


CHOOSE: dict[str, Block] = {"choose": block(choose, "peers")}
MATRIX: dict[str, Block] = {
    "matrix": block(matrix, "install_matrix"),
    "libraries": block(libraries, "libraries"),
}
TRACKERS: dict[str, Block] = {"trackers": block(trackers, "trackers")}
