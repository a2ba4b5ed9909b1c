"""The measured tables of README and docs say what the committed result files say."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from benchmarks._tables import Block, write_blocks
from benchmarks.docs_figures import pareto
from benchmarks.docs_figures.__main__ import PAGES

WRITTEN = [(page, blocks) for pages in PAGES.values() for page, blocks in pages]


@pytest.mark.parametrize(("page", "blocks"), WRITTEN, ids=[page.name for page, _ in WRITTEN])
def test_a_page_is_what_the_script_writes(page: Path, blocks: dict[str, Block], tmp_path: Path) -> None:
    written = Path(shutil.copy(page, tmp_path))
    write_blocks(written, blocks)
    assert written.read_text() == page.read_text()
    assert page.read_text().count(": begin -->") == page.read_text().count(": end -->") > 0


def test_the_names_in_the_plot_stand_inside_its_frame_and_apart() -> None:
    (axis,) = pareto.draw().axes
    frame = axis.get_window_extent()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == len(axis.lines) > 5  # a point is a line of one
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
