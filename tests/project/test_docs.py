"""What README and the docs show, runs; what they link to, exists; the page of methods knows every method."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distcomp.cli.methods import check
from distcomp.methods import METHODS
from tests.project.pages import PAGES, ROOT, WRITTEN, program, snippets

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize(("where", "snippet"), snippets(), ids=[where for where, _ in snippets()])
def test_snippets_run(where: str, snippet: str, tmp_path: Path) -> None:
    if "import horovod" in snippet:
        pytest.importorskip("horovod", reason="Horovod is not installed; scripts/test-horovod builds it")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program(snippet)],
        env={**os.environ, **alone},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_line_that_readme_promises_is_among_them() -> None:
    assert any(where.startswith("README") and "distcomp.attach(" in text for where, text in snippets())


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "docs" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path, catalogue: ModuleType) -> None:
    local = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    made = {(ROOT / "docs" / name).resolve() for name in catalogue.pages()}  # when the docs are built
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


@pytest.mark.parametrize("name", ["gradiveq", "allocate", "sparse_loco", "warmup"])
def test_a_method_that_a_result_file_has_is_not_said_to_be_unmeasured(
    catalogue: ModuleType, name: str
) -> None:
    page = catalogue.pages()[f"methods/{name}.md"]
    assert catalogue.NOTHING not in page
    files = re.findall(r"`(\w+\.json)` \|$", page, flags=re.MULTILINE)
    assert files
    for file in files:
        assert name in (catalogue.RESULTS / file).read_text()


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
    for page in [*WRITTEN, *(ROOT / "launchers").rglob("*.md"), *(ROOT / "src").rglob("*.md")]:
        for told in re.findall(r'--methods? +("[^"]*"|[^\s`]+)', page.read_text()):
            named += [one.strip() for one in told.strip('"').split(";")]
    assert len(named) >= 3
    for one in named:
        check(one)


def test_every_method_says_when_it_fails() -> None:
    assert [name for name, entry in METHODS.items() if len(entry.limitations) < 20] == []


def test_a_measured_row_is_what_the_result_file_says(catalogue: ModuleType) -> None:
    found = json.loads((catalogue.RESULTS / "step_time_100mbit.json").read_text())
    ddp, one_bit = (found["methods"][spec] for spec in ("ddp", "qsgd:bits=1"))
    faster = ddp["exchange_s"] / one_bit["exchange_s"]
    page = catalogue.pages()["methods/qsgd.md"]
    (row,) = (line for line in page.splitlines() if "`qsgd:bits=1`: exchange" in line and "time_100" in line)
    assert f"{1000 * one_bit['exchange_s']:.0f} ms, {faster:.1f} ×" in row
    assert "step_time_100mbit.json" in row
    unmeasured = catalogue.page(METHODS["sparta"], [])
    assert unmeasured.endswith(catalogue.NOTHING + "\n")
