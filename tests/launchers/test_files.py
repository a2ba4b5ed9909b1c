"""The files of launchers/: manifests that agree with themselves, a command to copy in every README."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
LAUNCHERS = Path(__file__).parents[2] / "launchers"
FOLDERS = sorted(path for path in LAUNCHERS.iterdir() if path.is_dir())


def manifest(name: str) -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((LAUNCHERS / "kubernetes" / name).read_text())
    return told


@pytest.mark.parametrize("script", ["nodes.sh", "elastic.sh"])
def test_a_variable_that_is_missing_is_named(script: str) -> None:
    done = subprocess.run(
        [str(LAUNCHERS / "torchrun" / script), "train.py"],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "NODES" in done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_readme_starts_with_the_command_to_copy(folder: Path) -> None:
    title, _, rest = (folder / "README.md").read_text().partition("\n\n")
    assert title.startswith("# ")
    assert rest.startswith("```console\n$ ")
    for file in re.findall(r"launchers/[\w./-]+", rest):
        assert (LAUNCHERS.parent / file).exists(), file


def test_the_jobset_counts_its_nodes_once() -> None:
    spec = manifest("jobset.yaml")["spec"]["replicatedJobs"][0]
    job = spec["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"]
    assert f"--nnodes={job['completions']}" in container["command"]
    assert job["completionMode"] == "Indexed"  # the index is the node's rank
    assert "--node-rank=$(NODE_RANK)" in container["command"]
    name = manifest("jobset.yaml")["metadata"]["name"]
    assert f"--master-addr={name}-{spec['name']}-0-0.{name}" in container["command"]


@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_manifests_are_what_kubernetes_takes(name: str) -> None:
    """Against the part of the resource definitions that they use: no key misspelt, no type wrong."""
    definitions = json.loads((HERE / "schemas.json").read_text())["$defs"]
    told = manifest(name)
    jsonschema.validate(told, {"$ref": f"#/$defs/{told['kind']}", "$defs": definitions})


def test_the_script_that_a_pod_runs_is_where_the_image_has_it() -> None:
    """docker/cpu.Dockerfile copies ``examples`` to ``/examples`` and works in ``/work``."""
    image = (LAUNCHERS.parent / "docker" / "cpu.Dockerfile").read_text()
    assert "COPY examples /examples" in image
    for name in ("jobset.yaml", "trainjob.yaml"):
        (script,) = re.findall(r"\S*digits\.py", (LAUNCHERS / "kubernetes" / name).read_text())
        assert script == "/examples/digits.py"
        assert (LAUNCHERS.parent / script.removeprefix("/")).is_file()


def test_every_launcher_is_on_a_page_of_the_docs() -> None:
    page = (LAUNCHERS.parent / "docs" / "launchers.md").read_text()
    assert set(re.findall(r"launchers/(\w+)/README.md", page)) == {folder.name for folder in FOLDERS}


def test_the_trainjob_names_the_runtime_that_starts_torchrun() -> None:
    spec = manifest("trainjob.yaml")["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    assert spec["trainer"]["command"][0] == "torchrun"


SKY = """
import sys, sky
from sky.skylet import constants
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(task.num_nodes, resources.cpus, resources.memory, *sorted(task.envs))
print(*[value for name, value in vars(constants).items() if isinstance(value, str)], sep="\\n")
"""


def read_by_skypilot(task: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """What SkyPilot's own reader makes of a task; it keeps files in the home of its user."""
    command = [sys.executable, "-c", SKY, str(task)]
    environment = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed; pip install skypilot"
)
def test_skypilot_reads_its_task(tmp_path: Path) -> None:
    """Every variable that its commands ask for is its own or SkyPilot's; a misspelt key is refused."""
    told = (LAUNCHERS / "skypilot" / "train.yaml").read_text()
    done = read_by_skypilot(LAUNCHERS / "skypilot" / "train.yaml", tmp_path)
    assert done.returncode == 0, done.stderr
    first, *names = done.stdout.splitlines()
    assert first == "4 8+ 32+ METHOD RANKS SCRIPT"
    asked = set(re.findall(r"\$\{?([A-Z_]+)", yaml.safe_load(told)["run"]))
    assert asked - {"METHOD", "RANKS", "SCRIPT"} <= set(names)
    assert "SKYPILOT_NODE_RANK" in asked
    (tmp_path / "misspelt.yaml").write_text(told.replace("num_nodes", "num_node"))
    done = read_by_skypilot(tmp_path / "misspelt.yaml", tmp_path)
    assert done.returncode != 0
    assert "num_node" in done.stderr
