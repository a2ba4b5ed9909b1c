"""What is looked up: no public name without an entry, no error without a remedy, a tutorial that prints what
it says."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml

import distcomp
from tests.project.pages import ROOT
from tests.project.test_public import promising

SOURCES = Path(distcomp.__file__).parent


@pytest.fixture(scope="module")
def docs() -> dict[str, ModuleType]:
    """The modules that write pages, as docs/conf.py imports them."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return {name: importlib.import_module(name) for name in ("reference", "sentences", "notebook")}
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_no_public_name_lacks_an_entry(docs: dict[str, ModuleType]) -> None:
    """Each has a row on its room's page, and the row leads to a page that documents that very thing."""
    pages = docs["reference"].pages()
    for package in promising():
        room = pages[f"reference/{package.__name__}.md"]
        rows = dict(re.findall(r"^\| \[`(\w+)`\]\(([\w.]+)\.md\)", room, re.MULTILINE))
        assert set(rows) == set(package.__all__)
        for name, target in rows.items():
            module, _, last = target.rpartition(".")
            assert getattr(importlib.import_module(module), last) is getattr(package, name)
            page = pages[f"reference/{target}.md"]
            assert re.search(
                rf"^\.\. auto(class|function):: {re.escape(target)}$|^{last} = ", page, re.MULTILINE
            )


def test_what_is_imported_by_module_has_an_entry(docs: dict[str, ModuleType]) -> None:
    """Every module of ours that a page tells to import from is a room of the reference."""
    told = set()
    for page in (ROOT / "docs").glob("*.md"):
        told |= set(re.findall(r"^\+?\s*from (distcomp[\w.]*) import", page.read_text(), re.MULTILINE))
    documented = {path.removeprefix("reference/").removesuffix(".md") for path in docs["reference"].pages()}
    inside = {name for name in told if name.startswith("distcomp.averaging.recipes.")}  # their room has them
    assert told - documented - inside == set()


def test_docstrings_keep_their_code_and_lose_their_signs(docs: dict[str, ModuleType]) -> None:
    read = docs["reference"].as_restructured
    assert read(["a * b, ``x_ * y``"])[0] == "a \\* b, ``x_ * y``"
    assert read(["law::", "", "    P = |x|_i", "", "and |x|"])[2:5] == ["    P = |x|_i", "", "and \\|x\\|"]


def calls() -> set[tuple[str, int]]:
    """(file, line) of every error that the code makes, found in its text and not by the page's own reader."""
    kinds = {"DistcompError", "PeerLost", "SettingsMismatch", "CorruptPayload", "Mismatch"}
    kinds |= {"CorruptFile", "MissingUpdate", "WrongBase", "Refused"}
    made = re.compile(rf"(?<![\w.])({'|'.join(kinds)})\((?!\w*Error\):|DistcompError\))")
    found = set()
    for path in SOURCES.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if made.search(line.partition("  #")[0]) and not line.lstrip().startswith(("class ", "#", '"')):
                found.add((str(path.relative_to(SOURCES)), number))
    return found


def test_every_error_is_in_troubleshooting_with_its_remedy(docs: dict[str, ModuleType]) -> None:
    sentences = docs["sentences"]
    said = list(sentences.sentences())
    assert calls() - {(one.file, one.line) for one in said} == set()
    assert len(calls()) > 600
    assert [one for one in said if not sentences.remedy(one)] == []
    page = sentences.page()
    assert page.count("\n| ") >= len({(one.room, one.text) for one in said})
    assert not re.search(r"\|\s*\|$", page, re.MULTILINE)
    assert sentences.unused() == []


def test_an_error_without_a_remedy_would_be_found(docs: dict[str, ModuleType]) -> None:
    sentences = docs["sentences"]
    lost = sentences.Sentence("here.py", 1, "DistcompError", "something happened")
    assert sentences.remedy(lost) == ""
    assert sentences.remedy(sentences.Sentence("here.py", 1, "DistcompError", "wrong; mend it")) == "mend it"


def test_a_refused_setting_is_told_with_its_default_and_its_values(docs: dict[str, ModuleType]) -> None:
    """Read from the code, so that a default that changes changes the page."""
    sentences = docs["sentences"]
    said = {one.text: sentences.remedy(one) for one in sentences.sentences()}
    assert [text for text, what in said.items() if sentences.GIVE in what] == []
    (kinds,) = (what for text, what in said.items() if text.startswith("ENet's bottlenecks are"))
    assert kinds == "change `kind` (usually `'regular'`); ‹KINDS› is `regular`, `dilated`, `asymmetric`"
    (outer,) = (what for text, what in said.items() if text.startswith("an outer optimizer has lr > 0"))
    assert outer == "change `lr` (usually `1.0`) or `momentum` (usually `0.0`)"
    (drawn,) = (what for text, what in said.items() if text.startswith("a paraphraser has at least"))
    assert drawn == "change `channels` or `factors`"  # which have no default


@pytest.mark.timeout(900)
def test_the_tutorial_prints_what_it_says(docs: dict[str, ModuleType]) -> None:
    path = ROOT / "docs" / "tutorial.ipynb"
    program = "import contextlib, io, json, sys\nscope, told = {}, []\nfor code in json.load(sys.stdin):\n"
    program += (
        "    out = io.StringIO()\n    with contextlib.redirect_stdout(out):\n        exec(code, scope)\n"
    )
    program += "    told.append(out.getvalue())\nprint(json.dumps(told))"
    cells = [one for one in docs["notebook"].cells(path) if one["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(["".join(one["source"]) for one in cells]),
        capture_output=True, text=True, check=False, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [docs["notebook"].printed(one) for one in cells]


def test_the_tutorial_is_a_notebook() -> None:
    """What Jupyter's format 4.5 demands."""
    code = {"type": "object", "required": ["execution_count", "outputs", "source", "metadata", "id"]}
    text = {"type": "object", "required": ["source", "metadata", "id"]}
    cell = {
        "oneOf": [
            {**code, "properties": {"cell_type": {"const": "code"}}},
            {**text, "properties": {"cell_type": {"const": "markdown"}}, "not": {"required": ["outputs"]}},
        ]
    }
    schema = {
        "required": ["cells", "metadata", "nbformat", "nbformat_minor"],
        "properties": {"nbformat": {"const": 4}, "nbformat_minor": {"minimum": 5}, "cells": {"items": cell}},
    }
    told = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    jsonschema.validate(told, schema)
    assert len({one["id"] for one in told["cells"]}) == len(told["cells"])


def test_the_version_is_the_same_wherever_it_is_said() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == distcomp.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    said = [
        path for path in (ROOT / "distcomp").rglob("*.py")
        if re.search(rf"__version__ = .{re.escape(distcomp.__version__)}", path.read_text())
    ]  # fmt: skip
    assert said == [SOURCES / "version.py"]


@pytest.mark.parametrize("file", ["llms.txt", "SECURITY.md"])
def test_files_for_machines_and_reporters_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    assert text.startswith("# ")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_workflows_call_scripts_of_ours() -> None:
    """And each script that they call is there and may be run."""
    files = list((ROOT / ".github" / "workflows").iterdir())
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in files}
    assert set(workflows) == {"check", "test", "torch", "wheels", "docs", "nightly"}
    text = "".join(path.read_text() for path in files)
    scripts = set(re.findall(r"scripts/[\w-]+", text))
    assert scripts >= {"scripts/check", "scripts/test", "scripts/nightly", "scripts/test-install"}
    assert [name for name in scripts if not (ROOT / name).stat().st_mode & 0o111] == []
    for workflow in workflows.values():
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())
        assert "permissions" in workflow
