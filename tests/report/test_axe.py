"""The page in a real browser, held to axe-core: where node, Chromium and the two modules of npm are."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
    found = json.loads((RESULTS / "report_axe.json").read_text())
    assert found["faults"] == []
    assert report_page.faults(found) == []
    assert (found["runs"], found["steps"]) == (20, 10_000)
    assert found["page_bytes"] < report_page.MOST_BYTES
    assert found["open_s"] < report_page.MOST_S
    assert {(look["width"], look["scheme"]) for look in found["looks"]} == {
        (width, scheme) for width in (1400, 390) for scheme in ("light", "dark")
    }


def test_a_fault_would_be_told() -> None:
    found = json.loads((RESULTS / "report_axe.json").read_text())
    found["looks"][0] |= {"violations": [{"id": "color-contrast", "help": "too faint"}], "sideways_px": 9}
    assert len(report_page.faults(found)) == 2
