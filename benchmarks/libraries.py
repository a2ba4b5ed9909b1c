"""Do the ecosystem's trainers, launchers and readers take what is ours?

python -m benchmarks.libraries [LIBRARY ...]     # all, if none is named; writes results/libraries.json

Each library is installed into an environment of its own, beside PyTorch's, where the tests run that use it:
its own reader, schema or executor says whether it takes what it is given. Rows that are not run again stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, call, write
from benchmarks._places import RESULTS, ROOT
from benchmarks.install import environment, pip
from benchmarks.trackers import OFFLINE

WATCHING, MATRIX = "tests/attaching/ddp/test_watching.py", "tests/launchers/test_matrix.py"
LIBRARIES = {
    "tensorboard": ([WATCHING, "-k", "tensorboard"], "its reader, of the sink's file"),
    "prometheus_client": ([WATCHING, "-k", "prometheus"], "its parser, of the sink's file"),
    "lightning": (
        ["tests/integrations/test_lightning.py", "tests/integrations/test_fabric.py"],
        "its trainer and its Fabric, resumed",
    ),
    "accelerate": (["tests/integrations/test_accelerate.py"], "its loop, resumed"),
    "transformers": (["tests/integrations/test_transformers.py"], "its Trainer, resumed"),
    "torchtitan": (["tests/integrations/test_torchtitan.py"], "its configs and optimizer container"),
    "trl": (["tests/updates/test_trl.py"], "its weight sync, into a sampler"),
    "submitit": ([MATRIX, "-k", "submitit"], "its executors: here and as a batch script"),
    "skypilot": (
        ["tests/launchers/test_files.py", MATRIX, "-k", "skypilot"],
        "its reader, of the task; the task's commands",
    ),
    "jsonschema": (
        ["tests/launchers/test_files.py", "-k", "kubernetes or jobset or trainjob"],
        "Kubernetes' definitions, of the manifests",
    ),
}
"""Library -> what pytest is given, and who says that it is right."""


def row(library: str, folder: Path) -> dict[str, Any]:
    """One library: its version, and what the tests said that use it."""
    python = environment(folder, Path(sys.executable))
    pip(python, "install", "--quiet", library)
    asked = f"from importlib.metadata import version; print(version('{library}'))"
    version = call([python, "-c", asked]).strip()
    tests, judge = LIBRARIES[library]
    report = folder / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    plain = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    if not report.exists():
        sys.exit(f"pytest did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    failed = [
        str(case.get("name"))
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if failed:
        print(done.stdout[-3000:], file=sys.stderr)
    return {
        "version": version,
        "judge": judge,
        "passed": len(cases) - len(skipped) - len(failed),
        "skipped": sorted(set(skipped)),
        "failed": failed,
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("libraries", nargs="*", choices=[[], *LIBRARIES], help="which (default: all)")
    wanted = parser.parse_args().libraries or list(LIBRARIES)
    path = RESULTS / "libraries.json"
    rows = json.loads(path.read_text())["libraries"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        for library in wanted:
            rows[library] = row(library, Path(name) / library)
            told = {one: rows[one] for one in LIBRARIES if one in rows}
            print(write("libraries", {"what": "our files and loops, judged by libraries", "libraries": told}))
    if any(one["failed"] or not one["passed"] for one in rows.values()):
        sys.exit("some failed; the result file says which")


if __name__ == "__main__":
    main()
