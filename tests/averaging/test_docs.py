"""The tables of docs/averaging.md say what the result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import averaging_docs

    page = averaging_docs.PAGE.read_text()
    assert averaging_docs.filled(page) == page
    assert page.count(": begin -->") == page.count(": end -->") > 0
