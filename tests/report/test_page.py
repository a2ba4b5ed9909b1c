"""The page parses, holds everything it shows, says what the table says, and draws only what fits."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distcomp import recording
from distcomp.report import Comparison, compare, page, svg, words
from distcomp.report.table import columns
from tests.report import synthetic

VOID = {"meta", "link", "br", "wbr", "line", "rect", "circle", "polygon", "path"}


class Reader(HTMLParser):
    """Checks that elements close in order, and collects what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def comparison_of(parent: Path, **how: object) -> Comparison:
    return compare([recording.read_run(path) for path in synthetic.experiment(parent, **how)])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return comparison_of(tmp_path_factory.mktemp("runs"), seeds=2)


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return page(comparison)


def test_the_page_asks_nothing_of_any_host(html: str) -> None:
    assert "//" not in re.sub(r"^\s*//.*$", "", html, flags=re.MULTILINE)  # comments of the script aside
    assert "@import" not in html
    assert "url(" not in html.replace("url(#clip-", "")
    for tag, attributes in read(html).tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)


def test_the_policy_forbids_what_the_page_does_not_need(html: str) -> None:
    policy = next(
        a["content"] for t, a in read(html).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|\*", policy)


def test_the_page_says_what_the_table_says(comparison: Comparison, html: str) -> None:
    cells = [re.sub(r"\s+", " ", cell).strip() for cell in read(html).cells]
    for row in comparison.rows:
        expected = [column.cell(row) for column in columns(comparison)]
        found = next(at for at, cell in enumerate(cells) if cell.split(" ")[0] == row.method)
        assert cells[found + 1 : found + 1 + len(expected)] == expected
    best = comparison.best
    assert best is not None
    assert best.speed_up is not None
    told = f"({words.formatted(best.speed_up, words.number)} times sooner than DDP"
    assert told[1:] in html
    assert f"reaches a test loss of {comparison.target_loss:.4f} (DDP&#x27;s last one and 5 %)" in html


def test_identifiers_are_unique(html: str) -> None:
    found = [attributes["id"] for _, attributes in read(html).tags if "id" in attributes]
    assert len(found) == len(set(found)) == 8  # what clips; bars are not clipped


def test_what_is_drawn_is_finite_and_lies_inside(html: str) -> None:
    drawings = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)" role="img".*?</svg>', html, flags=re.DOTALL)
    bodies = re.findall(r'<svg viewBox="0 0 \d+ \d+" role="img".*?</svg>', html, flags=re.DOTALL)
    assert len(bodies) == 12  # four charts, bytes by kind, and where the time went, each for two widths
    for (width, height), body in zip(drawings, bodies, strict=True):
        assert "nan" not in body
        assert "inf" not in body
        for path in re.findall(r'd="M([^"]*)"', body):
            for point in path.split("L"):
                x, y = map(float, point.split())
                assert svg.LEFT <= x <= int(width) - svg.RIGHT
                assert (
                    y <= int(height) - svg.BOTTOM
                )  # what diverges may leave through the top, where it is clipped
        for x, y, anchor, text in re.findall(
            r'<text class="\w+" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', body
        ):
            wide = 7 * len(text)  # pixels, at 12 px
            left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            assert left >= 0, text
            assert left + wide <= int(width) + 4, text
            assert 0 < float(y) < int(height)


def test_a_run_that_sends_nothing_is_named_where_it_cannot_be_drawn(html: str) -> None:
    assert html.count("Not shown: none, which sends nothing.") == 2


