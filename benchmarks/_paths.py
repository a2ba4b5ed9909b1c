"""The ways of a stranger, command by command: to the report, to compressed training, to a compressor of one's
own in a table."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._places import ROOT
from tests.project.pages import python_block

LIMIT_S = 3600
MARKED = "# this one"

CLONE = (
    "git clone --quiet CLONE distcomp",
    "cd distcomp && python -m pip install --quiet --no-deps .",
    "cd distcomp && distcomp emulate --ranks 2 --rate 100mbit --methods 'ddp; qsgd:bits=4' -o runs "
    "examples/digits.py --steps 20",
)
"""PyTorch and what the extras bring are there already: what installing them takes depends on the line."""
OWN_SCRIPT = (
    "distcomp bench --ranks 2 --methods 'ddp; qsgd:bits=4' -o compared train.py",
    "distcomp run --nproc 2 --method qsgd:bits=4 -o first train.py",
    "distcomp report first",
)
IDEA = (
    "distcomp new compressor upper_half",
    "python -m pytest -q -p no:cacheprovider test_upper_half.py",
    "distcomp methods --import upper_half.py upper_half",
    "distcomp bench --ranks 2 --repeats 1 --import upper_half.py --methods 'ddp; ef21:compressor=upper_half' "
    "-o tried train.py",
)
ENDS: dict[str, tuple[Sequence[str], str]] = {
    "clone to report": (CLONE, "distcomp/runs/report.html"),
    "script to compressed training": (OWN_SCRIPT, "first/report.html"),
    "idea to a table": (IDEA, "tried/report.html"),
}
"""By name: what is typed, and what must be there in the end."""


def walked(where: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each path in a directory of its own."""
    for name, (commands, end) in ENDS.items():
        here = where / name.replace(" ", "-")
        here.mkdir()
        changed = furnished(here) if name != "clone to report" else 0
        environment = fresh_environment(here) if name == "clone to report" else programs_here()
        yield name, walk(here, commands, end, environment) | {"changed_lines": changed}


def walk(where: Path, commands: Sequence[str], end: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What each command took, and the files that were made on the way."""
    before, steps = files_in(where), []
    for typed in commands:
        began_s = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", typed.replace("CLONE", str(ROOT))], cwd=where, env=dict(environment),
            capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        steps.append({"typed": typed, "seconds": round(time.perf_counter() - began_s, 1)})
        if done.returncode:
            said = (done.stdout + done.stderr)[-2000:]
            return {"outcome": f"failed: {done.returncode}", "steps": steps, "said": [said]}
    seconds = sum(step["seconds"] for step in steps)
    written = sorted(files_in(where) - before)
    return {
        "outcome": "ok" if (where / end).is_file() else f"failed: there is no {end}",
        "commands": len(steps),
        "minutes": round(seconds / 60, 1),
        "own_files": [name for name in written if name.endswith(".py") and "/" not in name],
        "end": end,
        "steps": steps,
    }


def files_in(where: Path) -> set[str]:
    """By their path from there."""
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


def furnished(where: Path) -> int:
    """Write the training script of docs/start.md as it was before distcomp, and change the lines that have to
    be changed; returns how many these are."""
    after = python_block("docs/start.md", MARKED).replace("range(3)", "range(30)")
    after = after.replace(", distcomp.qsgd(bits=4))", ")")
    before = [line for line in after.splitlines() if "distcomp" not in line and "handle" not in line]
    (where / "train.py").write_text(after)
    return len(after.splitlines()) - len(before)


def programs_here() -> dict[str, str]:
    """The environment of somebody who has installed it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    beside = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": beside, "OMP_NUM_THREADS": "1"}


def fresh_environment(where: Path) -> dict[str, str]:
    """That of a new virtual environment that sees the libraries which are installed here."""
    subprocess.run([sys.executable, "-m", "venv", str(where / "env")], check=True)
    programs = where / "env" / "bin"
    (libraries,) = (where / "env" / "lib").glob("python*/site-packages")
    (libraries / "here.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shutil.rmtree(where / "env" / "include", ignore_errors=True)
    return {**rest, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
