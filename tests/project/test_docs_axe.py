"""The docs in a real browser, held to axe-core; and what is mended of Sphinx's pages."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import docs_pages
from benchmarks._places import RESULTS, ROOT

MODULES = os.environ.get("DISTCOMP_NODE_MODULES", "")


def test_axe_core_finds_no_violation_on_the_first_page() -> None:
    if not MODULES or not (docs_pages.BUILT / "index.html").exists():
        pytest.skip("DISTCOMP_NODE_MODULES names no node_modules, or scripts/check has not built the docs")
    found = docs_pages.looked_at(["index"], Path(MODULES), None)
    assert docs_pages.faults(found["pages"]) == []


def test_ten_pages_were_looked_at_and_had_no_fault() -> None:
    found = json.loads((RESULTS / "docs_axe.json").read_text())
    assert list(found["pages"]) == list(docs_pages.PAGES)
    assert len(docs_pages.PAGES) == 10
    assert found["faults"] == docs_pages.faults(found["pages"]) == []
    for looks in found["pages"].values():
        assert {(look["width"], look["scheme"]) for look in looks} == {
            (width, scheme) for width in (1400, 390) for scheme in ("light", "dark")
        }


def test_a_fault_would_be_told() -> None:
    look: dict[str, Any] = {
        "width": 390, "scheme": "dark", "violations": [], "requests": [], "sideways_px": 0, "lost": [],
    }  # fmt: skip
    assert docs_pages.faults({"index": [look]}) == []
    for wrong in (
        {"violations": [{"id": "region", "help": "outside", "count": 1}]}, {"sideways_px": 9},
        {"requests": ["http:" + "//example.org"]}, {"lost": ["a.svg"]},
    ):  # fmt: skip
        assert len(docs_pages.faults({"index": [look | wrong]})) == 1


def test_pages_are_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    code = '<code><span class="pre">qsgd:bits=4,block=32</span></code>'
    context = {
        "body": '<th class="head"><p></p></th><th class="head"><p>method</p></th>'
        f"<td>{code}</td><p>{code}</p>"
        '<dt class="sig py">f(\n<dl>\n<dd>x</dd>\n</dl>\n)</dt><dl>\n<dt>a</dt><dd>b</dd>\n</dl>'
    }
    importlib.import_module("reachable").rewrite(None, "page", "page.html", context, None)
    mended = '<code><span class="pre">qsgd:<wbr>bits=4,<wbr>block=32</span></code>'
    assert context["body"] == (
        f'<td></td><th class="head"><p>method</p></th><td>{mended}</td><p>{code}</p>'
        '<dt class="sig py">f(\n<span class="sig-lines">\n<span class="sig-line">x</span>\n</span>\n)</dt>'
        "<dl>\n<dt>a</dt><dd>b</dd>\n</dl>"
    )
