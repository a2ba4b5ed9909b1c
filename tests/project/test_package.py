"""What setup.cfg declares is what the code needs, and an installed distcomp has every file it reads."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import distcomp

ROOT = Path(__file__).parents[2]
NOT_INSTALLED = {".c", ".h", ".so", ".pyc"}


@pytest.fixture(scope="module")
def declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> set[str]:
    """The names in a list of requirements."""
    lines = (line.strip() for line in text.splitlines())
    return {re.split(r"[<>=!~\[; ]", line)[0] for line in lines if line and not line.startswith("#")}


def test_the_core_needs_torch_and_numpy_alone(declared: configparser.ConfigParser) -> None:
    assert requirements(declared["options"]["install_requires"]) == {"torch", "numpy"}


def test_what_the_code_asks_of_an_extra_is_in_it(declared: configparser.ConfigParser) -> None:
    extras = {name: requirements(text) for name, text in declared["options.extras_require"].items()}
    asked = re.compile(r"\brequire\(\s*\"(\w+)[\w.]*\",\s*(?:extra=)?\"(\w+)\"")
    found = [pair for path in (ROOT / "distcomp").rglob("*.py") for pair in asked.findall(path.read_text())]
    assert found
    assert [(module, extra) for module, extra in found if module not in extras.get(extra, ())] == []


def test_the_tested_torch_is_in_the_declared_range(declared: configparser.ConfigParser) -> None:
    lowest = re.search(r"torch>=(\d+)\.(\d+)", declared["options"]["install_requires"])
    tested = re.search(r"torch==(\d+)\.(\d+)", (ROOT / "scripts" / "_venv.sh").read_text())
    assert lowest is not None
    assert tested is not None
    assert tuple(map(int, lowest.groups())) <= tuple(map(int, tested.groups()))


def test_setup_cfg_holds_all_metadata() -> None:
    """A [project] table would make setuptools ignore it."""
    assert "[project]" not in (ROOT / "pyproject.toml").read_text()


def test_an_installation_has_every_file(tmp_path: Path) -> None:
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    made = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT / "distcomp", tmp_path / "distcomp", ignore=made)
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    wanted = {path.relative_to(tmp_path) for path in (tmp_path / "distcomp").rglob("*.*")}
    wanted = {path for path in wanted if path.suffix not in NOT_INSTALLED}
    built = {path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*.*")}
    assert Path("distcomp/py.typed") in wanted
    assert wanted - built == set()


def test_the_changelog_begins_with_this_version() -> None:
    """Below what is not released yet, if there is any."""
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(one for one in versions if one != "Unreleased") == distcomp.__version__
    assert "Unreleased" not in versions[1:]


def loaded_by(statement: str) -> set[str]:
    """The modules of a fresh process after a statement."""
    script = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import distcomp", "from distcomp.network import Fabric, emulate"])
def test_what_needs_no_torch_brings_none(statement: str) -> None:
    assert {"torch", "numpy"} & loaded_by(statement) == set()


def test_importing_it_beside_torch_takes_no_time() -> None:
    """Counted, for a time depends on the machine: what little is ours, all else being torch's own already."""
    ours = {
        "distcomp",
        "distcomp.registry",
        "distcomp.version",
        "distcomp.transports",
        "distcomp.transports.mpi",
    }
    assert loaded_by("import torch, distcomp") - loaded_by("import torch") <= ours
    assert {name for name in loaded_by("import torch, distcomp") if name.startswith("distcomp")} <= ours


def test_the_public_names_bring_nothing_slow_and_no_extra() -> None:
    """torch._dynamo and torch.distributed.checkpoint take seconds; extras come when they are asked for."""
    loaded = loaded_by("import torch, distcomp; distcomp.attach; import distcomp.cli")
    slow = {"torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "sympy", "triton"}
    extras = {"mpi4py", "rich", "matplotlib", "pyroute2", "sklearn", "tensorboard", "horovod", "ray"}
    assert loaded & (slow | extras) == set()


def test_who_imports_the_methods_alone_may_name_any() -> None:
    program = "from distcomp.methods import parse; print(type(parse('dcd')).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "DCD"


def test_windows_is_refused_in_one_sentence() -> None:
    """By whoever builds it, and by whoever imports it."""
    for statement in ("import distcomp", "exec(open('setup.py').read())"):
        program = f"import importlib.util, sys; from typing import Any; sys.platform = 'win32'; {statement}"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "does not run on Windows" in done.stderr.splitlines()[-1]
        assert "use WSL 2" in done.stderr.splitlines()[-1]


def test_emulation_is_refused_elsewhere_and_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    network = distcomp.network
    assert "run it on Linux" in str(network.support().refusal)
    with (
        pytest.raises(distcomp.DistcompError, match="run it on Linux"),
        network.emulate(network.Fabric.uniform(2, "1gbit")),
    ):
        raise AssertionError("an emulated network stands where there can be none")


def test_wheels_are_abi3_for_linux_and_macs() -> None:
    """cibuildwheel's own configuration: one wheel for each platform, tried where it was built."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert told["build"] == "cp311-*"
    assert "*-win*" in told["skip"]
    assert {"manylinux-x86_64-image", "manylinux-aarch64-image"} <= set(told["linux"])
    assert told["macos"]["archs"] == ["arm64"]
    (script,) = re.findall(r"\{project\}/(\S+)", told["test-command"])
    assert (ROOT / script).is_file()
