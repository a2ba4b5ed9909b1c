"""The page in a real browser, held to axe-core: where node, Chromium and the two modules of npm are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report_page
from benchmarks._places import RESULTS
from distcomp.report import page
from tests.report.test_page import comparison_of

MODULES = os.environ.get("DISTCOMP_NODE_MODULES", "")


def test_axe_core_finds_no_violation(tmp_path: Path) -> None:
    if not MODULES:
        pytest.skip("DISTCOMP_NODE_MODULES names no node_modules with axe-core and puppeteer-core")
    (tmp_path / "report.html").write_text(page(comparison_of(tmp_path / "runs", seeds=2)))
    found = report_page.looked_at(tmp_path / "report.html", Path(MODULES), None)
    assert report_page.faults(found) == []


def test_the_committed_page_kept_the_bounds() -> None:
    path = RESULTS / "report_axe.json"
    if not path.exists():
        pytest.skip("there is no report_axe.json yet; python -m benchmarks.report_page writes it")
    found = json.loads(path.read_text())
    assert found["faults"] == []
    assert report_page.faults(found) == []
    assert (found["runs"], found["steps"]) == (20, 10_000)
    assert found["page_bytes"] < report_page.MOST_BYTES
    assert found["open_s"] < report_page.MOST_S
    assert {(look["width"], look["scheme"]) for look in found["looks"]} == {
        (width, scheme) for width in (1400, 390) for scheme in ("light", "dark")
    }


def test_a_fault_would_be_told() -> None:
    look: dict[str, Any] = {
        "width": 390, "scheme": "dark", "violations": [], "requests": [], "sideways_px": 0,
        "stops": {"stops": 3, "seen": 3}, "saved": {"buttons": 4, "svg": 2, "csv": 2},
    }  # fmt: skip
    assert report_page.faults({"looks": [look]}) == []
    for wrong in (
        {"violations": [{"id": "color-contrast", "help": "too faint"}]}, {"sideways_px": 9},
        {"requests": ["http:" + "//example.org"]}, {"stops": {"stops": 3, "seen": 2}},
        {"saved": {"buttons": 4, "svg": 1, "csv": 2}},
    ):  # fmt: skip
        assert len(report_page.faults({"looks": [look | wrong]})) == 1
