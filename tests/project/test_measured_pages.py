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


def test_methods_on_data_apart_are_ranked_and_stand_beside_themselves_without_a_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def row(family: str, relative: float) -> dict[str, object]:
        told = {
            "family": family,
            "relative": [relative],
            "relative_loss": relative,
            "mean": relative,
            "seeds": 1,
        }
        return {**told, "diverged": 0, "times_fewer_bytes": 50.0, "times_fewer_in_all": None}

    apart = {
        "identity": row("control", 1.0), "local_sgd:period=50": row("rare", 1.2), "choco": row("gossip", 1.1),
        "diloco:period=50": row("rare", 1.05),
        "noloco:period=50": {"family": "gossip", "diverged": 1, "seeds": 1},
    }  # fmt: skip
    apart = {name: {"rate": 0.004, "spec": name, **one} for name, one in apart.items()}
    whole = {**pareto.result("pareto"), "tables": {"apart": apart}}
    monkeypatch.setattr(pareto, "result", lambda _: whole)
    lines = pareto.ranked().splitlines()
    assert [line.split(" | ")[2] for line in lines if line.startswith(("| 1", "| 2", "| 3", "| 4"))] == [
        "`diloco:period=50`", "`choco`", "`local_sgd:period=50`", "`noloco:period=50`",
    ]  # fmt: skip
    pairs = pareto.corrections()
    assert "| `diloco:period=50` | +5.0 % | `local_sgd:period=50` | +20.0 % |" in pairs
    assert "| `noloco:period=50` | diverges | `noloco:period=50,gamma=0.001` | not measured yet |" in pairs
