"""Which versions of Python and PyTorch does the installed wheel work with?

python -m benchmarks.install_matrix [--torch 2.13.0 ...] [--python 3.11 ...] [--tests PATH ...] [--cuda]

For each Python there is and each PyTorch asked for: an empty environment, the wheel (built from the sdist),
PyTorch from ``TORCH_INDEX`` or the package index, and the tests against the installed wheel, from a folder
that does not hold the sources. Where no CPU build of that PyTorch is to be had for a Python,
``scripts/try_wheel.py`` runs there without PyTorch, and the row says so; with ``--cuda`` the CUDA build is
installed instead (gigabytes), and the same tests run on the CPU. Writes results/install_matrix.json:
passed, skipped and why, failed; rows that are not run again stay.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, call, write
from benchmarks._places import RESULTS, ROOT
from benchmarks.install import build, environment

PYTHONS = ("3.11", "3.12", "3.13")
TESTS = (
    "tests/conformance",
    "tests/kernels/test_cpu.py",
    "tests/attaching/ddp/test_training.py",
    "tests/attaching/ddp/test_resume.py",
    "tests/attaching/fsdp/test_fsdp.py",
    "tests/attaching/test_audit.py",
    "tests/core/test_private_torch.py",
    "tests/project/test_docs.py::test_snippets_run[docs/start.md:1]",
)
"""Conformance, kernels, DDP, checkpoints, FSDP2, PyTorch's private names, the five-minute page's script."""
NEEDS = ("pytest", "pytest-timeout", "hypothesis", "numpy", "scipy")


def interpreters(wanted: list[str]) -> dict[str, str]:
    """Version -> the interpreter, of those that are on the path or that pyenv has."""
    found = {}
    for version in wanted:
        versions = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*"))
        path = shutil.which(f"python{version}", path=os.environ["PATH"].replace("shims", "none"))
        beside = [str(one / "bin" / "python") for one in versions]
        if path or beside:
            found[version] = path or beside[-1]
    return found


def pip(python: Path, *arguments: str | Path) -> str:
    """From outside: an environment of one row holds no pip of its own."""
    return call([sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *arguments])


def index() -> list[str]:
    """Where PyTorch comes from."""
    return ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []


def wanted_build(asked: str, cuda: bool) -> str:
    """The version of PyTorch to ask pip for; "" where only CUDA's builds could match and none is wanted.

    On x86-64 the package index has CUDA's builds, of gigabytes, and pip downloads a wheel to read what it
    needs: there only ``+cpu`` is asked for, which TORCH_INDEX, or a folder of wheels, has.
    """
    if cuda or platform.machine() != "x86_64" or index():
        return asked
    return "" if "*" in asked else f"{asked}+cpu"


def planned(python: Path, torch: str) -> dict[str, str]:
    """Name -> version of what pip would install for a PyTorch; empty where it has none."""
    if not torch:
        return {}
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet"]
    command += ["--report", "-", *index(), f"torch=={torch}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["install"] if done.returncode == 0 else []
    return {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in found}


def plain_environment() -> dict[str, str]:
    """Without what would put the sources before the installed wheel."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def tested(python: Path, tests: list[str], work: Path) -> dict[str, Any]:
    """What pytest said, from a folder with the tests and without the sources.

    What fails is run once more, alone: a machine that others stop and load makes a rank miss its bound. What
    passes then is not among the failed, and is named.
    """
    place = work / "place"
    place.mkdir()
    for name in ("tests", "benchmarks", "docs", "examples", "scripts", "launchers"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, place)
    told = counted(python, place, *tests)
    if told["failed"]:
        again = counted(python, place, "--last-failed", *tests)
        once = sorted(set(told["which_failed"]) - set(again["which_failed"]))
        told |= {
            "passed": told["passed"] + len(once),
            "failed": again["failed"],
            "which_failed": again["which_failed"],
            "failed_once": once,
        }
    shutil.rmtree(place)
    return told


