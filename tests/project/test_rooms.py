"""The picture of the rooms, and the table beside it, are those of today's imports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks._source import Package, circles, edges
from benchmarks.code_figures import PAGE as REBUILD
from benchmarks.code_figures import page_table, two_meanings
from benchmarks.rooms_picture import FIGURE, PAGE, House, drawn_edges, house, layers, reduced, table

ROOT = Path(__file__).parents[2]
REMEDY = "run python -m benchmarks.rooms_picture"


@pytest.fixture(scope="module")
def rooms() -> House:
    return house(Package(ROOT))


def test_the_picture_shows_the_imports(rooms: House) -> None:
    metadata = re.search(r"<metadata>(.*)</metadata>", FIGURE.read_text())
    assert metadata is not None
    assert [tuple(edge) for edge in json.loads(metadata[1])] == drawn_edges(rooms), REMEDY


def test_the_table_names_every_import(rooms: House) -> None:
    assert f"<!-- rooms: begin -->\n{table(rooms)}\n<!-- rooms: end -->" in PAGE.read_text(), REMEDY


def test_the_table_of_the_rebuild_is_that_of_the_committed_results() -> None:
    page = REBUILD.read_text()
    remedy = "run python -m benchmarks.code_figures --page"
    assert f"<!-- code figures: begin -->\n{page_table()}\n<!-- code figures: end -->" in page, remedy


def test_no_public_name_means_two_things() -> None:
    """What two modules define is one interface of a room, or one word for one thing, and is listed so."""
    assert two_meanings(Package(ROOT)) == {}


def test_a_name_of_two_meanings_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "distcomp"
    (folder / "kernels").mkdir(parents=True)
    (folder / "__init__.py").write_text("Edges = tuple[int, int]\ndef walk(): ...\ndef _own(): ...\n")
    (folder / "other.py").write_text("class Edges: ...\nclass walk: ...\nclass _own: ...\n")
    (folder / "kernels" / "one.py").write_text("def quantize(): ...\n")
    (folder / "kernels" / "two.py").write_text("def quantize(): ...\n")
    both = ["distcomp", "distcomp.other"]
    assert two_meanings(Package(tmp_path)) == {"Edges": both, "walk": both}


def test_a_room_lies_above_all_that_it_imports(rooms: House) -> None:
    height = {room: -level for level, row in enumerate(layers(rooms.imports)) for room in row}
    assert all(height[room] > height[other] for room, others in rooms.imports.items() for other in others)


def test_arrows_that_follow_from_others_are_left_out() -> None:
    graph: dict[str, set[str]] = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert reduced(graph) == [("a", "b"), ("b", "c")]


def test_circles_and_imports_by_string_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "distcomp"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "high.py").write_text("def f():\n    from distcomp.low import g\n")
    (folder / "low.py").write_text("import importlib\nhigh = importlib.import_module('distcomp.high')\n")
    (folder / "typed.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distcomp import low\n"
    )
    package = Package(tmp_path)
    assert edges(package)["distcomp.typed"] == set()
    assert circles(edges(package)) == [["distcomp.high", "distcomp.low"]]
    assert circles(edges(package, strings=False)) == []
