"""What lies in the repository: small files and functions, sound scripts, no traces of one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted((ROOT / "distcomp").rglob("*.py"))
SCRIPTS = [
    *sorted(path for path in (ROOT / "scripts").iterdir() if path.suffix != ".py"),
    ROOT / ".ci" / "run",
    *sorted((ROOT / "benchmarks").glob("*.sh")),
    *sorted((ROOT / "launchers").rglob("*.sh")),
    *sorted((ROOT / "launchers").rglob("*.sbatch")),
]
KINDS = {
    ".Dockerfile",
    ".c",
    ".cff",
    ".cfg",
    ".css",
    ".h",
    ".html",
    ".in",
    ".ipynb",
    ".js",
    ".json",
    ".md",
    ".py",
    ".pyi",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
FOLDERS = (
    "distcomp",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "docker",
    "launchers",
    "scripts",
    ".ci",
    ".github",
)

LONGEST_FILE = 450
LONGEST_FUNCTION = 60
MOST_PARAMETERS = 10


def texts() -> Iterator[Path]:
    """Every file of ours, but for what is built or kept by tools."""
    yield from (path for path in ROOT.iterdir() if path.suffix in KINDS)
    yield from SCRIPTS
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in KINDS and not {"_build", "__pycache__"} & set(path.parts):
                yield path


def traces(text: str, machine: list[str]) -> list[str]:
    """Paths in ``text`` that are of one machine: its folders, or anybody's home."""
    homes = re.findall(r"(?<![\w.])/(?:home|Users|root)/\w+", text)
    return homes + [path for path in machine if re.search(re.escape(path) + r"(?![\w-])", text)]


def test_no_file_names_a_path_of_this_machine() -> None:
    folders = (ROOT, Path.home(), Path(os.environ.get("VIRTUAL_ENV", ROOT)))
    machine = [str(folder) for folder in folders if folder.name]
    found = {path: traces(path.read_text(encoding="utf-8"), machine) for path in texts()}
    assert {str(path): names for path, names in found.items() if names} == {}


def test_a_trace_would_be_found() -> None:
    here = "/srv/checkout"
    assert traces(f"see {here}/src", [here]) == [here]
    assert traces("cd /" + "home/somebody/project", []) == ["/" + "home/somebody"]
    assert traces(f"{here}s of others, example.org/home/page", [here]) == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < LONGEST_FILE
    large = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        parameters = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        on_a_gpu = any("jit" in ast.unparse(one) for one in node.decorator_list)  # Triton's take their sizes
        if length >= LONGEST_FUNCTION or (parameters > MOST_PARAMETERS and not on_a_gpu):
            large.append(f"{node.name}: {length} lines, {parameters} parameters")
    assert large == []


def test_scripts_may_be_run() -> None:
    assert [
        path.name for path in SCRIPTS if not path.name.startswith("_") and not os.access(path, os.X_OK)
    ] == []


def test_scripts_are_sound() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--external-sources", *(str(path.relative_to(ROOT)) for path in SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_two_scripts_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["scripts/test", "scripts/check"]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("ci", ["true", ""])
def test_a_file_that_is_skipped_whole_fails_in_continuous_integration(
    tmp_path: Path, ci: str, workers: str
) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_here.py").write_text("def test_one():\n    assert True\n")
    (tmp_path / "test_gone.py").write_text("import pytest\npytest.importorskip('nosuch_package')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        workers,
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = {**os.environ, "CI": ci}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if ci else 0), done.stdout
    assert ("test_gone.py was skipped whole" in done.stdout) == bool(ci)
