"""The measured tables of README and docs say what the committed result files say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks._tables import Block, write_blocks
from benchmarks.docs_figures.__main__ import PAGES

WRITTEN = [(page, blocks) for pages in PAGES.values() for page, blocks in pages]


@pytest.mark.parametrize(("page", "blocks"), WRITTEN, ids=[page.name for page, _ in WRITTEN])
def test_a_page_is_what_the_script_writes(page: Path, blocks: dict[str, Block], tmp_path: Path) -> None:
    written = Path(shutil.copy(page, tmp_path))
    write_blocks(written, blocks)
    assert written.read_text() == page.read_text()
    assert page.read_text().count(": begin -->") == page.read_text().count(": end -->") > 0
