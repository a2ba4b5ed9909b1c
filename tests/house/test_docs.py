"""What README and the docs show, runs; what they link to, exists; the page of methods knows every method."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distcomp.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page != ROOT / "docs" / "methods.md"]

FENCE = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

PRELUDE = """\
import torch, torch.distributed as dist, distcomp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
"""
WRAP = "model = DistributedDataParallel(model)\n"
STEP = (
    "\nmodel(torch.ones(1, 4)).sum().backward()\noptimizer.step()\nassert handle.stats()['iterations'] == 1\n"
)


def snippets() -> list[tuple[str, str]]:
    """(where, program) of each Python block, and of each diff as it reads once it has been applied."""
    found = []
    for page in WRITTEN:
        for number, (language, text) in enumerate(FENCE.findall(page.read_text()), start=1):
            if language == "diff":
                kept = (line for line in text.splitlines() if not line.startswith("-"))
                text = "\n".join(line[1:].removeprefix(" ") for line in kept)
            found.append((f"{page.relative_to(ROOT)}:{number}", text))
    return found


def program(snippet: str) -> str:
    """A whole script as it is; a fragment after what it takes for granted, and with a step that uses it."""
    if "import distcomp" in snippet:
        return snippet
    if "import horovod" in snippet:
        return PRELUDE + snippet
    return PRELUDE + ("" if WRAP.strip() in snippet else WRAP) + snippet + STEP


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    local = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    made = {ROOT / "docs" / "methods.md"}  # when the docs are built
    lost = [link for link in local if not (page.parent / link).exists() and page.parent / link not in made]
    assert not lost


@pytest.fixture
def catalogue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "docs" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_methods_has_a_row_and_a_section_for_each(catalogue: ModuleType) -> None:
    lines = catalogue.page().splitlines()
    rows = {match[1] for line in lines if (match := re.match(r"\| \[`(\w+)`\]", line))}
    sections = {line.removeprefix("## ") for line in lines if line.startswith("## ")}
    assert rows == sections == set(METHODS)
    assert len({line.count(" | ") for line in lines if line.startswith("| ")}) == 1  # no sign breaks a row


def test_the_page_of_methods_tells_a_setting_and_its_default(catalogue: ModuleType) -> None:
    page = catalogue.page({"qsgd": METHODS["qsgd"]})
    assert "`bits=4`" in page
    assert METHODS["qsgd"].paper.split(",")[0] in page