def test_hostile_names_are_text(tmp_path: Path) -> None:
    method = '<script>alert("1")</script>&:a,b'
    about = synthetic.about(method, argv=['"><img src=x>.py'], commit="<b>")
    metrics = [
        {"kind": "metric", "step": at, "train_s": at, "test_loss": 1.0 / (at + 1), "test_accuracy": 0.5}
        for at in range(3)
    ]
    run = recording.read_run(synthetic.write(tmp_path / "run", about, {0: metrics}))
    html = page(compare([run]))
    reader = read(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in reader.tags]
    assert method in reader.cells


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"kind": "step", "step": 0}],
        [{"kind": "metric", "step": 0, "train_s": 0.0, "test_loss": float("nan"), "test_accuracy": None}],
        [{"kind": "metric", "step": 0, "train_s": 0.0, "test_loss": 0.0, "test_accuracy": 0.0}],
        [{"kind": "metric", "step": 0, "train_s": 0.0, "test_loss": float("inf"), "test_accuracy": 1.0}],
    ],
)
def test_a_run_that_tells_next_to_nothing_still_makes_a_page(
    tmp_path: Path, records: list[dict[str, object]]
) -> None:
    run = recording.read_run(
        synthetic.write(tmp_path / "run", {"method": "ddp"}, {0: records} if records else {})
    )
    html = page(compare([run]))
    read(html)
    assert "ddp: what it took and sent" in html


def test_where_ddp_is_fastest_the_page_says_so(tmp_path: Path) -> None:
    runs = []
    for name, factor in (("ddp", 1.0), ("bf16", 2.0), ("ddp again", 1.01)):
        method = name.removesuffix(" again")
        metrics = [
            {
                "kind": "metric",
                "step": at,
                "train_s": at * factor,
                "test_loss": 2.0 - at,
                "test_accuracy": at / 2,
            }
            for at in range(1, 3)
        ]
        runs.append(
            recording.read_run(synthetic.write(tmp_path / name, synthetic.about(method), {0: metrics}))
        )
    html = page(compare(runs))
    assert "Plain DDP is fastest on this network: bf16 has 0.502 times its speed to a test loss" in html


def test_simulated_networks_are_called_that(tmp_path: Path) -> None:
    about = synthetic.about("ddp", network=synthetic.NETWORK | {"real": False})
    run = recording.read_run(synthetic.write(tmp_path / "run", about, {0: []}))
    assert "simulated: these are not real packets" in page(compare([run]))


@pytest.mark.parametrize("pruned", [False, True])
def test_pruned_weights_are_drawn_over_time_where_there_are_any(tmp_path: Path, pruned: bool) -> None:
    shares = [{"pruned": share} if pruned else {} for share in (0.0, 0.5, 0.9)]
    metrics = [
        {"kind": "metric", "step": at, "train_s": float(at), "test_loss": 1.0, "test_accuracy": 0.5, **share}
        for at, share in enumerate(shares)
    ]
    run = recording.read_run(synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: metrics}))
    html = page(compare([run]))
    read(html)
    assert ("Share of pruned weights against seconds" in html) == pruned
    assert "Share of pruned weights against bytes" not in html
    if pruned:
        assert [point.pruned for point in compare([run]).rows[0].runs[0].curve] == [0.0, 0.5, 0.9]


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@example([1e6, 1e6 + 1e-9])
@example([0.0, 5e-324])
@given(st.lists(numbers, min_size=1, max_size=20))
def test_linear_ticks_are_round_and_inside(values: list[float]) -> None:
    axis = svg.span(values, str)
    ticks = axis.ticks(5)
    assert all(axis.low - 1e-6 <= tick <= axis.high + 1e-6 for tick in ticks)
    assert 1 <= len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    for step in {float(f"{b - a:.3g}") for a, b in itertools.pairwise(ticks)}:
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert all(0 <= axis.at(value) <= 1 for value in values)


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=20), st.integers(3, 7))
def test_logarithmic_ticks_are_round_and_inside(values: list[float], wanted: int) -> None:
    axis = svg.span(values, str, log=True)
    ticks = axis.ticks(wanted)
    assert len(ticks) <= wanted
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert all(round(tick / 10 ** math.floor(math.log10(tick) + 1e-9), 6) in (1, 2, 3, 5) for tick in ticks)
    assert all(0 <= axis.at(value) <= 1 for value in values)
    if max(values) > 10 * min(values):
        assert ticks


def test_markers_of_different_methods_differ() -> None:
    assert len({svg.marker(style, 0, 0) for style in range(7)}) == 7
