"""What README and the docs show, runs; what they link to, exists; the page of methods knows every method."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distcomp.cli.methods import check
from distcomp.methods import METHODS
from tests import forked
from tests.project.pages import MADE, PAGES, ROOT, WRITTEN, program, snippets

RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize(("where", "snippet"), snippets(), ids=[where for where, _ in snippets()])
def test_snippets_run(where: str, snippet: str, tmp_path: Path) -> None:
    if "import horovod" in snippet:
        pytest.importorskip("horovod", reason="Horovod is not installed; scripts/test-horovod builds it")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = forked.run(program(snippet), tmp_path, {**os.environ, **alone})
    assert done.returncode == 0, done.stderr


def test_the_line_that_readme_promises_is_among_them() -> None:
    assert any(where.startswith("README") and "distcomp.attach(" in text for where, text in snippets())


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))  # as docs/conf.py does
    try:
        return importlib.import_module("catalogue")
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path, catalogue: ModuleType) -> None:
    local = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    made = {(ROOT / "docs" / name).resolve() for name in catalogue.pages()}  # when the docs are built
    made |= {ROOT / "docs" / f"{name}.md" for name in MADE}
    lost = [
        link
        for link in local
        if not (page.parent / link).exists() and (page.parent / link).resolve() not in made
    ]
    assert not lost


def test_every_method_has_a_page_and_a_row_in_the_list(catalogue: ModuleType) -> None:
    pages = catalogue.pages()
    lines = pages.pop("methods.md").splitlines()
    rows = {match[1] for line in lines if (match := re.match(r"\| \[`(\w+)`\]", line))}
    assert rows == set(METHODS)
    assert set(pages) == {f"methods/{name}.md" for name in METHODS}
    for text in [lines, *(page.splitlines() for page in pages.values())]:
        assert len({line.count(" | ") for line in text if line.startswith("| ")}) <= 1  # no sign breaks a row


def test_a_page_tells_paper_bytes_defaults_and_failures(catalogue: ModuleType) -> None:
    entry = METHODS["qsgd"]
    page = catalogue.pages()["methods/qsgd.md"]
    for told in (
        "`bits=4`",
        entry.paper.split(",")[0],
        "not added on the wire",
        entry.limitations[:30],
        "forces",
    ):
        assert told in page


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_page_says_what_was_measured(catalogue: ModuleType, name: str) -> None:
    """Each row has figures and the file that they are from, which names the method."""
    page = catalogue.pages()[f"methods/{name}.md"]
    rows = re.findall(r"^\| .* \| (.*) \| `(\w+\.json)` \|$", page, flags=re.MULTILINE)
    assert rows
    assert catalogue.NOTHING not in page
    labels = {"dpsgd": "D-PSGD", "dcd": "DCD", "ecd": "ECD", "choco": "CHOCO", "deepsqueeze": "DeepSqueeze"}
    for figures, file in rows:
        assert re.search(r"\d|diverged|nothing", figures)
        text = (RESULTS / file).read_text().lower()
        assert any(one in text for one in (name, labels.get(name, name).lower()))


def test_bytes_and_budgets_on_a_page_are_those_of_their_files(catalogue: ModuleType) -> None:
    pages = catalogue.pages()
    found = json.loads((RESULTS / "method_bytes.json").read_text())
    assert set(found["methods"]) == set(METHODS)
    nbytes = sum(found["methods"]["nuqsgd"]["by_kind"].values())
    assert f"| {nbytes:,.0f} B, " in pages["methods/nuqsgd.md"]
    budget = json.loads((RESULTS / "allocation.json").read_text())["budgets"]["1/128"]
    off = budget["paired_difference_mean"] / budget["uniform"][budget["best uniform"]]["mean"]
    assert f"| {off:+.1%} ± " in pages["methods/allocate.md"]
    assert "gradiveq_loss.json" in pages["methods/gradiveq.md"]
    assert "pareto.json" in pages["methods/sparse_loco.md"]


def test_no_page_asks_another_host_for_its_mathematics() -> None:
    assert "dollarmath" not in (ROOT / "docs" / "conf.py").read_text()
    for page in WRITTEN:
        assert not re.search(
            r"\$[^\s$][^$\n]*\$|\{math\}", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        )


def test_a_demo_installs_what_it_needs_and_no_more() -> None:
    demo = (ROOT / "scripts" / "demo").read_text()
    (extras,) = re.findall(r"^extras=(.*)$", demo, flags=re.MULTILINE)
    assert demo.index("extras=") < demo.index("source ")
    assert set(extras.split(",")) == {"emulate", "report", "examples"}


def test_the_methods_that_commands_on_the_pages_name_can_be_asked_for() -> None:
    named = []
    for page in [*WRITTEN, *(ROOT / "launchers").rglob("*.md"), *(ROOT / "distcomp").rglob("*.md")]:
        text = page.read_text()
        # what the page itself has made before
        begun = re.findall(r"(?:distcomp new \w+ |register(?:_compressor)?\(\")(\w+)", text)
        for told in re.findall(r"""--methods? +("[^"]*"|'[^']*'|[^\s`]+)""", text):
            methods = [one.strip() for one in told.strip("\"'").split(";")]
            named += [one for one in methods if not any(name in one for name in begun)]
    assert len(named) >= 3
    for one in named:
        check(one.partition(" weights=")[0])


def test_every_method_says_when_it_fails() -> None:
    assert [name for name, entry in METHODS.items() if len(entry.limitations) < 20] == []


def test_a_measured_row_is_what_the_result_file_says(catalogue: ModuleType) -> None:
    found = json.loads((RESULTS / "step_time_100mbit.json").read_text())
    ddp, one_bit = (found["methods"][spec] for spec in ("ddp", "qsgd:bits=1"))
    faster = ddp["exchange_s"] / one_bit["exchange_s"]
    page = catalogue.pages()["methods/qsgd.md"]
    (row,) = (
        line
        for line in page.splitlines()
        if "`qsgd:bits=1`: exchange" in line and "time_100mbit.json" in line
    )
    assert f"{1000 * one_bit['exchange_s']:.0f} ms, {faster:.1f} ×" in row
    assert "step_time_100mbit.json" in row
    unmeasured = catalogue.page(METHODS["sparta"], [])
    assert unmeasured.endswith(catalogue.NOTHING + "\n")


def test_every_peer_has_a_source() -> None:
    """What the page says of a library is said on a page of its own, or measured below."""
    page = (ROOT / "docs" / "peers.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    peers = rows[1 : rows.index("distcomp")]
    assert len(peers) >= 8
    (sources,) = re.findall(r"^Where it is said: (.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE)
    for peer in peers:
        (told,) = [one for one in re.split(r";\s", sources) if one.startswith((peer[:7], f"[{peer[:7]}"))]
        assert "](https://" in told, peer