def counted(python: Path, place: Path, *arguments: str) -> dict[str, Any]:
    """Passed, skipped and why, failed and which."""
    report = place / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    done = subprocess.run(
        command, cwd=place, env=plain_environment(), capture_output=True, text=True, check=False
    )
    if not report.exists():
        sys.exit(f"pytest did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    skips = Counter(skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    count = {"skipped": sum(skips.values()), "failed": len(failed)}
    passed = len(cases) - sum(count.values())
    return {"passed": passed, **count, "why_skipped": dict(skips), "which_failed": failed}


def row(interpreter: str, wheel: Path, asked: str, tests: list[str], cuda: bool) -> dict[str, Any]:
    """One environment, made, used and thrown away."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        call([interpreter, "-m", "venv", "--without-pip", work / "venv"])
        python = work / "venv" / "bin" / "python"
        found = planned(python, wanted_build(asked, cuda))
        if not found or (not cuda and any(name.startswith(("nvidia", "cuda")) for name in found)):
            version = call([python, "-c", "import platform; print(platform.python_version())"]).strip()
            pip(python, "install", "--quiet", "--no-deps", wheel)
            tried = call([python, ROOT / "scripts" / "try_wheel.py"], cwd=work).splitlines()
            what = f"scripts/try_wheel.py without PyTorch: of {asked} there is no CPU build here"
            counts = {"passed": len(tried), "skipped": 0, "failed": 0}
            return {"python": version, "torch": None, "asked": asked, "what": what, "tried": tried, **counts}
        pip(python, "install", "--quiet", *index(), f"torch=={found['torch']}")
        return told_by(python, wheel, asked, tests, work)


def told_by(python: Path, wheel: Path, asked: str, tests: list[str], work: Path) -> dict[str, Any]:
    """The row of an environment that holds PyTorch: the wheel put in, and the tests."""
    pip(python, "install", "--quiet", *NEEDS, f"{wheel}[zstd]")  # lossless:entropy=zstd is a method
    versions = (
        "import platform as p, torch, distcomp as d; print(p.python_version(), torch.__version__, d.__file__)"
    )
    version, torch, where = call([python, "-c", versions], cwd=work, env=plain_environment()).split()
    assert where.startswith(str(python.parents[1])), where
    ran = ", ".join(dict.fromkeys(re.sub(r"^tests/|\.py$", "", test.partition("::")[0]) for test in tests))
    return {"python": version, "torch": torch, "asked": asked, "what": ran} | tested(python, tests, work)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--torch", nargs="+", default=["2.12.*", "2.13.0", "2.*"], help="as pip takes them")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS))
    parser.add_argument("--wheel", type=Path, help="one that was built already")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument(
        "--environment", type=Path, help="one that holds that PyTorch, instead of an empty one"
    )
    parser.add_argument("--cuda", action="store_true", help="take CUDA's build where there is no other")
    wanted = parser.parse_args()
    path = RESULTS / "install_matrix.json"
    there, failed = interpreters(wanted.python), 0
    missing = {f"Python {one}": "this machine has none" for one in wanted.python if one not in there}
    with tempfile.TemporaryDirectory() as name:
        wheel = wanted.wheel or build(environment(Path(name) / "builder"), Path(name) / "dist")["wheel"]
        for version, interpreter in there.items():
            for torch in wanted.torch:
                print(f"Python {version}, torch {torch}", file=sys.stderr)
                if wanted.environment:
                    with tempfile.TemporaryDirectory() as work:
                        python = wanted.environment.absolute() / "bin" / "python"
                        new = told_by(python, wheel, torch, wanted.tests, Path(work))
                else:
                    new = row(interpreter, wheel, torch, wanted.tests, wanted.cuda)
                # read late, so that rows that another run has written meanwhile stay
                before = json.loads(path.read_text()) if path.exists() else {"rows": [], "not_run": {}}
                rows = {(one["python"][:4], one["asked"]): one for one in before["rows"]} | {
                    (version, torch): new
                }
                failed += new["failed"]
                result = {"what": "tests against the installed wheel", "rows": list(rows.values()),
                          "not_run": before["not_run"] | missing}  # fmt: skip
                print(write("install_matrix", result))
    if failed:
        sys.exit("some failed; the result file says which")


if __name__ == "__main__":
    main()
